"""Granules: the slots of one tile, the least of a page that a transfer can move; and which of them a batch writes."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

from paged.spec import PageLayout

from ...program import Sequences
from ..pages import Pool

Ref = Any
GRANULE = 8


def granules_per_seq(rows: int) -> int:
    """The most granules that ``rows`` consecutive tokens touch."""
    return (rows + GRANULE - 2) // GRANULE + 1


def row_shape(layout: PageLayout, pool: Pool) -> tuple[int, ...]:
    """One token's part of a page, with its axis kept."""
    axis = token_axis(layout, pool)
    return tuple(1 if i == axis else n for i, n in enumerate(pool.page_shape))


def token_axis(layout: PageLayout, pool: Pool) -> int:
    """The axis of a page that counts its slots."""
    if pool.is_scale:
        return 1
    # A page of a pool has no page axis, so the axes after that have moved one to the left.
    return layout.offset_axis - (layout.offset_axis > layout.page_axis)


def granule_shape(layout: PageLayout, pool: Pool) -> tuple[int, ...]:
    """A granule of a page; scales lie along lanes, and are moved as a whole page."""
    if pool.is_scale:
        return pool.page_shape
    axis = token_axis(layout, pool)
    return tuple(GRANULE if i == axis else n for i, n in enumerate(pool.page_shape))


def granule_at(layout: PageLayout, pool: Pool, ref: Ref, page: Any, slot: Any) -> Ref:
    """The granule of the pool that begins at a page's slot."""
    if pool.is_scale:
        return pool.page(ref, page)
    axis = token_axis(layout, pool)
    slots: Any = pl.ds(pl.multiple_of(slot, GRANULE), GRANULE)
    return pool.page(ref, page).at[tuple(slots if i == axis else slice(None) for i in range(axis + 1))]


class Lists(NamedTuple):
    """Granules to write, flat, for scalar memory.

    ``page`` is -1 where there is nothing to write, ``slot`` the granule's first; its slots from ``begin`` up to ``end``
    are written. ``turn`` counts the granules before this one in the list that are the same piece of memory, and is -1
    where there is nothing to write.
    """

    page: Int[Array, " granules"]
    slot: Int[Array, " granules"]
    begin: Int[Array, " granules"]
    end: Int[Array, " granules"]
    turn: Int[Array, " granules"]


class Granules(NamedTuple):
    """Granules to write, the row for the first slot of each, and how many there are: what follows only pads the
    lists."""

    lists: Lists
    row: Int[Array, " granules"]
    count: Int[Array, ""]

    @classmethod
    def whole(cls, seqs: Sequences, most: int, page_size: int, num_pages: int) -> "Granules":
        """Those of which every slot is written, of which there are at most ``most``."""
        first = _round_up(_first_position(seqs))
        counts = jnp.where(seqs.counts > 0, jnp.maximum(seqs.lengths - first, 0) // GRANULE, 0)
        ends = jnp.cumsum(counts)
        index = jnp.arange(most, dtype=jnp.int32)
        seq = _searchsorted(ends, index)
        position = first[seq] + GRANULE * (index - ends[seq] + counts[seq])
        slots = jnp.zeros_like(seq), jnp.full_like(seq, GRANULE)
        return cls._of(seqs, seq, position, slots, index < ends[-1], page_size, num_pages)

    @classmethod
    def partial(cls, seqs: Sequences, tokens: int, page_size: int, num_pages: int) -> "Granules":
        """The others, which are the first and the last of a sequence."""
        first, length = _first_position(seqs), seqs.lengths
        last = length // GRANULE * GRANULE
        has_head = (first % GRANULE > 0) & (first < length)
        has_tail = (length > last) & (seqs.counts > 0) & (last >= first)
        head_end = jnp.minimum(length - first // GRANULE * GRANULE, GRANULE)
        exists, position, begin, end = (
            jnp.stack(x, axis=1).reshape(-1)
            for x in (
                (has_head, has_tail),
                (first // GRANULE * GRANULE, last),
                (first % GRANULE, jnp.zeros_like(first)),
                (head_end, length - last),
            )
        )
        ends = jnp.cumsum(exists, dtype=jnp.int32)
        index = jnp.arange(min(tokens, exists.shape[0]), dtype=jnp.int32)
        which = _searchsorted(ends, index)
        slots = begin[which], end[which]
        own = cls._of(seqs, which // 2, position[which], slots, index < ends[-1], page_size, num_pages)
        return own._replace(lists=own.lists._replace(turn=_turns(own.lists.page, own.lists.slot)))

    @classmethod
    def _of(
        cls,
        seqs: Sequences,
        seq: Int[Array, " granules"],
        position: Int[Array, " granules"],
        slots: tuple[Array, Array],
        is_real: Bool[Array, " granules"],
        page_size: int,
        num_pages: int,
    ) -> "Granules":
        entry = jnp.clip(position // page_size, 0, seqs.tables.shape[1] - 1)
        page = seqs.tables[seq, entry]
        page = jnp.where(is_real & (page >= 0) & (page < num_pages), page, -1)
        row = seqs.starts[seq] + position - (seqs.lengths - seqs.counts)[seq]
        count = jnp.sum(is_real, dtype=jnp.int32)
        return cls(Lists(page, position % page_size, *slots, turn=jnp.where(page < 0, -1, 0)), row, count)

    def part(self, some: slice) -> "Granules":
        """A part of the list."""
        count = jnp.clip(self.count - some.start, 0, some.stop - some.start)
        return Granules(Lists(*(x[some] for x in self.lists)), self.row[some], count)

    def gather(self, rows: Array, axis: int) -> Array:
        """Every granule's ``rows [tokens, ...]``, its slots at ``axis`` of a granule; anything in slots not written."""
        row = jnp.clip(self.row[:, None] + jnp.arange(GRANULE), 0, rows.shape[0] - 1)
        return jnp.moveaxis(rows[row], 1, 1 + axis)


def _first_position(seqs: Sequences) -> Int[Array, " seqs"]:
    return jnp.maximum(seqs.lengths - seqs.counts, 0)


def _round_up(position: Array) -> Array:
    return (position + GRANULE - 1) // GRANULE * GRANULE


def _searchsorted(ends: Array, index: Array) -> Array:
    """Whose interval an index is in; anybody's if it is past the last. By comparison with all: one pass, no gathers."""
    found = jnp.searchsorted(ends, index, side="right", method="compare_all")
    return jnp.minimum(found, ends.shape[0] - 1).astype(jnp.int32)


def _turns(page: Int[Array, " granules"], slot: Int[Array, " granules"]) -> Int[Array, " granules"]:
    """For each granule, how many before it are the same. By comparison of all pairs: a TPU sorts slowly."""
    index = jnp.arange(page.shape[0])
    same = (page[:, None] == page) & (slot[:, None] == slot) & (index[:, None] > index)
    return jnp.where(page < 0, -1, jnp.sum(same, axis=1, dtype=jnp.int32))
