"""`calibrate`: scales from what layers see, refusals of pages without scales, and what stays as it was."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.runtime import PagedAttention, PagedCache, Rotary, calibrate, generate

EMBED, VOCAB = 16, 32
SPEC = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
# Relative, of the norm of outputs. Steps of int8 are 1/127 of the largest number, those of float8 1/16 of each number,
# in scores of about 10. An int8 layer with scales of 1 is off by 0.6.
TOLERANCE = {"int8": 0.04, "float8_e4m3fn": 0.1}


def layout_of(dtype="int8", scales="head", **changes):
    facts = {"page_size": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": jnp.dtype(dtype), "scales": scales}
    return paged.PageLayout(**{**facts, **changes})


def layer_of(layout, key, **options):
    return PagedAttention(SPEC, layout, 6, EMBED, rotary=Rotary(8), key=key, **options)


def make(layout, **options):
    return eqx.nn.make_with_state(layer_of)(layout, jax.random.key(0), **options)


def features(count, seed=1):
    return 3 * jax.random.normal(jax.random.key(seed), (count, EMBED))


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def keys_and_values(layer, x):
    """As `Rotary` turns them, in NumPy: ``[tokens, kv_heads, head_dim]``."""
    k, v = (np.asarray(x @ p.weight.T, np.float64).reshape(-1, 2, 8) for p in (layer.key_proj, layer.value_proj))
    angle = np.outer(np.arange(len(x)), 10000.0 ** (-np.arange(4) / 4))[:, None]
    a, b = np.split(k, 2, axis=-1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1), v


@pytest.mark.parametrize(("dtype", "scales"), [("int8", "head"), ("float8_e4m3fn", "tensor")])
def test_scales_are_the_largest_magnitudes_and_serve(dtype, scales):
    """Of all prompts together, whose padding does not count, times the margin."""
    layer, state = make(layout_of(dtype, scales))
    prompts = [features(7), features(5, seed=2)]  # both padded to 8 rows
    state = calibrate(layer, state, prompts, margin=1.25)
    pages, axes = state.get(layer.cache.index), (0, 2) if scales == "head" else (0, 1, 2)
    seen = [keys_and_values(layer, x) for x in prompts]
    for which, scale in enumerate((pages.k_scale, pages.v_scale)):
        largest = np.max([np.abs(each[which]).max(axis=axes) for each in seen], axis=0)
        np.testing.assert_allclose(scale, 1.25 * largest / LARGEST[dtype], rtol=1e-5)
    y, _ = eqx.filter_jit(layer)(prompts[0], paged.RaggedBatch.prefill(7, [5, 0], 7), state)
    assert 0 < error(y, eqx.filter_jit(layer.dense)(prompts[0][None])[0]) < TOLERANCE[dtype]


class Stack(eqx.Module):
    """Token ids through a layer with per-token scales and two stacked layers with per-head ones, to logits."""

    embedding: jax.Array
    first: PagedAttention
    stacked: PagedAttention

    def __init__(self, key):
        self.embedding = jax.random.normal(key, (VOCAB, EMBED))
        self.first = layer_of(layout_of(scales="token"), key)
        self.stacked = eqx.filter_vmap(lambda key: layer_of(layout_of(), key))(jax.random.split(key, 2))

    def __call__(self, tokens, batch, state):
        x = self.embedding[tokens]
        y, state = self.first(x, batch, state)
        arrays, static = eqx.partition(self.stacked, eqx.is_array)

        def body(x, layer):
            y, pages = eqx.combine(layer[0], static).attend_pages(x, layer[1], batch)
            return x + y, pages

        x, pages = jax.lax.scan(body, x + y, (arrays, state.get(self.stacked.cache.index)))
        return x @ self.embedding.T, state.set(self.stacked.cache.index, pages)

    def dense(self, tokens):
        x = self.embedding[tokens][None]
        arrays, static = eqx.partition(self.stacked, eqx.is_array)
        x, _ = jax.lax.scan(
            lambda x, layer: (x + eqx.combine(layer, static).dense(x), None), x + self.first.dense(x), arrays
        )
        return (x @ self.embedding.T)[0]


@pytest.mark.kernels
def test_a_model_is_calibrated_and_then_generates():
    """Stacked layers too; pages of other kinds, and what the pages hold, stay as they were."""
    model, state = eqx.nn.make_with_state(Stack)(jax.random.key(0))
    prompt, serve = (
        [3, 1, 4, 1, 5, 9, 2, 6],
        {"max_new_tokens": 3, "num_slots": 1, "chunk_size": 8, "prefix_cache": False},
    )
    with pytest.raises(ValueError, match="These pages have no scales yet"):
        generate(model, state, [prompt], **serve)
    state = calibrate(model, state, [prompt, [7, 7, 0, 7, 7]])
    of = [state.get(layer.cache.index) for layer in (model.first, model.stacked)]
    assert [pages.k_scale.shape for pages in of] == [(6, 2, 4), (2, 2)]
    assert not any(np.asarray(array).any() for pages in of for array in pages.arrays)
    answer = generate(model, state, [prompt], **serve)[0].tokens
    logits = np.asarray(eqx.filter_jit(model.dense)(jnp.asarray([*prompt, *answer])))[len(prompt) - 1 :]
    for token, row in zip(answer, logits, strict=False):  # dense recomputation's best, or within what int8 rounds
        assert row.max() - row[token] < 0.3 < row.max() - np.median(row)


def test_given_scales_are_in_the_pages():
    layer, state = make(layout_of(), k_scale=0.1, v_scale=jnp.array([0.05, 0.06]))
    pages = state.get(layer.cache.index)
    np.testing.assert_array_equal(pages.k_scale, np.float32([0.1, 0.1]))
    np.testing.assert_array_equal(pages.v_scale, np.float32([0.05, 0.06]))


@pytest.mark.parametrize("scales", ["tensor", "head"])
@pytest.mark.parametrize("how", ["layer", "cache", "attend", "write", "keys"])
def test_int8_pages_without_scales_are_refused_by_name(how, scales):
    """They would hold whole numbers: silence here was noise in the output."""
    layout, batch = layout_of(scales=scales), paged.RaggedBatch.prefill(6, [1, 3], 6)
    q, kv, pages = jnp.ones((6, 4, 8)), jnp.ones((6, 2, 8)), layout.init(6)
    layer, state = make(layout)
    cache, cache_state = eqx.nn.make_with_state(PagedCache)(SPEC, layout, 6)
    calls = {
        "layer": lambda: eqx.filter_jit(layer)(features(6), batch, state),
        "cache": lambda: cache(q, kv, kv, batch, cache_state),
        "attend": lambda: paged.lower(SPEC, layout)(q, pages, batch),
        "write": lambda: paged.write(kv, kv, pages, batch),
        "keys": lambda: pages.keys(),
    }
    with pytest.raises(ValueError, match=rf"no scales yet.*scales={scales}.*layout.init.*calibrate.*scales=\"token\""):
        calls[how]()


def test_float8_pages_begin_with_scales_of_one():
    layer, state = make(layout_of("float8_e4m3fn"))
    np.testing.assert_array_equal(state.get(layer.cache.index).k_scale, np.ones(2, np.float32))


def _nothing(tokens, batch, state):
    return tokens, state


ERRORS = {
    "no such pages": (lambda: calibrate(*make(layout_of(scales="token")), [features(3)]), ValueError, "scales 'token'"),
    "no prompts": (lambda: calibrate(*make(layout_of()), []), ValueError, "prompts is empty"),
    "empty prompt": (lambda: calibrate(*make(layout_of()), [[]]), ValueError, r"prompts\[0\] must have at least one"),
    "text": (lambda: calibrate(*make(layout_of()), ["hello"]), TypeError, r"prompts\[0\] must be an array of token"),
    "too long": (lambda: calibrate(*make(layout_of()), [features(25)]), ValueError, "25 tokens needs 7 pages of 4.*6"),
    "margin": (lambda: calibrate(*make(layout_of()), [features(3)], margin=0), ValueError, "margin must be positive"),
    "not called": (lambda: calibrate(_nothing, make(layout_of())[1], [features(3)]), ValueError, "all 0.*call it"),
    "NaN": (lambda: calibrate(*make(layout_of()), [features(3) * jnp.nan]), ValueError, "NaN or infinite"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_texts(name):
    call, error, text = ERRORS[name]
    with pytest.raises(error, match=text):
        call()
