"""JAX's modes: what a program sets for all of JAX changes no value here, and no dtype.

Every public entry on XLA is in ``STEPS``: a new entry is one row. Rank and dtype promotion are strict in the whole
suite. Kernels are in `tests/tpu/test_modes.py`, meshes in `tests/mesh/test_modes.py`.
"""

import functools
import types
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal, jaxprs_in_params

import paged
from paged.compat import page_attention, prefill_page_attention, ragged_page_attention_v2, ragged_page_attention_v3
from paged.runtime import PagedAttention, PagedCache, PagePool, Rotary, Sampler, generate, sample
from paged.spec import reference_state
from tests.support import real

TABLE = np.array([0.5, -0.25, 0.125, 1.0], np.float32)
SPEC = paged.AttentionSpec(
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    window=5,
    soft_cap=4.0,
    sinks=True,
    mask=paged.Where(lambda p, j: (p - j) % 3 != 2),
    scores=(paged.ALiBi(), paged.Bias(lambda p, j, h: jnp.asarray(TABLE)[h] * real(p - j))),
)
LAYOUT = paged.PageLayout(page_size=2, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
ATTEND = paged.lower(SPEC, LAYOUT, "xla", schedule=paged.XlaSchedule(pages_per_block=2, blocks_per_step=2))
SAMPLERS = (Sampler(), Sampler(temperature=0.8), Sampler(temperature=0.8, top_k=3), Sampler(temperature=0.8, top_p=0.6))


@functools.cache
def arrays_of_a_step():
    """Of one step: a sequence of five tokens with two rows, an empty row, a row of no sequence; and what holds them."""
    _layers()  # their parameters are made before any trace
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    integers = lambda *values: jnp.array(values, jnp.int32)
    lengths, tables, starts = integers(5, 0), integers([4, 1, 3], [0, 2, 5]), integers(0, 2, 3)
    return {
        **{"q": normal(4, 4, 8), "k": normal(4, 2, 8), "v": normal(4, 2, 8), "sinks": normal(4)},
        **{"lengths": lengths, "tables": tables, "starts": starts, "ends": integers(0, 0, 2)},
        **{
            "batch": paged.RaggedBatch(lengths, tables, starts),
            "pages": LAYOUT.wrap(normal(*LAYOUT.array_shapes(6)[0])),
        },
        **{"split": normal(2, 6, 2, 8), "joined": normal(6, 2, 4, 8), "x": normal(4, 6), "logits": normal(3, 9)},
        **{"keys": jax.random.split(jax.random.key(0), 3), "counts": integers(3, 2), "flags": jnp.array([True, False])},
        "pool": PagePool.init(6, num_slots=2, pages_per_seq=3, page_size=2),
    }


@functools.cache
def _layers():
    how = {"target": "xla", "check": False}
    layer, _ = eqx.nn.make_with_state(PagedAttention)(
        SPEC, LAYOUT, 6, 6, rotary=Rotary(8), qk_norm=True, dtype=jnp.float32, key=jax.random.key(1), **how
    )
    return layer, PagedCache(SPEC, LAYOUT, 6, **how)


def _gradients(s):
    """Of an update and of dense attention, with respect to all that has gradients. One row is empty."""

    def loss(q, k, v, arrays, sinks):
        state, pages = ATTEND.update_state(q, k, v, LAYOUT.wrap(*arrays), s.batch, sinks)
        lse = jnp.where(jnp.isneginf(state.lse), 0.0, state.lse)
        dense = paged.dense_attention(SPEC, q[None], k[None], v[None], sinks)
        return sum(jnp.sum(x**2) for x in (state.out, lse, dense, *pages.arrays))

    return jax.grad(loss, argnums=(0, 1, 2, 3, 4))(s.q, s.k, s.v, s.pages.arrays, s.sinks)


def _pool(s):
    pool, extended = s.pool.extend(s.counts)
    pool, reserved = pool.reserve(s.counts + 1)
    batches = pool.ragged_batch(s.counts), pool.decode_batch(s.flags), pool.prefill_batch(s.counts[0] - 3, 2)
    return pool.release(s.flags), extended, reserved, batches, pool.num_free


STEPS = {
    "update": lambda s: ATTEND.update_state(s.q, s.k, s.v, s.pages, s.batch, s.sinks),
    "state": lambda s: ATTEND.state(s.q, s.pages, s.batch, s.sinks),
    "gradients": _gradients,
    "write": lambda s: paged.write(s.k, s.v, s.pages, s.batch, "xla"),
    "reference": lambda s: reference_state(SPEC, s.q, s.pages, s.batch, s.sinks),
    "dense": lambda s: paged.dense_attention(SPEC, s.q[None], s.k[None], s.v[None], s.sinks),
    "merge": lambda s: paged.merge(*[paged.AttentionState(s.q, s.q[..., i]) for i in (0, 1)]),
    "layer": lambda s: _layers()[0].attend_pages(s.x, s.pages, s.batch),
    "layer, dense": lambda s: _layers()[0].dense(s.x[None]),
    "cache": lambda s: _layers()[1].attend_pages(s.q, s.k, s.v, s.pages, s.batch, s.sinks),
    "sample": lambda s: [sample(s.logits, sampler, s.keys) for sampler in SAMPLERS],
    "pool": _pool,
    "page": lambda s: page_attention(s.q[:2], s.split, s.split, s.lengths, s.tables, sliding_window=3, target="xla"),
    "prefill": lambda s: prefill_page_attention(s.q, s.split, s.split, s.lengths[:1], s.tables[0], target="xla"),
    "v2": lambda s: ragged_page_attention_v2(
        s.q, s.joined, s.lengths, s.tables, s.starts, s.ends[2], s.sinks, logits_soft_cap=4.0, target="xla"
    ),
    "v3": lambda s: ragged_page_attention_v3(
        s.q, s.k, s.v, s.joined + 0, s.lengths, s.tables.reshape(-1), s.starts, s.ends, s.sinks, target="xla"
    ),
}


def _run(name, arrays):
    return STEPS[name](types.SimpleNamespace(**arrays))


@functools.cache
def _expected(name):
    """An entry's results in no mode but one: what a compiled step moves between host and device, it says."""
    arrays = arrays_of_a_step()
    with jax.transfer_guard("disallow"):
        found = jax.jit(functools.partial(_run, name))(arrays)
    return jax.device_get(found)


def _assert_equal(found, expected, **tolerance):
    found, expected = (jax.tree_util.tree_leaves_with_path(tree) for tree in (jax.device_get(found), expected))
    for (path, a), (_, b) in zip(found, expected, strict=True):
        assert a.dtype == b.dtype, jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, err_msg=jax.tree_util.keystr(path), **tolerance)


