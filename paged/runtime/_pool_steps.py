"""What `generate` does with a pool and a prefix cache between two steps, each compiled once for their shapes."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ._groups import keeps_all
from ._prefix_pools import pools_of_groups
from .grouped_pool import GroupedPool
from .pool import PagePool
from .prefix_cache import PrefixCache

Pool = PagePool | GroupedPool

release = eqx.filter_jit(lambda pool, is_released: pool.release(is_released))
prefill_batch = eqx.filter_jit(lambda pool, slot, rows: pool.prefill_batch(slot, rows))
decode_batch = eqx.filter_jit(lambda pool, is_decoding: pool.decode_batch(is_decoding))
fork = eqx.filter_jit(lambda pool, source: pool.fork(source))
attach = eqx.filter_jit(PrefixCache.attach)
insert = eqx.filter_jit(PrefixCache.insert)
lookup = eqx.filter_jit(lambda cache, tokens, length: cache.lookup(tokens, length).count)


@eqx.filter_jit
def reserve(pool: Pool, tokens: Int[Array, " seqs"]) -> tuple[Pool, Bool[Array, " seqs"], Array]:
    """`reserve`, in groups that keep every page: the others get their pages step by step. And what was free before."""
    free = pool.num_free
    if isinstance(pool, PagePool):
        reserved, ok = pool.reserve(tokens)
        return reserved, ok, free
    keeping = [keeps_all(masks) for masks in pool.masks]
    if not any(keeping):
        return pool, jnp.ones(pool.num_slots, bool), free
    first = keeping.index(True)  # there is one such group
    reserved, ok = pool.pools[first].reserve(tokens)
    return GroupedPool((*pool.pools[:first], reserved, *pool.pools[first + 1 :]), pool.masks), ok, free


@eqx.filter_jit
def extend(pool: Pool, tokens: Int[Array, " seqs"], values: Any) -> tuple[Pool, Bool[Array, " seqs"], Array]:
    """`extend`, after slots have given up the pages that no query of theirs sees any more; and how many they were.

    The steps of all tokens that are counted have been given to the device, so that copied pages are let go.
    """
    settled = pool.settle()
    trimmed = settled.trim(values) if isinstance(settled, GroupedPool) else settled
    entries = [jnp.stack([jnp.sum(own.block_tables >= 0) for own in pools_of_groups(p)]) for p in (settled, trimmed)]
    freed = entries[0] - entries[1]
    extended, ok = trimmed.extend(tokens)
    return extended, ok, freed


@eqx.filter_jit
def make_room(cache: PrefixCache, pool: Pool, wanted: Array) -> tuple[PrefixCache, Pool, Int[Array, " groups"]]:
    """The cache and the pool after pages were given up, until ``wanted`` are free; and how many were given up."""
    settled = pool.settle()
    cache, evicted = cache.evict(settled, wanted)
    return cache, evicted, jnp.atleast_1d(evicted.num_free - settled.num_free)


@eqx.filter_jit
def pages_held(pool: Pool, slot: Array) -> Int[Array, " groups"]:
    """How many pages of each group a slot has."""
    return jnp.stack([jnp.sum(own.block_tables[slot] >= 0, dtype=jnp.int32) for own in pools_of_groups(pool)])


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


def padded(known: Any, capacity: int) -> np.ndarray:
    """Token ids in an array for any sequence."""
    tokens = np.full(capacity, -1, np.int32)
    tokens[: len(known)] = known
    return tokens
