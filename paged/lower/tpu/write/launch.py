"""Writing new rows into the pages, for any batch: two kernels, in place, with many copies on their way.

Rows are written by granules. A granule of which every token is written needs no read: XLA puts its rows into the
pool's order, and the kernel of whole granules copies them. Of any other granule, at most two for each sequence, some
tokens must stay as they are: the kernel of partial granules reads it, changes it and writes it back.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from paged.spec import Pages

from ...program import Sequences
from ...transforms import run_kernels
from ...xla import XLA_BLOCKS, Places, stored_rows, write_scales
from ..chips import Chip
from ..references import Ref, call_kernel
from . import partial, whole
from .granules import GRANULE, GranuleLists, Granules, first_position, token_axis
from .plan import Writer


class Inputs(NamedTuple):
    """``new`` are new rows, in the form that the kernel reads; ``pools`` are the arrays of the pages."""

    new: tuple[Ref, ...]
    pools: tuple[Ref, ...]


class Outputs(NamedTuple):
    """The arrays of the pages, which are written in place."""

    pools: tuple[Ref, ...]


def write_rows(
    chip: Chip, interpret: Any, query_rows: int | None, k: Array, v: Array, pages: Pages, seqs: Sequences
) -> Pages:
    """The pages with each row's key and value at its position, in place where the pages are donated.

    Dropped are rows of no sequence, rows past the table, and rows whose page is a hole. If two rows have the same place
    in the pages, which is a fault of the caller, one of them is written. The gradient is that of the XLA write.
    """
    run = functools.partial(_write, chip, interpret, query_rows)
    like = functools.partial(_like, query_rows)
    return run_kernels(run, like, k, v, pages, seqs, is_interpreted=bool(interpret))


def _like(query_rows: int | None, k: Array, v: Array, pages: Pages, seqs: Sequences) -> Pages:
    return XLA_BLOCKS.write(k, v, pages, seqs, query_rows)


def _write(
    chip: Chip, interpret: Any, query_rows: int | None, k: Array, v: Array, pages: Pages, seqs: Sequences
) -> Pages:
    writer, tokens, size = Writer(pages.layout), k.shape[0], pages.layout.page_size
    (k, v), scales = stored_rows(k, v, pages)
    launch, pools = functools.partial(_launch, chip, interpret), pages.arrays
    if (query_rows or tokens) >= GRANULE:
        in_block = writer.granules_per_block
        most = -(-(tokens // GRANULE) // in_block) * in_block
        granules = Granules.whole(seqs, most, size, pages.num_pages)
        pools = _write_whole(writer, chip, launch, granules, pages.layout.stack(k, v), pools)
    new = (k, v) if len(writer.parts) == 2 else pages.layout.stack(k, v)
    pools = _write_partial(writer, chip, launch, seqs, pages.num_pages, new, pools)
    places = Places.of(seqs, tokens, size, pages.num_pages)
    return Pages(pools, *write_scales(scales, pages, places), layout=pages.layout)


def _write_whole(
    writer: Writer, chip: Chip, launch: Any, granules: Granules, rows: tuple[Array, ...], pools: tuple[Array, ...]
) -> tuple[Array, ...]:
    """The pools with these granules written: by one kernel, or by several if scalar memory cannot hold the lists."""

    def run(scalars: whole.Scalars, inputs: Inputs, outputs: Outputs, scratch: whole.Scratch) -> None:
        whole.Whole(writer, scalars, inputs.new, outputs.pools, scratch).run()

    length, most = granules.row.shape[0], writer.most_listed(chip, len(GranuleLists._fields))
    for first in range(0, length, most):
        part = granules.sliced(slice(first, min(first + most, length)))
        new = [part.gather(x, token_axis(writer.layout, pool)) for x, pool in zip(rows, writer.pools, strict=True)]
        scalars = whole.Scalars.of(writer, part, chip.cores)
        pools = launch(run, "whole", scalars, tuple(new), pools, whole.Whole.scratch(writer))
    return pools


def _write_partial(
    writer: Writer,
    chip: Chip,
    launch: Any,
    seqs: Sequences,
    num_pages: int,
    new: tuple[Array, ...],
    pools: tuple[Array, ...],
) -> tuple[Array, ...]:
    """The pools with the other granules written: by one kernel, or by several if scalar memory cannot hold the tables.

    Where it cannot hold all block tables, XLA takes from each the entries that rows may be written to.
    """
    slots, width = seqs.tables.shape
    is_window = writer.most_slots(chip, width) < slots
    if is_window:
        size = writer.layout.page_size
        width = min(width, (new[0].shape[0] + size - 2) // size + 1)
        entry = first_position(seqs)[:, None] // size + jnp.arange(width, dtype=jnp.int32)[None]
        entry = jnp.minimum(entry, seqs.tables.shape[1] - 1)
        seqs = seqs._replace(tables=jnp.take_along_axis(seqs.tables, entry, axis=1), planned=None)
    most = max(1, writer.most_slots(chip, width))
    for first in range(0, slots, most):
        count = min(most, slots - first)
        part: Sequences = jax.tree.map(lambda x, at=slice(first, first + count): x[at], seqs._replace(planned=None))

        def run(scalars: Any, inputs: Inputs, outputs: Outputs, scratch: Any, count: int = count) -> None:
            # The pools are read where they are written: a granule that two sequences share is read after it is written.
            static = writer, count, width, num_pages, is_window
            partial.Partial(*static, scalars, inputs.new, outputs.pools, scratch).run(pl.program_id(0), chip.cores)

        scratch = partial.Partial.scratch_of(writer, count)
        pools = launch(run, "partial", partial.Slots.of(part), new, pools, scratch)
    return pools


def _launch(
    chip: Chip,
    interpret: Any,
    run: Any,
    name: str,
    scalars: Any,
    new: tuple[Array, ...],
    pools: tuple[Array, ...],
    scratch: Any,
) -> tuple[Array, ...]:
    """The pools after one kernel, which writes them in place."""
    hbm: Any = pltpu.HBM
    outputs: Outputs = call_kernel(
        run,
        name=f"paged_write_{name}",
        chip=chip,
        interpret=interpret,
        grid=(chip.cores,),
        scalars=scalars,
        inputs=Inputs(new, pools),
        memory=Inputs(hbm, hbm),
        outputs=Outputs(tuple(jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools)),
        scratch=scratch,
        in_place=lambda tree: tree.pools,
    )
    return outputs.pools
