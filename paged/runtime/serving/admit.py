"""Which requests get a slot, which give theirs up, and how many rows each has in a step."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .._pool_arrays import entries_held
from .._pool_requests import asked_of, reserve_asked
from .._prefix_pools import pools_of_groups, with_pools_of_groups
from ..grouped_pool import GroupedPool
from .requests import Status
from .reuse import attach, keeping_groups, make_free
from .state import Queue

_LEAST, _MOST = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max


class _Turn(NamedTuple):
    """What one turn of `schedule` gives the next one.

    * ``rows``: of the step, for which there are pages once ``is_ready``.
    * ``held``: for each group, how many table entries each slot uses: to be found once in a step.
    * ``admits``: whether another request may be admitted.
    """

    queue: Queue
    rows: Int[Array, " slots"]
    held: tuple[Int[Array, " slots"], ...]
    admits: Bool[Array, ""]
    is_ready: Bool[Array, ""]


def schedule(queue: Queue, budget: int) -> tuple[Queue, Int[Array, " slots"]]:
    """Give free slots to waiting requests, plan the rows of a step, and get pages for them.

    Requests of larger priorities are admitted first, then those that arrived earlier. Each gets pages for the tokens
    that it has. The first that does not fit ends the admission: no later one may overtake it, or it would wait forever.

    Then the rows of the step are planned and counted in the pool. Pages that only the prefix cache holds are given up
    first. While pages lack, the newest sequences give up their slots, and the rows are planned again: such a request
    waits, with the tokens that it has drawn. The steps of all tokens that are counted have run, so that shared pages
    which they have copied are let go, and so are pages that no query sees any more.

    **Arguments:**

    - `queue`: before the step.
    - `budget`: the most rows of a step.

    **Returns:** the queue, whose pool counts the rows; and how many rows each slot has.
    """
    yes = jnp.ones((), bool)
    # Admission and preemption are turns of one loop, so that XLA compiles what both do once.
    held = tuple(own.entries for own in pools_of_groups(queue.pool))
    first = _Turn(queue, jnp.zeros_like(queue.request), held, yes, ~yes)
    last = jax.lax.while_loop(lambda turn: ~turn.is_ready, lambda turn: _turn(turn, budget), first)
    copied = jnp.sum(jnp.where(last.rows > 0, _copies(last.queue.pool), 0), dtype=jnp.int32)
    return last.queue.replace(counts=last.queue.counts.plus(copied_pages=copied)), last.rows


def _turn(turn: _Turn, budget: int) -> _Turn:
    """Admit a request, or get the pages of the step, or preempt the newest sequence."""
    queue = turn.queue
    row, slot = _first_waiting(queue), jnp.argmin(queue.is_running).astype(jnp.int32)
    number = jnp.arange(queue.request.shape[0], dtype=jnp.int32)
    may = turn.admits & jnp.any(~queue.is_running) & jnp.any(queue.is_waiting)
    queue, waits = attach(queue, may, slot, row)
    admits = may & ~waits
    queue = _settled(queue, ~admits)  # not before: others may share pages that a slot is about to give up
    is_slot = (number == slot) & may
    rows = jax.lax.cond(admits, lambda: jnp.zeros_like(number), lambda: plan_rows(queue, budget))
    held = tuple(
        jnp.where(is_slot, entries_held(own.block_tables[slot][None]), old)
        for own, old in zip(pools_of_groups(queue.pool), turn.held, strict=True)
    )
    queue, held, fits = _with_pages(queue, rows, is_slot & admits, queue.requests.known[row], held)
    # One slot changes: that which is filled, or that of the newest sequence, which gives it up.
    newest = jnp.argmax(jnp.where(queue.is_running, queue.admission, -1)).astype(jnp.int32)
    begins, ends = admits & fits, ~admits & ~fits
    changed = jnp.where(admits, row, queue.request[newest])
    is_changed = (jnp.arange(queue.requests.status.shape[0], dtype=jnp.int32) == changed) & (begins | ends)
    status = jnp.where(begins, jnp.int32(Status.RUNNING), jnp.int32(Status.WAITING))
    status = jnp.where(is_changed, status, queue.requests.status)
    more = queue.requests.preemptions + (is_changed & ends).astype(jnp.int32)
    is_emptied = (is_slot & ~begins) | ((number == newest) & ends)
    lengths = queue.pool.lengths
    counts = queue.counts.plus(admitted=begins, preempted=ends, reused_tokens=jnp.where(begins, lengths[slot], 0))
    queue = queue.replace(
        requests=dataclasses.replace(queue.requests, status=status, preemptions=more),
        request=jnp.where(is_slot & begins, row, jnp.where(is_emptied, -1, queue.request)),
        admission=jnp.where(is_slot & begins, queue.counts.admitted, queue.admission),
        counts=counts,
    )
    pool = queue.pool.release(is_emptied)
    is_ready = ~admits & fits
    queue = queue.replace(pool=pool).with_lengths(jnp.where(is_ready, pool.lengths + rows, pool.lengths))
    return _Turn(queue, rows, tuple(jnp.where(is_emptied, 0, own) for own in held), begins, is_ready)


def _with_pages(
    queue: Queue,
    rows: Int[Array, " slots"],
    is_new: Bool[Array, " slots"],
    known: Int[Array, ""],
    held: Sequence[Array],
) -> tuple[Queue, tuple[Array, ...], Bool[Array, ""]]:
    """The queue with pages for rows of slots, or for the known tokens of a new one; and whether there are enough.

    ``held`` are the table entries in use, before and after.
    """
    lengths = queue.pool.lengths
    more = jnp.where(is_new, known - lengths, rows)
    # Of a new sequence, groups that free pages get theirs step by step.
    wanted = [jnp.where(keep | ~is_new, more, 0) for keep in keeping_groups(queue)]
    tokens = [jnp.where(own > 0, lengths + own, 0) for own in wanted]
    asked = lambda queue: [asked_of(*of) for of in zip(pools_of_groups(queue.pool), tokens, held, strict=True)]
    queue = make_free(queue, jnp.stack([jnp.sum(own.extra, dtype=jnp.int32) for own in asked(queue)]), more)
    own = asked(queue)  # once more: a page that the cache has given up may be shared no longer
    pools, ok = reserve_asked(pools_of_groups(queue.pool), own)
    held = [jnp.where(ok, each.needed, old) for each, old in zip(own, held, strict=True)]
    return queue.replace(pool=with_pools_of_groups(queue.pool, pools)), tuple(held), jnp.all(ok)


def _first_waiting(queue: Queue) -> Int[Array, ""]:
    requests, waits = queue.requests, queue.is_waiting
    priority = jnp.where(waits, requests.priority, _LEAST)
    is_first = waits & (priority == jnp.max(priority))
    return jnp.argmin(jnp.where(is_first, requests.arrival, _MOST)).astype(jnp.int32)


def plan_rows(queue: Queue, budget: int) -> Int[Array, " slots"]:
    """How many rows each slot has in the next step, at most ``budget`` in all.

    A sequence that lacks one token has one row. What is left of the budget goes to those that lack more, in the order
    of their admission: to one sequence at most as many as a step always has room for, ``budget - slots``. A prompt of a
    model whose masks see ahead ends a step only where it may be cut.
    """
    lacking = jnp.where(queue.is_running, queue.of_slots.known - queue.pool.lengths, 0)
    is_decoding = lacking == 1
    wanted = jnp.where(is_decoding, 0, jnp.minimum(lacking, max(budget - lacking.shape[0], 1)))
    order = jnp.argsort(queue.admission).astype(jnp.int32)
    left = budget - jnp.sum(is_decoding, dtype=jnp.int32)
    cuts = queue.of_slots.cuts
    if cuts is not None:
        return is_decoding.astype(jnp.int32) + _up_to_cuts(cuts, queue.pool.lengths, wanted, order, left)
    before = jnp.zeros_like(wanted).at[order].set(jnp.cumsum(wanted[order], dtype=jnp.int32) - wanted[order])
    return is_decoding.astype(jnp.int32) + jnp.clip(left - before, 0, wanted)


def _up_to_cuts(cuts: Array, lengths: Array, wanted: Array, order: Array, left: Array) -> Int[Array, " slots"]:
    """What the slots get of the rows that are left, in order, each up to the last place where it may be cut."""

    def one(left: Array, slot: Array) -> tuple[Array, Array]:
        end = cuts[slot, lengths[slot] + jnp.minimum(wanted[slot], left)]
        rows = jnp.maximum(end - lengths[slot], 0)
        return left - rows, rows

    return jnp.zeros_like(wanted).at[order].set(jax.lax.scan(one, left, order)[1])


def _copies(pool: Any) -> Array:
    """For each slot how many pages its next step copies, of all groups."""
    return jnp.sum(jnp.stack([own.copy_from >= 0 for own in pools_of_groups(pool)]), axis=0, dtype=jnp.int32)


def _settled(queue: Queue, may: Bool[Array, ""]) -> Queue:
    """The queue without the pages that steps have copied, or that masks hide from every later query of their slot."""
    entries = lambda pool: sum(jnp.sum(own.block_tables >= 0, dtype=jnp.int32) for own in pool.pools)

    def settled(_: Any, carry: tuple) -> tuple:
        pool, counts = carry
        pool = pool.settle()
        if not isinstance(pool, GroupedPool):
            return pool, counts
        trimmed = pool.trim(queue.of_slots.values or None)
        return trimmed, counts.plus(freed_pages=entries(pool) - entries(trimmed))

    pool, counts = jax.lax.fori_loop(0, may.astype(jnp.int32), settled, (queue.pool, queue.counts))
    return queue.replace(pool=pool, counts=counts)