CLOSE: Any = {"rtol": 1e-5, "atol": 1e-5}  # another program of the same float32 arithmetic


@pytest.mark.parametrize("name", STEPS)
def test_a_jitted_step_moves_nothing_between_host_and_device(name):
    _expected(name)


def test_a_step_is_sound_to_jax_and_leaks_no_tracer():
    arrays = arrays_of_a_step()
    with jax.enable_checks(True), jax.checking_leaks():
        for name in STEPS:
            jax.make_jaxpr(functools.partial(_run, name))(arrays)


@pytest.mark.parametrize("name", ["gradients", "write", "merge", "layer, dense", "sample", "pool"])
def test_values_and_dtypes_under_64_bits_are_those_without(name):
    expected, arrays = _expected(name), arrays_of_a_step()
    with jax.enable_x64(True):
        _assert_equal(jax.jit(functools.partial(_run, name))(arrays), expected, **CLOSE)


# What JAX's own functions count with under 64 bits: which page is free, which token is the largest.
COUNTED_BY_JAX = ("pool", "sample")
WIDE = ("int64", "uint64", "float64")


@pytest.mark.parametrize("name", [name for name in STEPS if name not in COUNTED_BY_JAX])
def test_no_array_is_64_bits_wide_under_64_bits(name):
    """Not even inside: on a TPU such arrays are slow, or impossible."""
    arrays = arrays_of_a_step()
    with jax.enable_x64(True):
        left = [jax.make_jaxpr(functools.partial(_run, name))(arrays).jaxpr]
    while left:
        for eqn in left.pop().eqns:
            for v in (*eqn.invars, *eqn.outvars):
                aval: Any = v.aval
                is_strong = not isinstance(v, Literal) and not getattr(aval, "weak_type", True)
                assert not (is_strong and aval.shape and aval.dtype.name in WIDE), eqn
            left += jaxprs_in_params(eqn.params)


def test_no_result_is_nan_where_unused_slots_hold_nan():
    """Neither in an empty row, nor in a row of no sequence, nor in a gradient."""
    s = types.SimpleNamespace(**arrays_of_a_step())
    held = np.zeros((6, 2), bool)
    held[[4, 1], :], held[3, 0] = True, True
    arrays = jnp.where(held[:, None, None, :, None], s.pages.arrays[0], jnp.nan)

    def loss(q, arrays):
        return jnp.sum(ATTEND(q, LAYOUT.wrap(arrays), s.batch, s.sinks) ** 2)

    with jax.debug_nans(True):
        state = ATTEND.state(s.q, LAYOUT.wrap(arrays), s.batch, s.sinks)
        jax.jit(jax.grad(loss, argnums=(0, 1)))(s.q, arrays)
    _assert_equal(state, _expected("state"), **CLOSE)


@pytest.mark.parametrize(
    "name", [*(pytest.param(x, marks=pytest.mark.kernels) for x in ("state", "write", "pool", "sample")), "merge"]
)
def test_operation_by_operation_without_a_nan(name):
    """Without ``jax.jit`` every number in between is looked at, and every loop is one of Python's."""
    expected = _expected(name)
    with jax.disable_jit(), jax.debug_nans(True):
        found = _run(name, arrays_of_a_step())
    _assert_equal(found, expected, **CLOSE)


class Parrot(eqx.Module):
    """The likeliest next token is the token itself."""

    def __call__(self, tokens, batch, state):
        return jax.nn.one_hot(tokens, 10, dtype=jnp.float32), state


@pytest.mark.parametrize(
    "mode",
    [jax.enable_x64, *(pytest.param(x, marks=pytest.mark.kernels) for x in (jax.enable_checks, jax.debug_nans))],
    ids=["x64", "checks", "nans"],
)
def test_generate(mode):
    model, state = eqx.nn.make_with_state(Parrot)()
    with mode(True):
        results = generate(model, state, [[1, 2, 3], [4]], max_new_tokens=2, num_slots=2, num_pages=4, page_size=2)
    assert [result.tokens for result in results] == [(3, 3), (4, 4)]
