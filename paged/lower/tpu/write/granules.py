"""Granules: which parts of the pages a batch writes.

A *granule* is the part of a page that holds 8 consecutive tokens of all heads. HBM lays arrays out in tiles of 8 rows,
and an asynchronous copy moves whole tiles, so a granule is the least of a page that a kernel can read or write. A page
is a whole number of granules. Per-token scales lie along lanes instead: of these, the granule is the whole page.
"""

from typing import Any

from jax.experimental import pallas as pl

from paged.spec import PageLayout

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
