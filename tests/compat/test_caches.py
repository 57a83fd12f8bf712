"""Caches of other orders and of fewer bits: attended in place where the order is known, refused where it is not."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.paged_attention import quantization_utils

from paged.compat import (
    page_attention,
    prefill_page_attention,
    ragged_page_attention_v2,
    ragged_page_attention_v3,
)
from paged.compat.caches import ragged_layout
from paged.compat.static import Options

from .entries import CLOSE, ENTRIES, RICH, arrays_of, built_for, results

said = ENTRIES["page"].arguments(RICH) | {"target": "xla"}
slow = pytest.mark.slow


def _draw(seed, *shape, dtype=jnp.float32):
    return 3 * jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize("name", ["page", "prefill"])
def test_pages_before_heads_give_what_heads_before_pages_give(name):
    """Holes, table entries of no page, NaN in places without tokens and empty sequences are in the case."""
    built = built_for(name, ENTRIES[name].case(RICH, corner="mixed"))
    args = arrays_of(name, built)
    want = results(name, built)
    swapped = [args[0], *(jnp.swapaxes(x, 0, 1) for x in args[1:3]), *args[3:]]
    got = ENTRIES[name].call(*swapped, cache_order="pages_first", **{**ENTRIES[name].arguments(RICH), "target": "xla"})
    np.testing.assert_allclose(got, want, rtol=0, atol=CLOSE)


def test_pages_before_heads_are_not_copied():
    cache = jax.ShapeDtypeStruct((64, 2, 4, 8), jnp.float32)
    ints = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((2, 3), jnp.int32)
    call = functools.partial(page_attention, cache_order="pages_first", target="xla")
    jaxpr = jax.make_jaxpr(call)(jax.ShapeDtypeStruct((2, 4, 8), jnp.float32), cache, cache, *ints)
    large = [e.primitive.name for e in _equations(jaxpr.jaxpr) for x in e.outvars if x.aval.size >= 64 * 2 * 4 * 8]
    assert set(large) <= {"reshape", "pjit", "jit", "custom_vjp_call"}, large


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


AMBIGUOUS = _draw(2, 8, 4, 4, 8), jnp.array([8, 8]), jnp.array([[0, 1], [2, 3]])


def test_where_both_orders_fit_the_call_says_which():
    """Entries far outside of the pool are no pages of another head: times 4 heads, they are page 4 in int32."""
    cache, *ints = AMBIGUOUS
    q = _draw(3, 2, 8, 8)
    with pytest.raises(ValueError, match=r'is \[kv_heads, .* or \[pages, .*Say cache_order="heads_first"'):
        page_attention(q, cache, cache, *ints)
    swapped = jnp.swapaxes(cache, 0, 1)
    for tables in (ints[1], jnp.array([[3, 2**30 + 1], [-1, 1]])):
        got = page_attention(q, cache, cache, ints[0], tables, cache_order="pages_first")
        want = page_attention(q, swapped, swapped, ints[0], tables, cache_order="heads_first")
        np.testing.assert_allclose(got, want, rtol=0, atol=CLOSE)


REFUSED = {
    "no such order": (lambda: page_attention(_draw(0, 2, 8, 8), AMBIGUOUS[0], *AMBIGUOUS, cache_order="NHD"),
                      "cache_order must be one of .*'pages_first'"),
    "not that order": (lambda: page_attention(_draw(0, 2, 6, 8), AMBIGUOUS[0], *AMBIGUOUS, cache_order="heads_first"),
                       "6 heads, which must be a multiple of the 8 KV heads of key_cache, .*by cache_order"),
    "another order": (lambda: page_attention(_draw(0, 2, 12, 8), AMBIGUOUS[0], *AMBIGUOUS), 'say cache_order="pages_'),
    "keys before values": (lambda: _v2(_draw(0, 3, 4, 8), _draw(1, 6, 2, 2, 8, 8)), "does not look like packed pages"),
    "keys in halves": (lambda: _v2(_draw(0, 3, 4, 8), _draw(1, 6, 4, 2, 8, 8)), "pack of 1, 2 or 4 heads"),
    "64 lanes": (lambda: _v2(_draw(0, 3, 8, 64), _draw(1, 6, 4, 4, 1, 128)), "side by side, or each padded with zeros"),
    "64 lanes of one head": (lambda: _v3(1, (6, 4, 1, 2, 128)), "side by side, or each padded with zeros"),
    "no lanes": (lambda: _v2(_draw(0, 3, 8, 8), _draw(1, 6, 4, 4, 8), cache_order="joined"), r"rows of 2 \* 8, whole"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_order_that_does_not_fit_or_is_not_said_is_refused(name):
    act, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        act()


LENGTHS, TABLES, STARTS = jnp.array([6, 5]), jnp.array([[5, 2], [1, 0]]), jnp.array([0, 2, 3])


def _v2(q, cache, **how):
    return ragged_page_attention_v2(q, cache, LENGTHS, TABLES, STARTS, 2, **how)


def _v3(heads, shape, **how):
    q, k, v = (_draw(i, 3, h, 64) for i, h in enumerate((8, heads, heads)))
    ends = [0, 0, 2]
    return ragged_page_attention_v3(q, k, v, _draw(3, *shape), LENGTHS, TABLES.reshape(-1), STARTS, ends, **how)


def test_keys_and_values_side_by_side_are_in_turn_with_rows_of_half_the_width():
    """The cache of 64 lanes that tpu-inference has, which version 3 knows by its keys' heads."""
    joined, q = _draw(3, 6, 4, 4, 1, 128), _draw(0, 3, 8, 64)
    turns = joined.reshape(6, 4, 8, 64)
    options = Options.of("xla", False, ("softmax_scale", None), ("logits_soft_cap", None), None)
    declared = options._replace(cache_order="joined")
    layout = ragged_layout(options, "kv_pages", turns, q)
    assert layout == ragged_layout(declared, "kv_pages", joined, q) == ragged_layout(options, "kv_pages", joined, q, 4)
    np.testing.assert_allclose(_v2(q, joined, cache_order="joined")[2], _by_hand(q[2], joined), rtol=0, atol=CLOSE)


