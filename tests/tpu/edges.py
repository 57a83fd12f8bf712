"""Helpers for the tests of edges of both TPU lowerings: faults of the caller, long lists, updates and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import paged
from paged.lower.tpu import CHIPS
from paged.spec import AttentionState, RaggedBatch
from tests.support import assert_bitwise, assert_state_close, exact_state

from .interpreter import interpreted, params, state_of, watched


def with_batch(built, **changes):
    """Built arrays with some values of the batch changed. The exact state is the reference's for the changed values."""
    batch = built.batch
    values = {name: changes.get(name, getattr(batch, name)) for name in ("lengths", "block_tables", "query_starts")}
    new = RaggedBatch(**values, num_seqs=changes.get("num_seqs", batch.num_seqs), query_rows=batch.query_rows)
    return dataclasses.replace(built, batch=new)


def with_scalar_memory(case, smem_bytes, schedule):
    """The case's attention on a chip whose scalar memory holds only short lists of pages."""
    attend = interpreted(case, schedule)
    chip = dataclasses.replace(CHIPS["v4"], smem_bytes=int(smem_bytes))
    lowerings = tuple(dataclasses.replace(low, chip=chip, interpret=params("on_wait")) for low in attend.lowerings)
    return dataclasses.replace(attend, lowerings=lowerings)


def items_of_launches(monkeypatch, launch):
    """A list of numbers of items, one for each kernel that is traced from now on."""
    items, call = [], launch.__call__

    def counted(self, work, *args):
        items.append(work.begin.shape[0])
        return call(self, work, *args)

    monkeypatch.setattr(launch, "__call__", counted)
    return items


def assert_nothing_is_seen(state, rows=slice(None)):
    """Assert that these rows hold the empty state."""
    assert not np.asarray(state.out)[rows].any() and np.isneginf(np.asarray(state.lse)[rows]).all()


def assert_num_seqs_is_clamped(attend, built, num_seqs):
    """A traced ``num_seqs`` above the number of slots means all slots, and one below 0 means none."""
    got = state_of(attend, with_batch(built, num_seqs=jnp.int32(num_seqs)))
    if num_seqs > 0:
        assert_bitwise(got, state_of(attend, built))
    else:
        assert_nothing_is_seen(got)


def assert_close_to(got, want):
    """Assert that two float32 results are equal within `TOLERANCES`: 1.5 x 20 roundings of values up to 10."""
    np.testing.assert_array_equal(np.isneginf(got.lse), np.isneginf(want.lse))
    seen = ~np.isneginf(np.asarray(want.lse))
    np.testing.assert_allclose(got.out, want.out, rtol=0, atol=4e-5)
    np.testing.assert_allclose(np.asarray(got.lse)[seen], np.asarray(want.lse)[seen], rtol=0, atol=4e-5)
    assert not np.asarray(got.out)[~seen].any()


def assert_update_drops_rows_past_the_table(attend, built):
    """`update` writes what the XLA write does, and then sees what the reference sees; the state, with what is held."""
    held = dataclasses.replace(built, pages=paged.write(built.k, built.v, built.pages, built.batch, "xla"))
    out, pages = watched(attend.update, built.q, built.k, built.v, built.pages, built.batch)
    assert_bitwise(pages.arrays, held.pages.arrays)
    state = state_of(attend, held)
    assert_bitwise(out, state.out)
    assert_close_to(state, exact_state(held))
    return state


def assert_update_is_write_then_attend(attend, built, held):
    """Two builds of a case: the new tokens' places in the pages hold NaN in ``built``, and the tokens in ``held``."""
    out, pages = watched(attend.update, built.q, built.k, built.v, built.pages, built.batch)
    assert_bitwise(pages.arrays, paged.write(built.k, built.v, built.pages, built.batch).arrays)
    assert_state_close(AttentionState(out, jnp.asarray(exact_state(held).lse)), held)


def assert_gradients_are_those_of_xla(attend, built):
    """Gradients of queries and pages, through the output and the log-sum-exp."""
    rng = np.random.default_rng(5)
    seen = np.array([row is not None and len(row) > 0 for row in built.visible])[:, None]
    weights = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (built.q.shape, built.q.shape[:2])]

    def gradients(attend):
        def loss(q, arrays):
            state = attend.state(q, built.pages.layout.wrap(*arrays), built.batch)
            lse = jnp.where(seen, state.lse, 0.0)
            return jnp.sum(state.out * weights[0]) + jnp.sum(lse * weights[1])

        return jax.jit(jax.grad(loss, argnums=(0, 1)))

    got = watched(gradients(attend), built.q, built.pages.arrays)
    want = gradients(paged.lower(built.case.spec, built.case.layout, "xla"))(built.q, built.pages.arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        assert np.abs(np.asarray(a)).max() > 0.1
