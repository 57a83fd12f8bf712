"""The pools that a `PrefixCache` lies beside: one for each group of layers, or one for all."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from paged.spec import Mask, values_of

from ._groups import keeps_all, mask_of
from ._kept import kept_pages
from ._pool_arrays import counted, set_row
from .grouped_pool import GroupedPool
from .pool import PagePool


def pools_of_groups(pool: PagePool | GroupedPool) -> tuple[PagePool, ...]:
    """The pool of each group."""
    return pool.pools if isinstance(pool, GroupedPool) else (pool,)


def with_pools_of_groups(pool: PagePool | GroupedPool, pools: Any) -> Any:
    """``pool`` with other pools of its groups."""
    return GroupedPool(pools, pool.masks) if isinstance(pool, GroupedPool) else pools[0]


def with_slot(
    pool: PagePool | GroupedPool, slot: Int[Array, ""], rows: Sequence[Int[Array, " pages_per_seq"]], length: Array
) -> Any:
    """``pool`` with the pages that others hold in an empty slot, those of each group; unchanged for slot -1.

    What `PagePool.attach` does for all slots.
    """
    new, at = [], jnp.maximum(slot, 0)
    is_slot = jnp.arange(pool.num_slots, dtype=jnp.int32) == slot
    for own, row in zip(pools_of_groups(pool), rows, strict=True):
        changes = {
            "ref_counts": counted(own.ref_counts, jnp.where(slot >= 0, row, -1), 1),
            "block_tables": set_row(own.block_tables, at, jnp.where(slot >= 0, row, own.block_tables[at])),
            "lengths": jnp.where(is_slot, length, own.lengths),
        }
        new.append(dataclasses.replace(own, **changes))
    return with_pools_of_groups(pool, new)


def masks_of(pool: PagePool | GroupedPool) -> tuple[Mask | None, ...]:
    """For each group the mask that says which pages are needed; None where all are."""
    if not isinstance(pool, GroupedPool):
        return (None,)
    return tuple(None if keeps_all(masks) else mask_of(masks) for masks in pool.masks)


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
