"""Pools, batches and queries to time: pages in a random physical order, and as many as the batch needs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paged import AttentionSpec, PageLayout, Pages, RaggedBatch

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
_FEW_PAGES = 64


class Inputs(NamedTuple):
    """What an attention is called with, and the KV tokens that its sequences hold."""

    q: jax.Array
    pages: Pages
    batch: RaggedBatch
    tokens: int


def spec(window: int | None = None) -> AttentionSpec:
    """Causal attention of 32 query heads over 8 KV heads of 128."""
    return AttentionSpec(num_q_heads=Q_HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, window=window)


def layout(dtype: Any, page_size: int, order: Any = "packed") -> PageLayout:
    """The benchmark's pages; int8 pages have per-head scales."""
    scales = "head" if jnp.dtype(dtype) == jnp.int8 else None
    return PageLayout(
        page_size=page_size, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=dtype, order=order, scales=scales
    )


def pool(layout: PageLayout, num_pages: int) -> Pages:
    """A pool without a zero in it: 64 random pages, again and again."""
    rng = np.random.default_rng(0)
    arrays = []
    for shape in layout.array_shapes(_FEW_PAGES):
        few = rng.standard_normal(shape, np.float32) * (40 if layout.is_quantised else 1)
        few = jnp.asarray(np.clip(few, -127, 127)).astype(layout.dtype)
        arrays.append(_repeat(few, num_pages, layout.page_axis))
    k_scale, v_scale = (jnp.full(KV_HEADS, 0.025) if layout.is_quantised else None for _ in range(2))
    return layout.wrap(*arrays, k_scale=k_scale, v_scale=v_scale)


def decode_inputs(layout: PageLayout, lengths: np.ndarray, slots: int | None = None) -> Inputs:
    """One query row for each of ``lengths``, in the first of ``slots`` slots."""
    slots = slots or len(lengths)
    tables, num_pages = _tables(lengths, layout.page_size, slots)
    lengths_of_slots = np.zeros(slots, np.int32)
    lengths_of_slots[: len(lengths)] = lengths
    batch = RaggedBatch.decode(jnp.asarray(lengths_of_slots), jnp.asarray(tables), len(lengths))
    return Inputs(_queries(slots, layout), pool(layout, num_pages), batch, int(lengths.sum()))


def prefill_inputs(layout: PageLayout, length: int, chunk: int) -> Inputs:
    """One sequence's last ``chunk`` of ``length`` tokens."""
    tables, num_pages = _tables(np.array([length]), layout.page_size, 1)
    batch = RaggedBatch.prefill(jnp.asarray(length, jnp.int32), jnp.asarray(tables[0]), chunk)
    return Inputs(_queries(chunk, layout), pool(layout, num_pages), batch, length)


def even(batch: int, context: int) -> np.ndarray:
    """The same length for every sequence."""
    return np.full(batch, context, np.int32)


def uneven(batch: int, context: int) -> np.ndarray:
    """Lengths spread evenly from a sixteenth of the context up to all of it, in random order."""
    lengths = np.linspace(context / 16, context, batch).astype(np.int32)
    return np.random.default_rng(0).permutation(lengths)


def dense(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """The sequences' keys and values without pages, [seqs, kv_heads, length, head_dim], for packed pages."""
    table = np.maximum(np.asarray(inputs.batch.block_tables), 0)
    tiles = jnp.moveaxis(inputs.pages.arrays[0][table], 3, 1)  # [seqs, heads, pages, 2, page_size, dim]
    k, v = (tiles[:, :, :, which] for which in (0, 1))
    shape = (table.shape[0], KV_HEADS, -1, HEAD_DIM)
    return k.reshape(shape), v.reshape(shape)


def _queries(rows: int, layout: PageLayout) -> jax.Array:
    dtype = jnp.float32 if layout.is_quantised else layout.dtype
    return jax.random.normal(jax.random.key(1), (rows, Q_HEADS, HEAD_DIM)).astype(dtype)


def _tables(lengths: np.ndarray, page_size: int, slots: int) -> tuple[np.ndarray, int]:
    counts = -(-lengths // page_size)
    ids = np.random.default_rng(0).permutation(int(counts.sum())).astype(np.int32)
    tables = np.full((slots, int(counts.max())), -1, np.int32)
    for row, part in enumerate(np.split(ids, np.cumsum(counts)[:-1])):
        tables[row, : len(part)] = part
    return tables, len(ids)


def _repeat(few: jax.Array, count: int, axis: int) -> jax.Array:
    return jax.jit(lambda few: jnp.take(few, jnp.arange(count) % few.shape[axis], axis=axis))(few)
