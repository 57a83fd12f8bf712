"""`sample`: ties, support, order of the filters, frequencies, and errors."""

import importlib

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged.runtime import Sampler, Samplers, log_probs, sample, top_log_probs
from paged.runtime import draw as draw_rows

DRAWS = 400
drawing, sampling = (importlib.import_module(f"paged.runtime.sampling.{name}") for name in ("draw", "sample"))


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


def test_the_limit_of_low_temperatures_is_the_largest_logit():
    logits = jnp.array([[-3.0, -1.0, -2.0], [20.0, 50.0, 40.0], [-3e38, -3e38, 3e38], [-jnp.inf, -1.0, -jnp.inf]])
    keys = jax.random.split(jax.random.key(0), 4)
    for temperature in (1e-30, 1e-37, 1e-38, 1e-320):
        for filters in ({}, {"top_p": 0.9}):
            sampler = Sampler(temperature=temperature, **filters)
            assert sample(logits, sampler, keys).tolist() == [1, 1, 2, 1], sampler
    assert Sampler(temperature=1e-38).is_greedy and not Sampler(temperature=1.2e-38).is_greedy
    hot = Sampler(temperature=1e300)  # infinite in float32: every finite logit is as likely
    assert set(draw([-jnp.inf, 90.0, -90.0], hot).tolist()) == {1, 2}


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9, "top_k": 3},
                                     {"temperature": 1.0, "top_p": 0.9}], ids=str)  # fmt: skip
def test_rows_without_a_token_give_minus_one_and_inf_is_drawn(options):
    nan, inf = float("nan"), float("inf")
    logits = [[0.0, nan, 1.0], [nan] * 3, [-inf] * 3, [nan, inf, 0.0], [0.0, inf, 9.0], [-inf, -inf, 5.0]]
    keys = jax.random.split(jax.random.key(0), 6)
    for dtype in (jnp.float32, jnp.bfloat16):
        assert sample(jnp.asarray(logits, dtype), Sampler(**options), keys).tolist() == [-1, -1, -1, -1, 1, 2]
    with jax.debug_nans(True):
        sample(jnp.asarray(logits[-2:]), Sampler(**options), keys[-2:])
    if options:
        assert set(draw([inf, 5.0, inf], Sampler(**options)).tolist()) == {0, 2}


@pytest.fixture
def few_candidates(monkeypatch):
    monkeypatch.setattr(drawing, "_CANDIDATES", 2)
    sampling._draw.clear_cache()
    yield
    sampling._draw.clear_cache()


def test_candidates_that_do_not_hold_the_mass_give_way_to_all(few_candidates):
    """In one batch: rows whose mass two tokens hold, and rows that need more, with many ties and with no token."""
    rng = np.random.default_rng(0)
    logits = rng.integers(-4, 5, (512, 9)) / 2 * rng.choice([0.0, 0.5, 1.0, 4.0], (512, 1))
    logits[5], logits[6, 3] = -np.inf, np.nan
    sampler, keys = Sampler(temperature=1.0, top_p=0.6977), jax.random.split(jax.random.key(0), 512)
    drawn = sample(jnp.asarray(logits, jnp.float32), sampler, keys).tolist()
    supports = [support_ref(row, None, 0.6977) if np.isfinite(row).all() else {-1} for row in logits]
    assert {min(len(support), 5) for support in supports} == {1, 2, 3, 4, 5}
    assert all(token in support for token, support in zip(drawn, supports, strict=True))
    is_peaked = np.array([len(support) <= 2 and -1 not in support for support in supports])
    peaked = jnp.asarray(np.resize(logits[is_peaked], (512, 9)), jnp.float32)
    alone = sample(peaked, sampler, keys).tolist()
    assert sample(peaked.at[0].set(0.0), sampler, keys).tolist()[1:] == alone[1:]
    by_vmap = jax.vmap(lambda row, key: sample(row[None], sampler, key[None])[0])(peaked, keys)
    assert by_vmap.tolist() == alone
    for row in ([0.0] * 9, np.log([0.3, 0.3, 0.2, 0.05, 0.05, 0.04, 0.03, 0.02, 0.01])):
        assert set(draw(row, sampler, draws=512).tolist()) == support_ref(row, None, 0.6977)


