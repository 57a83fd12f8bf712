"""Counts of the pages of a pool, and of a prefix cache beside it."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from ._prefix_pools import pools_of_groups
from .grouped_pool import GroupedPool
from .pool import PagePool
from .prefix_cache import PrefixCache

Pool = PagePool | GroupedPool


@eqx.filter_jit
def counts_of(pool: Pool, cache: PrefixCache | None) -> tuple[Array, Array, Array]:
    """For each group: the pages that slots hold, those that several of them hold, and those that only the cache has."""
    held, shared, cached = [], [], []
    for group, own in enumerate(pools_of_groups(pool)):
        tables = own.block_tables.reshape(-1)
        by_slots = jnp.zeros_like(own.ref_counts).at[jnp.where(tables >= 0, tables, own.num_pages)].add(1, mode="drop")
        shared.append(jnp.sum(by_slots > 1, dtype=jnp.int32))
        pages = jnp.full(1, -1, jnp.int32) if cache is None else cache.pages[group]
        only = (pages >= 0) & (own.ref_counts[pages] == 1)
        cached.append(jnp.sum(only, dtype=jnp.int32))
        held.append(own.pages_in_use - cached[-1])
    return jnp.stack(held), jnp.stack(shared), jnp.stack(cached)
