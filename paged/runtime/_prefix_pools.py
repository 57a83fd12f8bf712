"""The pools that a `PrefixCache` lies beside: one for each group of layers, or one for all."""

import functools
from typing import Any

import numpy as np
from jaxtyping import Bool

from paged.spec import Mask, values_of

from ._kept import kept_pages
from .pool import PagePool


def pools_of_groups(pool: PagePool) -> tuple[PagePool, ...]:
    """The pool of each group."""
    return (pool,)


def with_pools_of_groups(pool: PagePool, pools: Any) -> PagePool:
    """``pool`` with other pools of its groups."""
    del pool
    return pools[0]


def masks_of(pool: PagePool) -> tuple[Mask | None, ...]:
    """For each group the mask that says which pages are needed; None where all are."""
    del pool
    return (None,)


def require_no_values(masks: tuple[Mask | None, ...]) -> None:
    """Raise ``ValueError`` where a mask names numbers of a request."""
    for mask in masks:
        names = [] if mask is None else [value.name for value in values_of(mask)]
        if names:
            raise ValueError(
                f"The mask {mask} names the numbers {names} of a request: equal tokens have other keys and values for "
                "other numbers, so that a PrefixCache cannot share their pages."
            )


@functools.lru_cache(maxsize=64)
def kept_at(mask: Mask | None, page_size: int, entries: int) -> Bool[np.ndarray, "positions entries"] | None:
    """The pages that a mask shows to tokens from each page's beginning on, also past the last; None for all."""
    if mask is None:
        return None
    positions = np.arange(entries + 1, dtype=np.int32) * page_size
    return np.asarray(kept_pages(mask, positions, page_size, entries))