RULES = [
    Sampler(),
    Sampler(temperature=1.0),
    Sampler(temperature=0.5, top_k=5),
    Sampler(temperature=2.0, top_p=0.6977),
    Sampler(temperature=1.0, top_k=700, top_p=0.3171),
    Sampler(temperature=1.0, top_k=600),
    Sampler(temperature=1.0, min_p=0.5),
    Sampler(temperature=1.0, logit_bias={3: 90.0, 5: -np.inf}),
    Sampler(top_k=1, logit_bias={900: 1e6}),
]


def test_each_row_has_a_rule_of_its_own_whatever_the_others_have():
    """More tokens than candidates, of which some rows need more than there are."""
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 1, (len(RULES), 1000)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), len(RULES))
    rules, run = Samplers.of(RULES), jax.jit(draw_rows)
    together = run(logits, rules, keys)
    one_by_one = [jax.tree.map(lambda x, row=row: x[row : row + 1], (logits, rules, keys)) for row in range(len(RULES))]
    assert together.tolist() == [run(*own)[0].item() for own in one_by_one]
    assert together[0] == jnp.argmax(logits[0]) and together[7] == 3 and together[8] == 900


def test_more_than_the_candidates_by_count_and_by_mass(few_candidates):
    """Each row has another rule, and the bisection finds exactly what it keeps."""
    rng = np.random.default_rng(0)
    logits = rng.integers(-2, 3, (6, 9)) / 2
    rules = [(4, None), (5, 0.6977), (7, 0.9871), (None, 0.6977), (3, 0.0123), (None, None)]
    samplers = Samplers.of([Sampler(temperature=1.0, top_k=top_k, top_p=top_p) for top_k, top_p in rules])
    many = jax.tree.map(lambda x: jnp.repeat(x, 300, axis=0), (jnp.asarray(logits, jnp.float32), samplers))
    tokens = np.asarray(jax.jit(draw_rows)(*many, jax.random.split(jax.random.key(0), 1800))).reshape(6, 300)
    for row, own, (top_k, top_p) in zip(logits, tokens, rules, strict=True):
        assert set(own.tolist()) == support_ref(row, top_k, 2.0 if top_p is None else top_p)


def test_a_small_part_of_the_largest_probability_is_the_least():
    logits = np.log([0.4, 0.25, 0.2, 0.1, 0.05])
    assert set(draw(logits, Sampler(temperature=1.0, min_p=0.45)).tolist()) == {0, 1, 2}
    assert set(draw(logits, Sampler(temperature=1.0, min_p=0.45, top_p=0.6)).tolist()) == {0, 1}
    assert set(draw(logits, Sampler(temperature=1.0, min_p=1.0)).tolist()) == {0}
    assert set(draw(logits, Sampler(temperature=1.0, min_p=0.0)).tolist()) == {0, 1, 2, 3, 4}


def test_biases_and_penalties_change_logits_before_the_temperature():
    logits = jnp.array([[2.0, -1.0, 0.5, jnp.inf]])
    seen, drawn = jnp.array([[True, True, False, False]]), jnp.array([[True, False, False, False]])
    rule = Sampler(repetition_penalty=2.0, presence_penalty=0.25, logit_bias={2: 3.0, 3: -np.inf})
    changed = Samplers.of([rule], num_biases=4).changed(logits, seen, drawn)
    assert changed.tolist() == [[0.75, -2.0, 3.5, -np.inf]]
    assert sample(logits, rule, seen=seen, drawn=drawn).tolist() == [2]
    assert sample(logits[0], rule, seen=seen[0], drawn=drawn[0]).tolist() == 2


