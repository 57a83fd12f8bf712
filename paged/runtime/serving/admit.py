"""Which requests get a slot, which give theirs up, and how many rows each has in a step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .._pool_steps import reserve
from ..grouped_pool import GroupedPool
from .requests import Status
from .reuse import attach, keep, keeping_groups, make_free, waits_for_pages
from .state import Queue

_LEAST, _MOST = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max


def admit(queue: Queue) -> Queue:
    """Give free slots to waiting requests: larger priorities first, then earlier arrivals.

    Each gets pages for the tokens that it has. The first that does not fit ends the admission: no later one may
    overtake it, or it would wait forever.
    """

    def may(carry: tuple[Queue, Array]) -> Array:
        queue, fits = carry
        return fits & jnp.any(~queue.is_running) & jnp.any(queue.is_waiting)

    def one(carry: tuple[Queue, Array]) -> tuple[Queue, Array]:
        queue, _ = carry
        row, slot = _first_waiting(queue), jnp.argmin(queue.is_running).astype(jnp.int32)
        no = lambda queue: (queue, jnp.zeros((), bool))
        return jax.lax.cond(waits_for_pages(queue, row), no, lambda queue: _begin(queue, slot, row), queue)

    return jax.lax.while_loop(may, one, (queue, jnp.ones((), bool)))[0]


def _begin(queue: Queue, slot: Int[Array, ""], row: Int[Array, ""]) -> tuple[Queue, Array]:
    """Give a request a slot, with what the cache has of its tokens and pages for the others; and whether it fits."""
    requests, is_slot = queue.requests, jnp.arange(queue.request.shape[0]) == slot
    found = attach(queue, slot, row)
    # What it lacks, and one more: of a page that it shares in part it needs a copy. Groups that free pages get theirs
    # step by step.
    size, known = queue.pool.page_size, requests.known[row]
    lacking = 1 + -(-known // size) - found.pool.lengths[slot] // size
    found = make_free(found, jnp.where(keeping_groups(found), lacking, 0))
    pool, ok, _ = reserve(found.pool, jnp.where(is_slot, known, 0))
    fits = ok[slot]
    status = requests.status.at[jnp.where(fits, row, requests.status.shape[0])].set(Status.RUNNING, mode="drop")
    begun = found.replace(
        requests=dataclasses.replace(requests, status=status),
        pool=pool.release(is_slot & ~fits),
        request=jnp.where(is_slot & fits, row, queue.request),
        admission=jnp.where(is_slot & fits, queue.counts.admitted, queue.admission),
        counts=found.counts.plus(admitted=fits, reused_tokens=jnp.where(fits, found.pool.lengths[slot], 0)),
    )
    return begun, fits


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
    order = jnp.argsort(queue.admission)
    left = budget - jnp.sum(is_decoding, dtype=jnp.int32)
    cuts = queue.of_slots.cuts
    if cuts is not None:
        return is_decoding.astype(jnp.int32) + _up_to_cuts(cuts, queue.pool.lengths, wanted, order, left)
    before = jnp.zeros_like(wanted).at[order].set(jnp.cumsum(wanted[order]) - wanted[order])
    return is_decoding.astype(jnp.int32) + jnp.clip(left - before, 0, wanted)


def _up_to_cuts(cuts: Array, lengths: Array, wanted: Array, order: Array, left: Array) -> Int[Array, " slots"]:
    """What the slots get of the rows that are left, in order, each up to the last place where it may be cut."""

    def one(left: Array, slot: Array) -> tuple[Array, Array]:
        end = cuts[slot, lengths[slot] + jnp.minimum(wanted[slot], left)]
        rows = jnp.maximum(end - lengths[slot], 0)
        return left - rows, rows

    return jnp.zeros_like(wanted).at[order].set(jax.lax.scan(one, left, order)[1])


def make_room(queue: Queue, rows: Int[Array, " slots"]) -> tuple[Queue, Int[Array, " slots"]]:
    """Count the step's rows in the pool. The newest sequences give up their slots until there are pages.

    Pages that only the prefix cache holds are given up first. The steps of all tokens that are counted have run, so
    that shared pages which they have copied are let go, and so are pages that no query sees any more.

    **Returns:** the queue, and the rows of the slots that are left. A preempted request waits again, with the tokens
    that it has drawn.
    """

    def extended(queue: Queue, rows: Array) -> tuple:
        pool, ok = queue.pool.extend(rows)
        return pool, jnp.all(ok)

    def preempt(carry: tuple) -> tuple:
        queue, rows, *_ = carry
        newest = jnp.argmax(jnp.where(queue.is_running, queue.admission, -1))
        is_newest = jnp.arange(rows.shape[0]) == newest
        queue = keep(queue, is_newest, is_newest)
        queue = queue.with_column(is_newest, preemptions=queue.of_slots.preemptions + 1)
        queue = queue.without(is_newest & queue.is_running, Status.WAITING)
        queue, rows = queue.replace(counts=queue.counts.plus(preempted=1)), jnp.where(is_newest, 0, rows)
        queue = make_free(queue, _most_new_pages(queue, rows))
        return queue, rows, *extended(queue, rows)

    start = _trimmed(queue.replace(pool=queue.pool.settle()))
    start = make_free(start, _most_new_pages(start, rows))
    queue, rows, pool, _ = jax.lax.while_loop(lambda carry: ~carry[-1], preempt, (start, rows, *extended(start, rows)))
    copied = jnp.sum(jnp.where(rows > 0, _copies(pool), 0))
    return queue.replace(pool=pool, counts=queue.counts.plus(copied_pages=copied)), rows


def _copies(pool: Any) -> Array:
    """For each slot how many pages its next step copies, of all groups."""
    pools = pool.pools if isinstance(pool, GroupedPool) else (pool,)
    return jnp.sum(jnp.stack([own.copy_from >= 0 for own in pools]), axis=0, dtype=jnp.int32)


def _trimmed(queue: Queue) -> Queue:
    """The queue without the pages that masks hide from every later query of their slot."""
    pool = queue.pool
    if not isinstance(pool, GroupedPool):
        return queue
    trimmed = pool.trim(queue.of_slots.values or None)
    entries = lambda pool: sum(jnp.sum(own.block_tables >= 0, dtype=jnp.int32) for own in pool.pools)
    return queue.replace(pool=trimmed, counts=queue.counts.plus(freed_pages=entries(pool) - entries(trimmed)))


def _most_new_pages(queue: Queue, rows: Int[Array, " slots"]) -> Int[Array, ""]:
    """Pages that a step needs at most: those of its tokens, and for each slot a copy of a page that others hold."""
    lengths, size = queue.pool.lengths, queue.pool.page_size
    crossed = -(-(lengths + rows) // size) - -(-lengths // size)
    return jnp.sum(jnp.where(rows > 0, crossed + (lengths % size > 0).astype(jnp.int32), 0), dtype=jnp.int32)
