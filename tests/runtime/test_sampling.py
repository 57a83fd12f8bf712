"""`sample`: ties, support, order of the filters, frequencies, and errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged.runtime import Sampler, sample

DRAWS = 400


def draw(logits, sampler, seed=0, draws=DRAWS):
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, len(logits)))
    return np.asarray(sample(logits, sampler, jax.random.split(jax.random.key(seed), draws)))


def support_ref(logits, top_k, top_p):
    """Tokens that may be drawn at temperature 1: rank by logit, then id; keep k; renormalise; keep up to the mass."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    weights = np.exp(np.asarray(logits, np.float64)[order])
    kept, mass = [], 0.0
    for token, share in zip(order, weights / weights.sum(), strict=True):
        if not kept or mass < top_p:
            kept.append(token)
        mass += share
    return set(kept)


def test_greedy_takes_the_largest_and_of_ties_the_lowest_id():
    logits = jnp.array([[0.0, 3.0, 3.0], [-1.0, -1.0, -1.0], [1.0, 2.0, 5.0]])
    assert sample(logits, Sampler()).tolist() == [1, 0, 2]
    keys = jax.random.split(jax.random.key(0), 3)
    assert sample(logits, Sampler(temperature=2.0, top_k=1), keys).tolist() == [1, 0, 2]
    assert sample(logits, Sampler(temperature=5.0, top_p=1e-9), keys).tolist() == [1, 0, 2]


# Multiples of 1/2, so that ties are common; masses that no cumulative sum of such weights meets exactly.
@settings(max_examples=25)
@given(
    st.lists(st.integers(-4, 4), min_size=6, max_size=6),
    st.sampled_from([None, 1, 2, 4, 6, 100]),
    st.sampled_from([None, 0.0123, 0.3171, 0.6977, 0.9871, 1.0]),
)
def test_only_the_support_is_drawn(halves, top_k, top_p):
    logits = [h / 2 for h in halves]
    got = set(draw(logits, Sampler(temperature=1.0, top_k=top_k, top_p=top_p), draws=64).tolist())
    assert got <= support_ref(logits, top_k, 2.0 if top_p in (None, 1.0) else top_p)


def test_the_whole_support_is_drawn():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    for sampler, expected in [
        (Sampler(temperature=1.0), {0, 1, 2, 3}),
        (Sampler(temperature=1.0, top_p=0.65), {0, 1}),
        (Sampler(temperature=1.0, top_p=0.75), {0, 1, 2}),
        (Sampler(temperature=1.0, top_k=3), {0, 1, 2}),
        # Of the two likeliest, 4/7 reaches 0.55 alone: without the renormalisation 0.4 would not.
        (Sampler(temperature=1.0, top_k=2, top_p=0.55), {0}),
    ]:
        assert set(draw(logits, sampler).tolist()) == expected, sampler


def test_frequencies_follow_the_temperature():
    logits = np.log([0.6, 0.3, 0.1])
    for temperature in (0.5, 1.0, 2.0):
        expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        for top_k in (None, 3):
            tokens = draw(logits, Sampler(temperature=temperature, top_k=top_k), draws=4000)
            share = np.bincount(tokens, minlength=3) / 4000
            # Five standard deviations of a share of 4000 draws are at most 0.04.
            np.testing.assert_allclose(share, expected, atol=0.04)


def test_a_row_depends_on_its_own_key_and_logits_only():
    sampler, keys = Sampler(temperature=1.0, top_p=0.9), jax.random.split(jax.random.key(3), 5)
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((5, 7)), jnp.float32)
    together = sample(logits, sampler, keys)
    alone = [int(sample(logits[i], sampler, keys[i])) for i in range(5)]
    assert together.tolist() == alone
    assert sample(logits[::-1], sampler, keys[::-1]).tolist() == alone[::-1]
    grid = sample(logits[:4].reshape(2, 2, 7), sampler, keys[:4].reshape(2, 2))
    assert grid.shape == (2, 2) and grid.reshape(-1).tolist() == alone[:4]


def test_minus_infinity_is_never_drawn():
    logits = [-np.inf, 0.0, -np.inf, 0.0]
    for sampler in (Sampler(temperature=1.0), Sampler(temperature=1.0, top_k=3), Sampler(temperature=1.0, top_p=0.99)):
        assert set(draw(logits, sampler).tolist()) == {1, 3}


def test_one_trace_a_sampler():
    traced = chex.assert_max_traces(lambda logits, keys: sample(logits, Sampler(temperature=1.0, top_k=2), keys), n=1)
    run = jax.jit(traced)
    for seed in range(3):
        tokens = run(jnp.full((2, 4), float(seed), jnp.bfloat16), jax.random.split(jax.random.key(seed), 2))
        assert tokens.dtype == jnp.int32


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Sampler(temperature=-1.0), ValueError, "temperature must be finite and not negative; got -1.0"),
        (lambda: Sampler(temperature=float("nan")), ValueError, "got nan"),
        (lambda: Sampler(top_k=0), ValueError, "top_k must be at least 1.*got 0. For all tokens, leave it out"),
        (lambda: Sampler(top_k=2.0), TypeError, "top_k must be a Python int or None"),
        (lambda: Sampler(top_p=0.0), ValueError, r"top_p must be in \(0, 1\]"),
        (lambda: Sampler(top_p=1.5), ValueError, r"top_p must be in \(0, 1\].*got 1.5"),
        (lambda: sample(jnp.zeros((2, 3)), Sampler(temperature=1.0)), ValueError, r"shape \(2,\).*got None"),
        (
            lambda: sample(jnp.zeros((2, 3)), Sampler(temperature=1.0), jax.random.key(0)),
            ValueError,
            r"one typed PRNG key per row, shape \(2,\)",
        ),
        (lambda: sample(jnp.zeros((2, 0)), Sampler()), ValueError, r"got \(2, 0\)"),
    ],
)
def test_error_texts(make, error, text):
    with pytest.raises(error, match=text):
        make()
