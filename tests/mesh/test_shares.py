"""Many devices compute what one device computes, for every way of sharing; and what they exchange for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower import XlaSchedule
from paged.spec import ALiBi, Bias, PerHead, Tree, Value, Where, Window
from tests.support import Case, assert_state_close, assert_states_close, exact_state
from tests.support.specs import PHASES, RICH, not_every_head, table_bias

from .placing import built, collectives, mesh_of, needs_devices, placed, rows_of

pytestmark = needs_devices
# A window, a soft cap and sinks, and two operations that depend on the number of a head among all heads.
SPEC = RICH.replace(scores=(ALiBi(), Bias(table_bias)))
# What a batch brings for sequences and rows, and masks that depend on the number of a head among all heads.
BRINGS = SPEC.replace(
    window=None,
    mask=Tree() & PerHead((Window(Value("window")), Where(not_every_head))),
    scores=(ALiBi(Value("slopes", 4, "float32")), Bias(table_bias)),
)
SCHEDULE = XlaSchedule(pages_per_block=1, rows_per_tile=4)
ALL = {"sequences": 2, "kv_heads": 2, "context": 2}
INT8 = {"dtype": "int8"}

# name: how many devices share what, the phase, and other facts of the case.
STATES = {
    "heads": ({"kv_heads": 2}, "decode", {}),
    "heads, each on two devices": ({"kv_heads": 4}, "ragged", {"order": "interleaved"}),
    "sequences": ({"sequences": 3}, "ragged", {"order": "split", "value_dim": 3}),
    "contexts": ({"context": 8}, "decode", {"order": "split"}),
    "contexts of a prompt": ({"context": 2}, "prefill", {"order": "interleaved", **INT8, "scales": "tensor"}),
    "contexts and heads": ({"context": 4, "kv_heads": 2}, "ragged", {**INT8, "scales": "token"}),
    "heads, what a batch brings": ({"kv_heads": 4}, "decode", {"spec": BRINGS, "has_positions": True}),
    "all, what a batch brings": (ALL, "ragged", {"order": "joined", "spec": BRINGS}),
    "all": (ALL, "ragged", {"order": "joined"}),
    "all, decode": (ALL, "decode", {"dtype": "float8_e4m3fn", "scales": "head"}),
}
UPDATES = {
    "heads, each on two devices": ({"kv_heads": 4}, "decode", {"order": "split"}),
    "all": (ALL, "decode", {**INT8, "scales": "token"}),
    "all, ragged": (ALL, "ragged", {"spec": BRINGS}),
}
SLOW = ("all", "heads, what a batch brings", "sequences", "contexts", "contexts of a prompt", "contexts and heads")


def _rows(table):
    slow = SLOW if table is STATES else ("all, ragged",)
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in table]


def _case(phase, **facts):
    sink_shape = (4, 2) if phase == "ragged" else (4,)  # two sinks of each head, or one
    return Case(**{"spec": SPEC, "phase": phase, "sink_shape": sink_shape, **PHASES[phase], **facts})


def _lowered(case, sizes, **choices):
    mesh, axes = mesh_of(sizes, explicit=choices.pop("explicit", False))
    return paged.lower(case.spec, case.layout, "xla", mesh=mesh, axes=axes, schedule=SCHEDULE, **choices)


def _assert_exchange(attend, text, rows):
    """Devices exchange nothing, or where they share contexts their states in one collective; never keys or values."""
    shares, heads = attend.shares, attend.spec.num_q_heads // attend.shares.kv_heads
    gathered = shares.context * rows * heads * (attend.layout.value_dim + 1)
    assert collectives(text) == ([(gathered, "f32", "all-gather")] if shares.context > 1 else [])


@pytest.mark.parametrize("name", _rows(STATES))
def test_states_equal_the_reference(name):
    """For several corners, empty and padding rows included, with NaN wherever there is no live token."""
    sizes, phase, facts = STATES[name]
    case = _case(phase, **facts)
    attend, shards = _lowered(case, sizes), sizes.get("sequences", 1)
    run = None
    for corner in ("mixed", "more rows than tokens", "few live"):
        builts = built(case.replace(corner=corner), shards)
        q, _, _, *others = placed(attend, builts)
        if run is None:
            run = jax.jit(attend.state).lower(q, *others).compile()
            _assert_exchange(attend, run.as_text(), builts[0].q.shape[0])
        state = run(q, *others)
        for i, one in enumerate(builts):
            assert_state_close(rows_of(state, i, shards), one)


@pytest.mark.parametrize("name", _rows(UPDATES))
def test_updates_write_to_donated_pages_what_one_device_writes(name):
    sizes, phase, facts = UPDATES[name]
    case = _case(phase, **facts)
    attend, shards = _lowered(case, sizes), sizes.get("sequences", 1)
    builts, held = (built(case, shards, hold_new) for hold_new in (False, True))
    q, k, v, pages, batch, sinks = placed(attend, builts)
    run = jax.jit(attend.update_state, donate_argnums=3).lower(q, k, v, pages, batch, sinks).compile()
    _assert_exchange(attend, run.as_text(), builts[0].q.shape[0])
    state, after = run(q, k, v, pages, batch, sinks)
    assert all(array.is_deleted() for array in pages.arrays), "the pages were copied"
    assert after.arrays[0].sharding.is_equivalent_to(attend.shardings.pages.arrays[0], after.arrays[0].ndim)

    written = [dataclasses.replace(b, pages=paged.write(b.k, b.v, b.pages, b.batch)) for b in builts]
    for got, want in zip(jax.tree.leaves(after), jax.tree.leaves(placed(attend, written)[3]), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
    for i, one in enumerate(held if case.scales is None else written):
        # The tolerance follows from the live keys and values, of which only `held` has all.
        assert_states_close(rows_of(state, i, shards), exact_state(one), held[i].error_unit, "float32")


@pytest.mark.parametrize(
    "facts",
    [
        pytest.param({"order": "split"}, id="split"),
        pytest.param({**INT8, "scales": "token"}, id="int8, token", marks=pytest.mark.kernels),
    ],
)
def test_pages_are_copied_from_device_to_device(facts):
    """Devices that share a context: every page that is copied may lie on another device than its copy."""
    case = _case("decode", **facts)
    attend, one = _lowered(case, {"context": 4}), built(case, 1, False)[0]
    q, k, v, pages, batch, sinks = placed(attend, [one])
    tables = np.asarray(batch.block_tables)
    used = tables[np.arange(tables.shape[1])[None] * case.layout.page_size < np.asarray(batch.lengths)[:, None]]
    spare = np.setdiff1d(np.arange(one.pages.num_pages), used)
    copy_from = np.resize(spare, batch.num_slots)
    batch = dataclasses.replace(batch, copy_from=jnp.asarray(copy_from, jnp.int32).at[1].set(-1))
    _, after = jax.jit(attend.update, donate_argnums=3)(q, k, v, pages, batch, sinks)
    written = paged.write(one.k, one.v, one.pages, batch)
    plain = paged.write(one.k, one.v, one.pages, one.batch)
    assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(written.arrays, plain.arrays, strict=True))
    want = placed(attend, [dataclasses.replace(one, pages=written)])[3]
    for got, expected in zip(jax.tree.leaves(after), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(expected, np.float32))


def test_gradients_are_those_of_one_device():
    """Gradients of queries, pages, sinks and a bias's table, through the output and the log-sum-exp."""
    sizes, case = {"kv_heads": 4, "context": 2}, _case("decode")
    one = built(case, 1)[0]
    table = jnp.linspace(-1.0, 1.0, 16).reshape(4, 4)

    def loss(on, q, arrays, batch, sinks, table):
        bias = Bias(lambda p, j, h: table[h, jnp.clip(p - j, 0, 3)])
        attend = paged.lower(case.spec.replace(scores=(bias,)), case.layout, "xla", **dict(on))
        state = attend.state(q, attend.layout.wrap(*arrays), batch, sinks)
        weight = jnp.cos(jnp.arange(state.out.size)).reshape(state.out.shape)
        return jnp.sum(weight * state.out) + jnp.sum(jnp.where(jnp.isneginf(state.lse), 0.0, state.lse))

    gradients = jax.jit(jax.grad(loss, argnums=(1, 2, 4, 5)), static_argnums=0)
    q, _, _, pages, *others = placed(_lowered(case, sizes), [one])
    on = zip(("mesh", "axes"), mesh_of(sizes), strict=True)
    got = gradients(tuple(on), q, pages.arrays, *others, table)
    want = gradients((), one.q, one.pages.arrays, one.batch, one.sinks, table)
    of_copies = np.asarray(got[1][0])[: case.num_pages]  # [pages, keys and values, 2 heads twice, slots, dim]
    of_heads = of_copies.reshape(*of_copies.shape[:2], 2, 2, *of_copies.shape[3:]).sum(axis=3)
    for a, b in ((got[0], want[0]), (of_heads, want[1][0]), (got[2], want[2]), (got[3], want[3])):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_explicit_meshes_and_arrays_that_lie_elsewhere():
    """A mesh with explicit axes, as `jax.make_mesh` makes it; arrays that lie on one device are moved."""
    case = _case("decode")
    attend = _lowered(case, {"context": 2, "kv_heads": 2}, explicit=True)
    one = built(case, 1)[0]
    pages = placed(attend, [one])[3]
    assert_state_close(rows_of(attend.state(one.q, pages, one.batch, one.sinks), 0, 1), one)


def test_pages_are_dealt_to_devices_in_turn():
    mesh, axes = mesh_of({"context": 4})
    attend = paged.lower(SPEC, _case("decode").layout, mesh=mesh, axes=axes)
    ids = np.asarray(attend.deal(jnp.arange(-1, 13), num_pages=12))
    assert ids[0] == -1 and ids[-1] == 12 and sorted(ids[1:-1]) == list(range(12))
    np.testing.assert_array_equal(ids[1:-1] // 3, np.arange(12) % 4)
    with pytest.raises(ValueError, match="num_pages must be a multiple of 4 devices; got 13"):
        attend.deal(jnp.arange(3), num_pages=13)
