"""What `PagePool.reserve`, `extend` and `release` do, for one pool or for several of the same slots."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ._arguments import Counts, slot_counts
from ._one_program import one_program
from ._pool_arrays import counted, given_up, handed_out, served_in_order

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


def asked_of(pool: Pool, tokens: Int[Array, " seqs"], held: Int[Array, " seqs"]) -> Asked:
    """What each slot needs to have room for so many tokens, where its table has so many entries in use."""
    fits = (tokens >= 0) & (tokens <= pool.capacity)
    needed = jnp.maximum(-(-jnp.where(fits, tokens, 0) // pool.page_size), held)
    entry = (pool.lengths // pool.page_size)[:, None]  # in which the slot goes on to write
    page = jnp.take_along_axis(pool.block_tables, jnp.minimum(entry, pool.pages_per_seq - 1), axis=1)[:, 0]
    page = jnp.where(entry[:, 0] < pool.pages_per_seq, page, -1)
    is_shared = fits & (tokens > pool.lengths) & (page >= 0) & (pool.ref_counts[page] > 1)
    return Asked(fits, held, needed, page, is_shared)


def given_to(pool: Pool, asked: Asked, ok: Array, first: Array) -> Pool:
    """The pool after ``ok`` slots have got what they need: free pages from number ``first[s]`` of those on."""
    is_shared = asked.is_shared & ok
    # In order of a slot's entries: its own page in place of a shared one, then those that it lacks.
    own = jnp.where(is_shared, pool.lengths // pool.page_size, -1)
    counts, tables = handed_out(
        pool.ref_counts, pool.block_tables, first, own, asked.held, jnp.where(ok, asked.extra, 0)
    )
    # The shared page has a holder as before: the copy in place of the table.
    counts = counted(counts, jnp.where(is_shared, pool.copy_from, -1), -1)
    copy_from = jnp.where(is_shared, asked.page, pool.copy_from)
    copy_at = jnp.where(is_shared, pool.lengths, pool.copy_at)
    return dataclasses.replace(pool, ref_counts=counts, block_tables=tables, copy_from=copy_from, copy_at=copy_at)


def reserve_in_all(pools: Sequence[Pool], tokens: Counts) -> tuple[tuple[Pool, ...], Bool[Array, " seqs"]]:
    """`PagePool.reserve` in several pools of the same slots: a slot gets its pages in all of them, or in none."""
    return _reserved(tuple(pools), slot_counts("tokens", tokens, pools[0].num_slots))


@one_program
def _reserved(pools: tuple[Pool, ...], tokens: Int[Array, " seqs"]) -> tuple[tuple[Pool, ...], Bool[Array, " seqs"]]:
    return reserve_asked(pools, [asked_of(pool, tokens, pool.entries) for pool in pools])


def reserve_asked(pools: Sequence[Pool], asked: Sequence[Asked]) -> tuple[tuple[Pool, ...], Bool[Array, " seqs"]]:
    """`reserve_in_all` of what slots need in each pool, which may be for other tokens in every one."""
    extra = jnp.stack([own.extra for own in asked], axis=1)
    fits = functools.reduce(jnp.logical_and, [own.fits for own in asked])
    ok, first = served_in_order(extra, fits, jnp.stack([pool.num_free for pool in pools]))
    pairs = enumerate(zip(pools, asked, strict=True))
    return tuple(given_to(pool, own, ok, first[:, i]) for i, (pool, own) in pairs), ok


@one_program
def release_in_all(pools: Sequence[Pool], is_released: Bool[Array, " seqs"]) -> tuple[Pool, ...]:
    """`PagePool.release` in several pools of the same slots."""
    held = tuple((pool.ref_counts, pool.block_tables) for pool in pools)
    all_of_them, copies = (is_released[:, None],) * len(pools), tuple(pool.copy_from for pool in pools)
    after, without = [], lambda x, none: jnp.where(is_released, none, x)
    for pool, (counts, tables) in zip(pools, given_up(held, is_released, all_of_them, copies), strict=True):
        changes = {"copy_from": without(pool.copy_from, -1), "copy_at": without(pool.copy_at, -1)}
        changes |= {"ref_counts": counts, "block_tables": tables, "lengths": without(pool.lengths, 0)}
        after.append(dataclasses.replace(pool, **changes))
    return tuple(after)


def extend_in_all(pools: Sequence[Pool], tokens: Counts) -> tuple[tuple[Pool, ...], Bool[Array, " seqs"]]:
    """`PagePool.extend` in several pools of the same slots and lengths, as `reserve_in_all`."""
    return _extended(tuple(pools), slot_counts("tokens", tokens, pools[0].num_slots))


@one_program
def _extended(pools: tuple[Pool, ...], tokens: Int[Array, " seqs"]) -> tuple[tuple[Pool, ...], Bool[Array, " seqs"]]:
    lengths = pools[0].lengths
    # Compared before the addition, which could overflow; -1 is what reserve refuses.
    fits = (tokens >= 0) & (tokens <= pools[0].capacity - lengths)
    total = jnp.where(fits, lengths + tokens, -1)
    pools, ok = _reserved(pools, total)
    return tuple(dataclasses.replace(pool, lengths=jnp.where(ok, total, lengths)) for pool in pools), ok
