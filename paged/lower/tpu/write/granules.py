"""Granules: which parts of the pages a batch writes.

A *granule* is the part of a page that holds 8 consecutive tokens of all heads. HBM lays arrays out in tiles of 8 rows,
and an asynchronous copy moves whole tiles, so a granule is the least of a page that a kernel can read or write. A page
is a whole number of granules. Per-token scales lie along lanes instead: of these, the granule is the whole page.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from paged.spec import PageLayout

from ...program import Sequences, count_up_to
from ..chips import SUBLANES
from ..pages import Pool
from ..references import Ref

# Tokens of a granule.
GRANULE = SUBLANES


def granules_per_seq(rows: int) -> int:
    """The most granules that ``rows`` consecutive tokens touch."""
    return (rows + GRANULE - 2) // GRANULE + 1


def row_shape(layout: PageLayout, pool: Pool) -> tuple[int, ...]:
    """The shape of one token's part of a page, in which the token axis has length 1."""
    axis = token_axis(layout, pool)
    return tuple(1 if i == axis else n for i, n in enumerate(pool.page_shape))


def token_axis(layout: PageLayout, pool: Pool) -> int:
    """The axis of a page that counts its tokens."""
    if pool.is_scale:
        return 1
    # A page of a pool has no page axis, so the axes after that have moved one to the left.
    return layout.offset_axis - (layout.offset_axis > layout.page_axis)


def granule_shape(layout: PageLayout, pool: Pool) -> tuple[int, ...]:
    """The shape of a granule: 8 tokens of a page, or the whole page of per-token scales."""
    if pool.is_scale:
        return pool.page_shape
    axis = token_axis(layout, pool)
    return tuple(GRANULE if i == axis else n for i, n in enumerate(pool.page_shape))


def granule_at(layout: PageLayout, pool: Pool, ref: Ref, page: Any, offset: Any) -> Ref:
    """The granule of the pool whose first token is at this offset in the page."""
    if pool.is_scale:
        return pool.page(ref, page)
    axis = token_axis(layout, pool)
    tokens: Any = pl.ds(pl.multiple_of(offset, GRANULE), GRANULE)
    return pool.page(ref, page).at[tuple(tokens if i == axis else slice(None) for i in range(axis + 1))]


class GranuleLists(NamedTuple):
    """Granules to write, as flat lists of integers for scalar memory.

    * ``page``: the granule's page, or -1 where there is nothing to write.
    * ``offset``: the offset in the page of the granule's first token.
    """

    page: Int[Array, " granules"]
    offset: Int[Array, " granules"]


class Granules(NamedTuple):
    """Granules of which every token is written. ``row`` is the new row that belongs to the first token of each.

    Only the first ``count`` entries are granules of the batch; the others pad the lists to a static length.
    """

    lists: GranuleLists
    row: Int[Array, " granules"]
    count: Int[Array, ""]

    @classmethod
    def whole(cls, seqs: Sequences, most: int, page_size: int, num_pages: int) -> "Granules":
        """The granules of the batch of which every token is written. There are at most ``most``."""
        first = _round_up(first_position(seqs))
        counts = jnp.where(seqs.counts > 0, jnp.maximum(seqs.lengths - first, 0) // GRANULE, 0)
        ends = jnp.cumsum(counts)
        index = jnp.arange(most, dtype=jnp.int32)
        seq = jnp.minimum(count_up_to(ends, index), ends.shape[0] - 1)
        position = first[seq] + GRANULE * (index - ends[seq] + counts[seq])
        entry = jnp.clip(position // page_size, 0, seqs.tables.shape[1] - 1)
        page = seqs.tables[seq, entry]
        page = jnp.where((index < ends[-1]) & (page >= 0) & (page < num_pages), page, -1)
        row = seqs.starts[seq] + position - seqs.positions[seq]
        return cls(GranuleLists(page, position % page_size), row, jnp.minimum(ends[-1], most).astype(jnp.int32))

    def sliced(self, entries: slice) -> "Granules":
        """A slice of the lists."""
        count = jnp.clip(self.count - entries.start, 0, entries.stop - entries.start)
        return Granules(GranuleLists(*(x[entries] for x in self.lists)), self.row[entries], count)

    def gather(self, rows: Array, axis: int) -> Array:
        """Every granule's new ``rows [tokens, ...]``, whose tokens are axis ``axis`` of a granule.

        Tokens that are not written hold the rows of other tokens.
        """
        row = jnp.clip(self.row[:, None] + jnp.arange(GRANULE)[None], 0, rows.shape[0] - 1)
        return jnp.moveaxis(rows[row], 1, 1 + axis)


def first_position(seqs: Sequences) -> Int[Array, " seqs"]:
    """The first position that is written; ``lengths``, which ends what is written, where none is."""
    return jnp.clip(seqs.positions, 0, seqs.lengths)


def _round_up(position: Array) -> Array:
    return (position + GRANULE - 1) // GRANULE * GRANULE
