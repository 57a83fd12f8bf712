"""The prefix cache in the loop: pages of tokens that were computed before, and when requests wait for such pages."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .._groups import keeps_all
from ..grouped_pool import GroupedPool
from .state import Queue


def attach(queue: Queue, slot: Int[Array, ""], row: Int[Array, ""]) -> Queue:
    """Give an empty slot the pages of the longest beginning of a request's tokens that is in the cache.

    At least the last token is computed: a token is drawn from its logits.
    """
    if queue.cache is None:
        return queue
    requests = queue.requests
    tokens, known, salt = requests.tokens[row], requests.known[row], requests.salt[row]
    cache, pool, _ = queue.cache.attach(queue.pool, slot, tokens, known - 1, salt)
    return queue.replace(cache=cache, pool=pool)


def waits_for_pages(queue: Queue, row: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether a running request is computing whole pages of tokens with which this one begins.

    It would compute them again, and finds them in the cache a few steps later.
    """
    if queue.cache is None:
        return jnp.zeros((), bool)
    requests, others, size = queue.requests, queue.of_slots, queue.pool.page_size
    place = jnp.arange(requests.tokens.shape[1], dtype=jnp.int32)
    known = jnp.minimum(requests.known[row] - 1, others.known)[:, None]
    is_same = (others.tokens == requests.tokens[row][None]) & (place[None] < known)
    common = jnp.sum(jnp.cumsum(~is_same, axis=1) == 0, axis=1, dtype=jnp.int32) // size * size
    is_coming = queue.is_running & (others.salt == requests.salt[row]) & (common > queue.pool.lengths)
    found = queue.cache.lookup(requests.tokens[row], requests.known[row] - 1, requests.salt[row]).count
    return jnp.any(is_coming & (common > found))


def keeping_groups(queue: Queue) -> Array:
    """Which groups of layers keep every page, bool[groups]; of one pool it is bool[]."""
    if not isinstance(queue.pool, GroupedPool):
        return jnp.ones((), bool)
    return jnp.asarray([keeps_all(masks) for masks in queue.pool.masks])


def make_free(queue: Queue, pages: Array) -> Queue:
    """Give up pages of the cache until so many are free, if they are not already."""
    if queue.cache is None:
        return queue

    def evicted(queue: Queue) -> Queue:
        held: Any = queue.cache
        before = jnp.sum(queue.pool.num_free)
        cache, pool = held.evict(queue.pool, pages)
        gone = jnp.sum(pool.num_free) - before
        return queue.replace(cache=cache, pool=pool, counts=queue.counts.plus(evicted_pages=gone))

    return jax.lax.cond(jnp.all(queue.pool.num_free >= pages), lambda queue: queue, evicted, queue)


def keep(queue: Queue, which: Bool[Array, " slots"], is_last: Bool[Array, " slots"]) -> Queue:
    """Put the whole pages of some slots into the cache, and of those that are at their end the last page too."""
    if queue.cache is None:
        return queue

    def one(carry: tuple[Queue, Array]) -> tuple[Queue, Array]:
        queue, left = carry
        slot = jnp.argmax(left).astype(jnp.int32)
        row, requests = jnp.maximum(queue.request[slot], 0), queue.requests
        length, salt = queue.pool.lengths[slot], requests.salt[row]
        how = {"has_partial": is_last[slot]}
        held: Any = queue.cache
        cache, pool = held.insert(queue.pool, slot, requests.tokens[row], length, salt, **how)
        return queue.replace(cache=cache, pool=pool), left & (jnp.arange(left.shape[0]) != slot)

    return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), one, (queue, which & queue.is_running))[0]


def pages_cached(queue: Queue) -> Array:
    """For each group, how many pages nobody but the cache holds."""
    if queue.cache is None:
        return jnp.zeros(1, jnp.int32)
    pools = queue.pool.pools if isinstance(queue.pool, GroupedPool) else (queue.pool,)
    pairs = zip(pools, queue.cache.pages, strict=True)
    return jnp.stack([jnp.sum((pages >= 0) & (own.ref_counts[pages] == 1), dtype=jnp.int32) for own, pages in pairs])
