"""A batch of no sequences and a step of no rows: results of no rows, on every target and by every way in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.compat import page_attention, prefill_page_attention, ragged_page_attention_v2, ragged_page_attention_v3
from paged.spec import PAGE_ORDERS, AttentionSpec, PageLayout, RaggedBatch, reference_state

from .mesh.placing import mesh_of, needs_devices

SPEC = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=128, sinks=True)
FACTS = {"page_size": 8, "num_kv_heads": 2, "head_dim": 128, "dtype": jnp.float32}
SINKS, TABLE = jnp.ones(4), np.zeros((0, 3), np.int32)

# Batches, and how many query rows a step has: rows of no sequence are padding.
BATCHES = {
    "decode of no sequence": (RaggedBatch.decode([], TABLE), 0),
    "no sequence": (RaggedBatch([], TABLE, [0]), 0),
    "no sequence, padding rows": (RaggedBatch([], TABLE, [0]), 3),
    "no rows": (RaggedBatch([5, 0], [[0, 1], [2, -1]], [0, 0, 0]), 0),
    "a prompt's chunk of no rows": (RaggedBatch.prefill(5, [0, 1], 0), 0),
}
every_batch = pytest.mark.parametrize("name", BATCHES)


def _pages(**facts):
    layout = PageLayout(**{**FACTS, **facts})
    arrays = [jnp.full(shape, jnp.nan, layout.dtype) for shape in layout.array_shapes(4)]
    return layout.wrap(*arrays)


def _step(tokens):
    return (jnp.ones((tokens, heads, 128)) for heads in (4, 2, 2))


def _assert_empty(state, tokens):
    assert state.out.shape == (tokens, 4, 128) and state.lse.shape == (tokens, 4)
    assert not np.asarray(state.out).any() and np.isneginf(state.lse).all()


def _assert_kept(pages, before):
    assert pages.layout == before.layout
    for array, old in zip(pages.arrays, before.arrays, strict=True):
        np.testing.assert_array_equal(np.asarray(array).view(np.uint32), np.asarray(old).view(np.uint32))


@every_batch
@pytest.mark.parametrize("target", ["xla", "tpu"])
def test_a_lowering_gives_no_rows_and_keeps_the_pages(target, name):
    batch, tokens = BATCHES[name]
    pages, (q, k, v) = _pages(), _step(tokens)
    how = {"interpret": True} if target == "tpu" else {}
    attend = paged.lower(SPEC, pages.layout, target, check=True, **how)
    _assert_empty(attend.state(q, pages, batch, SINKS), tokens)
    out, updated = attend.update(q, k, v, pages, batch, SINKS)
    assert out.shape == q.shape and not np.asarray(out).any()
    _assert_kept(updated, pages)
    _assert_kept(paged.write(k, v, pages, batch, target, **how), pages)
    gradient = jax.grad(lambda q: attend(q, pages, batch, SINKS).sum())(q)
    assert gradient.shape == q.shape and not np.asarray(gradient).any()
    assert str(attend.explain(q, pages, batch))


@every_batch
def test_the_reference_gives_no_rows(name):
    batch, tokens = BATCHES[name]
    q, _, _ = _step(tokens)
    _assert_empty(reference_state(SPEC, q, _pages(), batch, SINKS), tokens)


@pytest.mark.parametrize("order", PAGE_ORDERS)
def test_no_rows_are_written_in_any_order(order):
    pages, (_, k, v) = _pages(order=order), _step(0)
    _assert_kept(paged.write(k, v, pages, RaggedBatch([5], [[0]], [0, 0])), pages)
    assert [rows.shape[0] for rows in pages.layout.stack(k, v)] == [0] * len(pages.arrays)


@pytest.mark.parametrize(("batch", "tokens", "length"), [(0, 3, 3), (2, 0, 3), (2, 0, 0), (2, 3, 0)])
def test_dense_attention_of_no_rows_or_of_no_keys(batch, tokens, length):
    q, kv = jnp.ones((batch, tokens, 4, 128)), jnp.ones((batch, length, 2, 128))
    out = jax.jit(paged.dense_attention, static_argnums=0)(SPEC, q, kv, kv, SINKS)
    assert out.shape == q.shape and not np.asarray(out).any()


@needs_devices
@pytest.mark.parametrize("field", ["kv_heads", "context", "sequences"])
def test_devices_give_no_rows(field):
    mesh, axes = mesh_of({field: 2})
    attend = paged.lower(SPEC, _pages().layout, "xla", mesh=mesh, axes=axes)
    batch = RaggedBatch([5], [[0]], [0, 0])
    batch = RaggedBatch.stack([batch, batch]) if field == "sequences" else batch
    pages, (q, k, v) = _pages(), _step(0)
    _assert_empty(attend.state(q, pages, batch, SINKS), 0)
    out, updated = attend.update(q, k, v, pages, batch, SINKS)
    assert out.shape == q.shape
    _assert_kept(updated, pages)


@pytest.mark.parametrize("target", ["xla", "tpu"])
def test_entry_points_give_no_rows(target):
    how = {"target": target, **({"interpret": True} if target == "tpu" else {})}
    q, kv = jnp.ones((0, 4, 128)), jnp.ones((0, 2, 128))
    (split_k, split_v), pairs = _pages(order="split").arrays, _pages(order="interleaved").arrays[0]
    split = {**how, "cache_order": "heads_first"}  # as many pages as query heads
    assert page_attention(q, split_k, split_v, [], TABLE, **split).shape == q.shape
    assert page_attention(q[:, None], split_k, split_v, [], TABLE, num_splits=1, **split).shape == (0, 1, 4, 128)
    assert prefill_page_attention(q, split_k, split_v, [5], [0, 1], **split).shape == q.shape
    blocks = {"num_kv_pages_per_block": 16, "num_queries_per_block": 16}
    for lengths, table, starts, live in (([], TABLE, [0], 0), ([5, 0], [[0, 1], [2, 3]], [0, 0, 0], 2)):
        assert ragged_page_attention_v2(q, pairs, lengths, table, starts, live, SINKS, **how).shape == q.shape
        assert ragged_page_attention_v2(q, pairs, lengths, table, starts, live, **blocks, **how).shape == q.shape
        flat, ends = np.reshape(table, -1).astype(np.int32), [0, 0, live]
        out, kept = ragged_page_attention_v3(q, kv, kv, jnp.array(pairs), lengths, flat, starts, ends, SINKS, **how)
        assert out.shape == q.shape
        np.testing.assert_array_equal(np.asarray(kept).view(np.uint32), np.asarray(pairs).view(np.uint32))
