"""Writing new rows into the pages, for any batch: two kernels, in place, with many copies on their way.

Rows are written by granules. A granule of which every token is written needs no read: the kernel of whole granules
puts its rows into the pool's order. Of any other granule, at most two for each sequence, some tokens must stay as they
are: the kernel of partial granules reads it, changes it and writes it back.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from paged.spec import Pages

from ...program import Sequences
from ...transforms import run_kernels
from ...xla import XLA_BLOCKS, stored_rows, write_scales
from ...xla import Places as XlaPlaces
from ..chips import Chip
from ..references import Ref, call_kernel
from . import partial, whole
from .granules import GRANULE
from .plan import Writer
from .slots import Places, Slots, first_position


class Inputs(NamedTuple):
    """``new`` are new rows, see `Writer.as_they_lie`; ``pools`` are the arrays of the pages."""

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
    launch, new, pools = functools.partial(_launch, chip, interpret), writer.as_they_lie(k, v), pages.arrays
    for part, places in _parts(writer, chip, seqs, tokens, pages.num_pages):
        slots = Slots.of(part)
        if (query_rows or tokens) >= GRANULE:
            run = functools.partial(_run, whole.Whole, writer, places, chip.cores)
            pools = launch(run, "whole", slots, new, pools, whole.Whole.scratch_of(writer))
        run = functools.partial(_run, partial.Partial, writer, places, chip.cores)
        pools = launch(run, "partial", slots, new, pools, partial.Partial.scratch_of(writer, places.slots))
    places = XlaPlaces.of(seqs, tokens, size, pages.num_pages)
    return Pages(pools, *write_scales(scales, pages, places), layout=pages.layout)


def _parts(
    writer: Writer, chip: Chip, seqs: Sequences, tokens: int, num_pages: int
) -> Iterator[tuple[Sequences, Places]]:
    """The sequences, and where their positions lie; in several parts if scalar memory cannot hold all block tables.

    Where it cannot, XLA takes from each table the entries that rows may be written to.
    """
    size, (slots, width) = writer.layout.page_size, seqs.tables.shape
    is_window = writer.most_slots(chip, width) < slots
    if is_window:
        width = min(width, (tokens + size - 2) // size + 1)
        entry = first_position(seqs)[:, None] // size + jnp.arange(width, dtype=jnp.int32)[None]
        entry = jnp.minimum(entry, seqs.tables.shape[1] - 1)
        seqs = seqs._replace(tables=jnp.take_along_axis(seqs.tables, entry, axis=1), planned=None)
    most = max(1, writer.most_slots(chip, width))
    for first in range(0, slots, most):
        count = min(most, slots - first)
        part: Sequences = jax.tree.map(lambda x, at=slice(first, first + count): x[at], seqs._replace(planned=None))
        yield part, Places(count, width, size, num_pages, is_window)


def _run(
    kernel: Any,
    writer: Writer,
    places: Places,
    cores: int,
    scalars: Slots,
    inputs: Inputs,
    outputs: Outputs,
    scratch: Any,
) -> None:
    # The pools are read where they are written: a granule that two sequences share is read after it is written.
    kernel(writer, places, scalars, inputs.new, outputs.pools, scratch).run(pl.program_id(0), cores)


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
