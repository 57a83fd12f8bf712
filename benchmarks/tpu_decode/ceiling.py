"""The ceiling: a kernel that makes the transfers that attention needs, and does nothing else.

A page, keys and values of all heads, is one contiguous transfer, so that its order within is of no matter here and a
page is ``[rows, 128]``. Transfers go in blocks, several blocks ahead of the one that is waited for, on across
sequences; so the time is that of the transfers and not of issuing them. Queries come in by one transfer, and each
sequence's output leaves as soon as its last page is there. On a chip whose two cores are one device, each takes half
of the pages.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks.tpu import Call
from benchmarks.tpu.shape import ITEM_BYTES

from .shapes import Shape

_LANES = 128
_BLOCK_BYTES, _MAX_BLOCK_PAGES, _DEPTH = 512 << 10, 16, 8


def ceiling(shape: Shape, cores: int) -> Call:
    """The kernel's call and its arguments: integers concrete, arrays as shapes."""
    pages = shape.visible_pages()
    table = np.zeros(shape.num_seqs * shape.pages_per_seq, np.int32)  # as large as the one that attention reads
    flat = np.concatenate(pages)
    table[: len(flat)] = flat
    ends = np.cumsum([len(part) for part in pages]).astype(np.int32)
    page_bounds = np.linspace(0, len(flat), cores + 1).astype(np.int32)
    seq_bounds = np.searchsorted(ends, page_bounds, side="right").astype(np.int32)
    bounds = np.concatenate([page_bounds, seq_bounds])
    row_bytes = _LANES * ITEM_BYTES
    q = jax.ShapeDtypeStruct((shape.num_seqs, shape.q_heads * shape.head_dim // _LANES, _LANES), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((shape.pool_pages, shape.page_bytes // row_bytes, _LANES), jnp.bfloat16)
    block = max(1, min(_MAX_BLOCK_PAGES, _BLOCK_BYTES // shape.page_bytes))
    return functools.partial(_call, block=block, cores=cores), (table, ends, bounds, q, kv), ()


def _call(table: Any, ends: Any, bounds: Any, q: jax.Array, kv: jax.Array, *, block: int, cores: int) -> jax.Array:
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    q, kv = (pltpu.with_memory_space_constraint(array, pltpu.HBM) for array in (q, kv))
    return pl.pallas_call(
        functools.partial(_kernel, cores=cores),
        out_shape=pltpu.HBM(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores,),
            in_specs=[hbm, hbm],
            out_specs=hbm,
            scratch_shapes=[
                pltpu.VMEM(q.shape, q.dtype),
                pltpu.VMEM((_DEPTH, block, *kv.shape[1:]), kv.dtype),
                pltpu.SemaphoreType.DMA((_DEPTH,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), disable_bounds_checks=True),
        name="ceiling",
    )(table, ends, bounds, q, kv)


def _kernel(
    table: Any, ends: Any, bounds: Any, q: Any, kv: Any, out: Any, row: Any, buffer: Any, sems: Any, io: Any, *, cores
) -> None:
    core = pl.program_id(0)
    first, last = bounds[core], bounds[core + 1]
    first_seq, last_seq = bounds[cores + 1 + core], bounds[cores + 2 + core]
    block = buffer.shape[1]
    full, rest = lax.div(last - first, block), lax.rem(last - first, block)

    def start_page(i: Any, slot: Any, place: Any) -> None:
        pltpu.make_async_copy(kv.at[table[first + i]], buffer.at[slot, place], sems.at[slot]).start()

    def start(k: Any) -> None:
        slot = lax.rem(k, _DEPTH)

        @pl.when(k < full)
        def _() -> None:
            for place in range(block):
                start_page(k * block + place, slot, place)

        @pl.when(k == full)
        def _() -> None:
            lax.fori_loop(0, rest, lambda place, _: start_page(k * block + place, slot, place), None)

    def wait(k: Any) -> None:
        slot = lax.rem(k, _DEPTH)

        @pl.when(k < full)
        def _() -> None:
            _wait(buffer.at[slot], sems.at[slot])

        @pl.when(k == full)
        def _() -> None:
            lax.fori_loop(0, rest, lambda place, _: _wait(buffer.at[slot, place], sems.at[slot]), None)

    def leave(seq: Any) -> Any:
        pltpu.make_async_copy(row.at[seq], out.at[seq], io.at[1]).start()
        return seq + 1

    def step(k: Any, seq: Any) -> Any:
        start(k + _DEPTH - 1)
        wait(k)
        arrived = jnp.minimum(first + (k + 1) * block, last)
        is_complete = lambda s: (s < last_seq) & (ends[jnp.minimum(s, ends.shape[0] - 1)] <= arrived)
        return lax.while_loop(is_complete, leave, seq)

    num_rows = -(-q.shape[0] // cores)  # a core's share of the sequences, as near as a static size comes
    rows = pl.ds(jnp.minimum(first_seq, q.shape[0] - num_rows), num_rows)
    pltpu.make_async_copy(q.at[rows], row.at[rows], io.at[0]).start()
    lax.fori_loop(0, _DEPTH - 1, lambda k, _: start(k), None)
    _wait(row.at[rows], io.at[0])
    lax.fori_loop(0, full + 1, step, first_seq)
    lax.fori_loop(first_seq, last_seq, lambda seq, _: _wait(row.at[seq], io.at[1]), None)


def _wait(place: Any, sem: Any) -> None:
    """Wait for a transfer of this size to have arrived."""
    pltpu.make_async_copy(place, place, sem).wait()
