"""Pages of tokens that were computed before: of other samples of a prompt, and of the prefix cache."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged.spec import LARGEST_INT32

from .._groups import keeps_all
from ..grouped_pool import GroupedPool
from .state import Queue


def attach(queue: Queue, slot: Int[Array, ""], row: Int[Array, ""]) -> Queue:
    """Give an empty slot the pages of a request's first tokens that others hold.

    A sample begins with the pages of another one of its prompt. Else there is the longest beginning that the prefix
    cache has: for a sample with tokens of its own too. At least the last token is computed: a token is drawn from its
    logits.
    """
    requests, source = queue.requests, _sample_with_prompt(queue, row)
    tokens, known, salt = requests.tokens[row], requests.known[row], requests.salt[row]

    def shared() -> Queue:
        slots = queue.request.shape
        given, prompt = jnp.arange(slots[0]) == slot, jnp.broadcast_to(requests.prompt[row] - 1, slots)
        if not isinstance(queue.pool, GroupedPool):
            return queue.replace(pool=queue.pool.share(jnp.where(given, source, -1), prompt)[0])
        values = {name: jnp.broadcast_to(x[row], (*slots, *x.shape[1:])) for name, x in requests.values.items()}
        pool, ok = queue.pool.share(jnp.where(given, source, -1), prompt, values)
        return jax.lax.cond(ok[slot], lambda: queue.replace(pool=pool), of_cache)  # some pages may be freed

    def of_cache() -> Queue:
        if queue.cache is None:
            return queue
        cache, pool, _ = queue.cache.attach(queue.pool, slot, tokens, known - 1, salt)
        return queue.replace(cache=cache, pool=pool)

    has_more = (known > requests.prompt[row]) if queue.cache is not None else jnp.zeros((), bool)
    return jax.lax.cond((source >= 0) & ~has_more, shared, of_cache)


def _sample_with_prompt(queue: Queue, row: Int[Array, ""]) -> Int[Array, ""]:
    """The slot of another sample of a request's prompt, which is in its pages but for the last token; -1 for none.

    Of several the one with the fewest tokens: it has given up the fewest pages that no query of its own sees.
    """
    lengths, is_whole = queue.pool.lengths, _is_of_family(queue, row) & ~_is_on_its_way(queue, row)
    source = jnp.argmin(jnp.where(is_whole, lengths, LARGEST_INT32)).astype(jnp.int32)
    return jnp.where(jnp.any(is_whole), source, -1)


def _is_of_family(queue: Queue, row: Int[Array, ""]) -> Bool[Array, " slots"]:
    """Which slots have samples of a request's prompt, if there are several."""
    family = queue.requests.family[row]
    return queue.is_running & (family >= 0) & (queue.of_slots.family == family)


def _is_on_its_way(queue: Queue, row: Int[Array, ""]) -> Bool[Array, " slots"]:
    """Which slots have not computed all tokens but one of a prompt of this request's length."""
    return queue.pool.lengths < queue.requests.prompt[row] - 1


def waits_for_pages(queue: Queue, row: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether a running request is computing tokens with which this one begins: another sample of its prompt, or with
    a prefix cache whole pages.

    It would compute them again, and finds them a few steps later.
    """
    is_coming = jnp.any(_is_of_family(queue, row) & _is_on_its_way(queue, row)) & (_sample_with_prompt(queue, row) < 0)
    if queue.cache is None:
        return is_coming
    requests, others, size = queue.requests, queue.of_slots, queue.pool.page_size
    place = jnp.arange(requests.tokens.shape[1], dtype=jnp.int32)
    known = jnp.minimum(requests.known[row] - 1, others.known)[:, None]
    is_same = (others.tokens == requests.tokens[row][None]) & (place[None] < known)
    common = jnp.sum(jnp.cumsum(~is_same, axis=1) == 0, axis=1, dtype=jnp.int32) // size * size
    computes = queue.is_running & (others.salt == requests.salt[row]) & (common > queue.pool.lengths)
    found = queue.cache.lookup(requests.tokens[row], requests.known[row] - 1, requests.salt[row]).count
    return is_coming | jnp.any(computes & (common > found))


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
