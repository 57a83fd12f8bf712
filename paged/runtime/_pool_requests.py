"""What `PagePool.reserve` and `extend` do, for one pool or for several of the same slots."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ._arguments import Counts, slot_counts
from ._pool_arrays import counted, free_pages, served_in_order, taken

Pool = Any  # a `PagePool`, whose module imports this one


class Asked(NamedTuple):
    """What slots need for a number of tokens.

    * ``fits``: whether their tables can hold it.
    * ``held``, ``needed``: table entries in use, and those that are needed.
    * ``page``, ``is_shared``: the page in which each slot goes on to write, and whether it needs one of its own there.
    """

    fits: Bool[Array, " seqs"]
    held: Int[Array, " seqs"]
    needed: Int[Array, " seqs"]
    page: Int[Array, " seqs"]
    is_shared: Bool[Array, " seqs"]

    @property
    def extra_own(self) -> Int[Array, " seqs"]:
        """How many pages a slot needs in place of a shared one."""
        return self.is_shared.astype(jnp.int32)

    @property
    def extra(self) -> Int[Array, " seqs"]:
        """How many pages a slot needs besides those that it has."""
        return self.needed - self.held + self.extra_own


def asked_of(pool: Pool, tokens: Int[Array, " seqs"]) -> Asked:
    """What each slot needs to have room for so many tokens."""
    fits = (tokens >= 0) & (tokens <= pool.capacity)
    held, entry = pool.entries, jnp.arange(pool.pages_per_seq, dtype=jnp.int32)[None]
    needed = jnp.maximum(-(-jnp.where(fits, tokens, 0) // pool.page_size), held)
    begins = (pool.lengths // pool.page_size)[:, None] == entry  # the entry in which the slot goes on to write
    page = jnp.max(jnp.where(begins, pool.block_tables, -1), axis=1)
    is_shared = fits & (tokens > pool.lengths) & (page >= 0) & (pool.ref_counts[page] > 1)
    return Asked(fits, held, needed, page, is_shared)


def given_to(pool: Pool, asked: Asked, ok: Array, first: Array, used: Array) -> Pool:
    """The pool after ``ok`` slots have got what they need: free pages from number ``first[s]`` of those on."""
    held, is_shared = asked.held, asked.is_shared & ok
    entry = jnp.arange(pool.pages_per_seq, dtype=jnp.int32)[None]
    # In order of a slot's entries: its own page in place of a shared one, then those that it lacks.
    is_own = is_shared[:, None] & ((pool.lengths // pool.page_size)[:, None] == entry)
    is_new = ok[:, None] & (entry >= held[:, None]) & (entry < asked.needed[:, None])
    number = first[:, None] + jnp.where(is_own, 0, entry - held[:, None] + asked.extra_own[:, None])
    free = free_pages(pool.ref_counts)
    tables = jnp.where(is_own | is_new, free[jnp.clip(number, 0, pool.num_pages - 1)], pool.block_tables)
    # The shared page has a holder as before: the copy in place of the table.
    counts = counted(taken(pool.ref_counts, used), jnp.where(is_shared, pool.copy_from, -1), -1)
    copy_from = jnp.where(is_shared, asked.page, pool.copy_from)
    copy_at = jnp.where(is_shared, pool.lengths, pool.copy_at)
    return dataclasses.replace(pool, ref_counts=counts, block_tables=tables, copy_from=copy_from, copy_at=copy_at)


def reserve_in_all(pools: Sequence[Pool], tokens: Counts) -> tuple[tuple[Pool, ...], Bool[Array, " seqs"]]:
    """`PagePool.reserve` in several pools of the same slots: a slot gets its pages in all of them, or in none."""
    return reserve_in_each(pools, [slot_counts("tokens", tokens, pools[0].num_slots)] * len(pools))


def reserve_in_each(
    pools: Sequence[Pool], tokens: Sequence[Int[Array, " seqs"]]
) -> tuple[tuple[Pool, ...], Bool[Array, " seqs"]]:
    """`reserve_in_all` for other tokens in every pool."""
    asked = [asked_of(pool, own) for pool, own in zip(pools, tokens, strict=True)]
    extra = jnp.stack([own.extra for own in asked], axis=1)
    fits = functools.reduce(jnp.logical_and, [own.fits for own in asked])
    ok, first, used = served_in_order(extra, fits, jnp.stack([pool.num_free for pool in pools]))
    given = [
        given_to(pool, own, ok, first[:, i], used[i]) for i, (pool, own) in enumerate(zip(pools, asked, strict=True))
    ]
    return tuple(given), ok


def extend_in_all(pools: Sequence[Pool], tokens: Counts) -> tuple[tuple[Pool, ...], Bool[Array, " seqs"]]:
    """`PagePool.extend` in several pools of the same slots and lengths, as `reserve_in_all`."""
    lengths = pools[0].lengths
    tokens = slot_counts("tokens", tokens, pools[0].num_slots)
    # Compared before the addition, which could overflow; -1 is what reserve refuses.
    fits = (tokens >= 0) & (tokens <= pools[0].capacity - lengths)
    total = jnp.where(fits, lengths + tokens, -1)
    pools, ok = reserve_in_all(pools, total)
    return tuple(dataclasses.replace(pool, lengths=jnp.where(ok, total, lengths)) for pool in pools), ok