def test_log_probabilities_are_those_of_the_model():
    logits = jnp.array([[1.0, 3.0, 2.0], [0.0, -40.0, 0.0]])
    weights = np.exp([[1.0, 3.0, 2.0], [0.0, -40.0, 0.0]])
    want = np.log(weights / weights.sum(1, keepdims=True))
    np.testing.assert_allclose(log_probs(logits, jnp.array([1, 2])), want[[0, 1], [1, 2]], rtol=1e-6)
    assert np.isnan(log_probs(logits, jnp.array([-1, 3]))).all()
    ids, logs = top_log_probs(logits.astype(jnp.bfloat16), 2)
    assert ids.tolist() == [[1, 2], [0, 2]]
    np.testing.assert_allclose(logs, want[[[0, 0], [1, 1]], ids], rtol=1e-6)


def test_the_vocabulary_is_never_ranked():
    def ranked(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("top_k", "sort"):
                yield equation.outvars[0].aval.shape[-1]
            for value in jax.tree.leaves(list(equation.params.values())):
                if hasattr(value, "jaxpr"):
                    yield from ranked(value.jaxpr)

    keys = jax.random.split(jax.random.key(0), 2)
    sampler = Sampler(temperature=1.0, top_p=0.9, top_k=4000)
    jaxpr = jax.make_jaxpr(lambda x: sample(x, sampler, keys))(jnp.zeros((2, 5000)))
    assert list(ranked(jaxpr.jaxpr)) == [512]


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
        (lambda: Sampler(top_k=2.0), TypeError, "top_k must be an int; got 2.0"),
        (lambda: Sampler(top_p=0.0), ValueError, r"top_p must be in \(0, 1\]"),
        (lambda: Sampler(temperature=True), TypeError, "temperature must be a number; got True"),
        (lambda: Sampler(temperature="1"), TypeError, "temperature must be a number; got '1'"),
        (lambda: Sampler(top_k=True), TypeError, "top_k must be an int; got the bool True"),
        (lambda: Sampler(top_k=2**40), ValueError, "top_k must be at most"),
        (lambda: Sampler(top_p=True), TypeError, "top_p must be a number; got True"),
        (lambda: Sampler(top_p="all"), TypeError, "top_p must be a number; got 'all'"),
        (lambda: sample(jnp.zeros((2, 3), int), Sampler()), TypeError, "logits must be floats; got int32"),
        (lambda: sample(jnp.zeros((2, 3)), 0.7), TypeError, "sampler must be a Sampler; got 0.7"),
        (lambda: sample(jnp.zeros((2, 3)), Sampler(temperature=1.0), 0), ValueError, r"one typed PRNG key.*got 0"),
        (lambda: Sampler(min_p=-0.1), ValueError, r"min_p must be in \[0, 1\]"),
        (lambda: Sampler(repetition_penalty=0), ValueError, "repetition_penalty must be positive; got 0.0"),
        (lambda: Sampler(presence_penalty=np.inf), ValueError, "presence_penalty must be finite"),
        (lambda: Sampler(logit_bias=3), TypeError, "logit_bias must be numbers by token id"),
        (lambda: Sampler(logit_bias={-1: 0.0}), ValueError, "a token of logit_bias must be at least 0"),
        (lambda: Sampler(logit_bias={4: np.inf}), ValueError, r"logit_bias\[4\] must be finite"),
        (lambda: Sampler(logit_bias=[(4, 1.0), (4, 2.0)]), ValueError, "token 4 twice"),
        (lambda: Samplers.of([Sampler(logit_bias={4: 1.0})], num_biases=0), ValueError, "room for 0"),
        (lambda: sample(jnp.zeros(3), Sampler(presence_penalty=1.0)), ValueError, "seen and drawn must be bool"),
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


def test_numbers_of_numpy_are_numbers(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the annotations say Python's
    assert Sampler(temperature=np.float32(0.5), top_k=np.int64(3), top_p=np.float64(1)) == Sampler(
        temperature=0.5, top_k=3, top_p=1.0
    )
