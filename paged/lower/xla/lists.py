"""`XlaLists`: what the XLA lowering computes from a step's sequences alone, once for all layers of one mask."""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..jax_version import vary_alike
from ..program import (
    Program,
    Sequences,
    Visits,
    most_pages_of_any,
    visits_by_scatter,
    visits_by_sort,
    visits_in_place,
)
from .blocks import RowBlock, RowBlocks
from .places import Places
from .schedule import AT_ONCE, XlaSchedule

_FEW_ENTRIES = 2**13  # of all lists of pages: a loop over row blocks takes longer, and more time to compile


class XlaLists(NamedTuple):
    """The row blocks of each phase of a step, with the pages that each visits; and the places of new rows."""

    phases: tuple[RowBlocks, ...]
    places: Places

    def moved(self, first_page: Any) -> Self:
        """The lists for pages that lie ``first_page`` pages further on in the pool."""
        visits = (phase.visits._replace(page=phase.visits.page + first_page) for phase in self.phases)  # pyright: ignore
        phases = tuple(phase._replace(visits=own) for phase, own in zip(self.phases, visits, strict=True))
        return self._replace(phases=phases, places=self.places._replace(page=self.places.page + first_page))


def visits_of(
    program: Program, row_block: RowBlock, seqs: Sequences, page_size: int, num_pages: int, form: str
) -> Visits:
    """The pages that a row block visits."""
    rows, table = row_block.query_rows, seqs.tables[row_block.seq]
    if form != AT_ONCE:
        return visits_by_scatter(program, rows, table, page_size, num_pages)
    room = seqs.tables.shape[1]
    if row_block.own is None and isinstance(room, int):
        room = most_pages_of_any(program, page_size, room, row_block.row.shape[0])
    return visits_in_place(program, rows, table, page_size, num_pages, room)


def with_visits(
    program: Program, row_blocks: RowBlocks, seqs: Sequences, rows: int, schedule: XlaSchedule, *sizes: int
) -> RowBlocks:
    """The row blocks with the pages that each visits; ``sizes`` are the page size and the number of pages.

    In the form ``"at_once"``, and where the lists are short, all are listed side by side. Else as many as there are
    take time, ``row_blocks_at_once`` side by side. Short lists are sorted. A scatter and the running sums that it needs
    take three times as many programs of XLA:CPU, and compiling these takes most of the time.
    """
    room, (page_size, num_pages) = row_blocks.seq.shape[0], sizes

    def of_one(which: Array) -> Visits:
        return visits_of(program, row_blocks.block(seqs, which, rows), seqs, page_size, num_pages, schedule.form)

    width = seqs.tables.shape[1]
    is_short = isinstance(room, int) and isinstance(width, int) and room * width <= _FEW_ENTRIES
    if schedule.form == AT_ONCE:
        return row_blocks._replace(visits=jax.vmap(of_one)(jnp.arange(room, dtype=jnp.int32)))
    if is_short:
        blocks = jax.vmap(lambda which: row_blocks.block(seqs, which, rows))(jnp.arange(room, dtype=jnp.int32))
        query_rows = jax.vmap(lambda block: block.query_rows)(blocks)
        sorts = (program, query_rows, seqs.tables[blocks.seq], page_size, num_pages)
        return row_blocks._replace(visits=visits_by_sort(*sorts, has_maxima=True))
    at_once = schedule.row_blocks_at_once

    def put_some(i: Array, visits: Visits) -> Visits:
        if at_once == 1:
            own = of_one(i)
            return jax.tree.map(lambda all, own: jax.lax.dynamic_update_index_in_dim(all, own, i, 0), visits, own)
        which = i * at_once + jnp.arange(at_once, dtype=jnp.int32)
        some = jax.vmap(of_one)(which)
        return jax.tree.map(lambda all, own: all.at[which].set(own, mode="drop"), visits, some)

    shapes = jax.eval_shape(of_one, row_blocks.count)
    _, start = vary_alike((seqs, row_blocks), jax.tree.map(lambda x: jnp.zeros((room, *x.shape), x.dtype), shapes))
    visits = jax.lax.fori_loop(0, -(-row_blocks.count // at_once), put_some, start)
    return row_blocks._replace(visits=visits)