@slow
def test_keys_and_values_side_by_side_are_written_as_they_lie():
    out, cache = _v3(4, (6, 4, 4, 1, 128))
    want, after = _v3(4, (6, 4, 8, 64))  # the same numbers, because one seed draws them in a row
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(cache.reshape(after.shape), after)


def _by_hand(q, joined):
    """The last row of the second sequence, of 5 tokens in pages 1 and 0."""
    tokens = np.asarray(joined[:, :, :, 0], np.float64)[np.array([1, 0])].reshape(-1, 4, 128)[:5].repeat(2, axis=1)
    scores = np.einsum("hd,thd->ht", np.asarray(q, np.float64), tokens[..., :64]) / 8
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("ht,thd->hd", weights / weights.sum(axis=1, keepdims=True), tokens[..., 64:])


@slow
def test_a_declared_padded_cache_is_read_as_such():
    q, turns = _draw(0, 3, 8, 64), _draw(3, 6, 4, 4, 64)
    padded = jnp.pad(turns, ((0, 0),) * 3 + ((0, 64),))
    np.testing.assert_allclose(_v2(q, padded, cache_order="interleaved"), _v2(q, turns), rtol=0, atol=CLOSE)


class Pair(NamedTuple):
    """Any object with these two arrays is quantised pages."""

    weight: jax.Array
    scales: jax.Array


@pytest.mark.parametrize("order", ["heads_first", "pages_first"])
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=slow)])
def test_jax_quantised_pages_are_what_jax_makes_of_them(order, dtype):
    caches = [_draw(i, 2, 8, 4, 8).astype(dtype) for i in range(2)]
    quantised = [quantization_utils.quantize_to_int8(cache) for cache in caches]
    wide = [x._replace(scales=x.scales.astype(jnp.float32)) for x in quantised]
    floats = [np.asarray(quantization_utils.unquantize_from_int8(x, jnp.float32)) for x in wide]
    assert np.abs(floats[0] - np.asarray(caches[0], np.float32)).max() > 1e-3, "nothing was quantised"
    q, ints = _draw(2, 3, 4, 8), (jnp.array([7, 0, 5]), jnp.array([[5, 2], [-1, -1], [1, 0]]))
    want = page_attention(q, *map(jnp.asarray, floats), *ints, **said)
    if order == "pages_first":
        quantised = [Pair(*(jnp.swapaxes(x, 0, 1) for x in one)) for one in quantised]
    got = jax.jit(functools.partial(page_attention, cache_order=order, **said))(q, *quantised, *ints)
    np.testing.assert_allclose(got, want, rtol=0, atol=CLOSE)


@slow
def test_jax_quantised_pages_of_a_prompt():
    quantised = [quantization_utils.quantize_to_int8(_draw(i, 2, 8, 4, 8)) for i in range(2)]
    floats = [quantization_utils.unquantize_from_int8(x, jnp.float32) for x in quantised]
    got, want = (prefill_page_attention(_draw(2, 3, 4, 8), *caches, [7], [5, 2]) for caches in (quantised, floats))
    np.testing.assert_allclose(got, want, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("dtype", ["int8", pytest.param("float8_e4m3fn", marks=slow)])
def test_pages_of_eight_bits_are_read_and_written_by_their_two_scales(dtype):
    k_scale, v_scale = 0.05, 0.03125
    built = built_for("v3", ENTRIES["v3"].case(RICH))
    args = arrays_of("v3", built)
    cache = jnp.nan_to_num(args[3])
    scales = jnp.where(jnp.arange(cache.shape[2]) % 2, v_scale, k_scale)[None, None, :, None]
    stored = (
        (cache / scales).astype(dtype) if dtype != "int8" else jnp.rint(cache / scales).clip(-127, 127).astype(dtype)
    )
    how = ENTRIES["v3"].arguments(RICH) | {"target": "xla"}
    out, after = ragged_page_attention_v3(*args[:3], stored + 0, *args[4:], k_scale=k_scale, v_scale=v_scale, **how)
    assert after.dtype == stored.dtype
    floats = after.astype(jnp.float32) * scales
    live = [floats, args[4], args[5].reshape(args[4].shape[0], -1), args[6], int(args[7][2]), args[8]]
    np.testing.assert_allclose(out, ragged_page_attention_v2(args[0], *live, **how), rtol=0, atol=CLOSE)
    if dtype == "int8":
        return  # the rest is the same matter, and takes seconds
    # New rows that are quantised already are written as they are.
    rows = [(x / s).astype(dtype) for x, s in ((args[1], k_scale), (args[2], v_scale))]
    again = ragged_page_attention_v3(args[0], *rows, stored + 0, *args[4:], k_scale=k_scale, v_scale=v_scale, **how)
    keys = np.asarray(again[1].astype(jnp.float32))[:, :, 0].reshape(-1, 8)
    first = np.asarray(rows[0].astype(jnp.float32))[0, 0]
    assert first.any() and (keys == first[None]).all(axis=-1).any(), "the first row's key is nowhere in the cache"
