"""Writing new rows into the pages, for any batch: two kernels, in place, with many copies on their way.

Rows are written by granules. A granule of which every token is written needs no read: XLA puts its rows into the
pool's order, and the kernel of whole granules copies them. Of any other granule, at most two for each sequence, some
tokens must stay as they are: the kernel of partial granules reads it, changes it and writes it back.
"""

import functools
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from paged.spec import Pages

from ...program import Sequences
from ...xla import XLA_BLOCKS, Places, token_rows, write_scales
from ..chips import Chip
from ..references import call_kernel
from ..transforms import run_kernels
from .granules import GRANULE, GranuleLists, Granules, token_axis
from .kernel import Inputs, Kernel, Outputs, Partial, Scalars, Scratch, Whole
from .plan import Writer


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
    rows, pools = token_rows(k, v, pages), pages.arrays
    if (query_rows or tokens) >= GRANULE:
        in_block = writer.granules_per_block
        most = -(-(tokens // GRANULE) // in_block) * in_block
        granules = Granules.whole(seqs, most, size, pages.num_pages)
        pools = _launch(Whole, writer, granules, rows, pools, chip, interpret)
    granules = Granules.partial(seqs, tokens, size, pages.num_pages)
    pools = _launch(Partial, writer, granules, rows, pools, chip, interpret)
    places = Places.of(seqs, tokens, size, pages.num_pages)
    return Pages(pools, *write_scales(rows[len(pools) :], pages, places), layout=pages.layout)


def _launch(
    kind: type[Kernel],
    writer: Writer,
    granules: Granules,
    rows: tuple[Array, ...],
    pools: tuple[Array, ...],
    chip: Chip,
    interpret: Any,
) -> tuple[Array, ...]:
    """The pools with these granules written: by one kernel, or by several if scalar memory cannot hold the lists."""
    length, most = granules.row.shape[0], writer.most_listed(chip, len(GranuleLists._fields))
    hbm: Any = pltpu.HBM
    for first in range(0, length, most):
        part = granules.sliced(slice(first, min(first + most, length)))
        new = [part.gather(x, token_axis(writer.layout, pool)) for x, pool in zip(rows, writer.pools, strict=False)]
        outputs: Outputs = call_kernel(
            functools.partial(_run, kind, writer),
            name=f"paged_write_{kind.__name__.lower()}",
            chip=chip,
            interpret=interpret,
            grid=(chip.cores,),
            scalars=Scalars(part.lists, kind.bounds_of(writer, part, chip.cores)),
            inputs=Inputs(tuple(new), pools),
            memory=Inputs(hbm, hbm),
            outputs=Outputs(tuple(jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools)),
            scratch=kind.scratch(writer),
            in_place=lambda tree: tree.pools,
        )
        pools = outputs.pools
    return pools


def _run(
    kind: type[Kernel], writer: Writer, scalars: Scalars, inputs: Inputs, outputs: Outputs, scratch: Scratch
) -> None:
    # The pools are read where they are written: a granule that two sequences share is read again after its first turn.
    kind(writer, scalars.lists, scalars.bounds, inputs.new, outputs.pools, scratch).run()
