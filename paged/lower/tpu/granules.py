"""Granules: the slots of one tile, the smallest piece of a page that a transfer can move."""

from typing import Any

from jax.experimental import pallas as pl

from paged.spec import PageLayout

from .transfer import Pool

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
    return {"packed": 2, "joined": 1, "split": 1, "interleaved": 0}[layout.order]


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
