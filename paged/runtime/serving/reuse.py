"""Pages of tokens that were computed before: of other samples of a prompt, and of the prefix cache."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged.spec import LARGEST_INT32

from .._groups import keeps_all
from .._prefix_hit import PrefixHit
from .._prefix_pages import NO_NODE, NextPages, with_pages
from .._prefix_pools import pools_of_groups, with_pools_of_groups, with_slot
from ..grouped_pool import GroupedPool
from ..prefix_cache import resized
from .state import Counts, Queue

# How many pages are put into the cache at once.
_AT_ONCE = 32


class _Changing(NamedTuple):
    """What changes of a queue here: a loop that carries its table of requests too would copy all tokens."""

    cache: Any
    pool: Any
    kept: Int[Array, " slots"]
    nodes: Int[Array, " slots"]
    counts: Counts

    @classmethod
    def of(cls, queue: Queue) -> "_Changing":
        return cls(queue.cache, queue.pool, queue.kept, queue.nodes, queue.counts)

    def put(self, queue: Queue) -> Queue:
        """The queue with these parts."""
        return queue.replace(**self._asdict())


def attach(
    queue: Queue, may: Bool[Array, ""], slot: Int[Array, ""], row: Int[Array, ""]
) -> tuple[Queue, Bool[Array, ""]]:
    """Give an empty slot, if it may, the pages of a request's first tokens that others hold.

    A sample begins with the pages of another one of its prompt. Else there is the longest beginning that the prefix
    cache has: for a sample with tokens of its own too. At least the last token is computed: a token is drawn from its
    logits. And all are, where the request asks for the log-probabilities of its prompt.

    **Returns:** the queue, and whether the request should rather wait: a running one is computing tokens with which
    this one begins, another sample of its prompt, or with a prefix cache whole pages. It would compute them again, and
    finds them a few steps later.
    """
    most, size = _most_found(queue, row), queue.pool.page_size
    own, is_shared, waits = _of_sample(queue, row)
    is_shared, waits = may & (most > 0) & is_shared, waits & (most > 0)
    cache = queue.cache
    if cache is None:
        return queue if own is None else own.given_to(queue, jnp.where(is_shared, slot, -1)), waits

    def found() -> tuple[PrefixHit, Array]:
        requests = queue.requests
        hit = _fitting(queue, cache.lookup(requests.tokens[row], most, requests.salt[row]), requests.known[row])
        return hit, _is_coming(queue, row, most, hit.count)

    # A branch gives little, so that little is copied.
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(found))
    hit, is_coming = jax.lax.cond(may & ~is_shared & ~waits, found, lambda: nothing)
    gets = may & ~is_shared & ~waits & ~is_coming
    whole = hit.count // size
    node = jnp.where(whole > 0, hit.nodes[jnp.maximum(whole - 1, 0)], -1)
    pages = [resized(pages, queue.pool.pages_per_seq) for pages in hit.pages]
    of_cache = _Beginning([jnp.where(hit.count > 0, own, -1) for own in pages], hit.count, whole, node)
    if own is not None:
        of_cache = jax.tree.map(lambda a, b: jnp.where(is_shared, a, b), own, of_cache)
    queue = of_cache.given_to(queue, jnp.where(is_shared | gets, slot, -1))
    return queue.replace(cache=cache.used_now(jnp.where(gets & (hit.count > 0), hit.nodes, -1))), waits | is_coming


class _Beginning(NamedTuple):
    """The first tokens of a request, in pages that others hold.

    * ``rows``: for each group the pages, as a table has them. * ``length``: of how many tokens.
    * ``whole``, ``node``: how many of the pages are in the cache, and the node of the last of these, -1 for none.
    """

    rows: list[Int[Array, " pages_per_seq"]]
    length: Int[Array, ""]
    whole: Int[Array, ""]
    node: Int[Array, ""]

    def given_to(self, queue: Queue, slot: Int[Array, ""]) -> Queue:
        """The queue with these pages in an empty slot; -1 for none."""
        is_slot = jnp.arange(queue.request.shape[0], dtype=jnp.int32) == slot
        kept, nodes = jnp.where(is_slot, self.whole, queue.kept), jnp.where(is_slot, self.node, queue.nodes)
        return queue.replace(pool=with_slot(queue.pool, slot, self.rows, self.length), kept=kept, nodes=nodes)


def _is_coming(queue: Queue, row: Int[Array, ""], most: Array, found: Array) -> Bool[Array, ""]:
    """Whether a running sequence will have one whole page more of a request's tokens than were found.

    It will if its first page that it has not computed, or that was not found, is the request's too, with all before it.
    """
    size, tokens, of_slots = queue.pool.page_size, queue.requests.tokens, queue.of_slots
    end = (jnp.maximum(queue.pool.lengths, found) // size + 1) * size
    may = queue.is_running & (of_slots.salt == queue.requests.salt[row])
    may &= end <= jnp.minimum(most, of_slots.known)

    def has_its_page() -> Bool[Array, " slots"]:
        place = jnp.minimum(end[:, None] - size + jnp.arange(size, dtype=jnp.int32)[None], tokens.shape[1] - 1)
        return jnp.all(tokens[jnp.maximum(queue.request, 0)[:, None], place] == tokens[row, place], axis=1)

    may &= jax.lax.cond(jnp.any(may), has_its_page, lambda: may)

    def compare(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        left, _ = carry
        slot = jnp.argmax(left).astype(jnp.int32)
        is_past = jnp.arange(tokens.shape[1], dtype=jnp.int32) >= end[slot]
        return left.at[slot].set(False), jnp.all(is_past | (tokens[queue.request[slot]] == tokens[row]))

    return jax.lax.while_loop(lambda carry: jnp.any(carry[0]) & ~carry[1], compare, (may, jnp.zeros((), bool)))[1]


def _fitting(queue: Queue, hit: PrefixHit, known: Int[Array, ""]) -> PrefixHit:
    """The hit without a page that is not whole, where there is no room for a copy beside it.

    A sequence that fills the pool would wait for this copy forever.
    """
    size, pools = queue.pool.page_size, pools_of_groups(queue.pool)
    whole = hit.count // size
    lacking = -(-known // size) - whole

    def found() -> Array:
        is_tight = jnp.zeros((), bool)
        for own, pages, cached, keeps in zip(pools, hit.pages, pages_cached(queue), keeping_groups(queue), strict=True):
            taken = jnp.sum((pages >= 0) & (own.ref_counts[pages] == 1), dtype=jnp.int32)
            if keeps:
                is_tight |= own.num_free + cached - taken < lacking
        return is_tight

    may = jnp.any(jnp.stack([own.num_free < lacking for own in pools]))
    is_tight = jax.lax.cond(may, found, lambda: jnp.zeros((), bool))
    is_left = (jnp.arange(hit.nodes.shape[0], dtype=jnp.int32) < whole) | ~is_tight
    pages = jnp.where(is_left[None], hit.pages, -1)
    return PrefixHit(jnp.where(is_tight, whole * size, hit.count), jnp.where(is_left, hit.nodes, -1), pages)


def _of_sample(queue: Queue, row: Int[Array, ""]) -> tuple[_Beginning | None, Bool[Array, ""], Bool[Array, ""]]:
    """The prompt's pages of another sample; whether there are such, and whether a request should rather wait."""
    if queue.requests.family is None:
        no = jnp.zeros((), bool)
        return None, no, no
    requests, source = queue.requests, _sample_with_prompt(queue, row)
    waits = jnp.any(_is_of_family(queue, row) & _is_on_its_way(queue, row)) & (source < 0)
    has_more = (requests.known[row] > requests.prompt[row]) if queue.cache is not None else jnp.zeros((), bool)
    may, prompt = (source >= 0) & ~has_more, requests.prompt[row] - 1
    values = {name: x[row][None] for name, x in requests.values.items()}
    of_groups = (values,) if isinstance(queue.pool, GroupedPool) else ()
    tables, ok = queue.pool.prefix_of(source[None], prompt[None], *of_groups)  # some pages may be freed
    rows = [own[0] for own in (tables if isinstance(queue.pool, GroupedPool) else [tables])]
    whole, node = jnp.zeros((), jnp.int32), jnp.full((), -1, jnp.int32)
    if queue.cache is not None:
        parents, whole = queue.cache.parents, jnp.minimum(queue.kept[source], prompt // queue.pool.page_size)
        above = jnp.where(may, queue.kept[source] - whole, 0)
        node = jax.lax.fori_loop(0, above, lambda _, node: parents[node], queue.nodes[source])
        node = jnp.where(whole > 0, node, -1)
    return _Beginning(rows, prompt, whole, node), may & ok[0], waits


def _most_found(queue: Queue, row: Int[Array, ""]) -> Int[Array, ""]:
    """How many of a request's tokens may be found in pages of others."""
    known, asked = queue.requests.known[row], queue.requests.prompt_log_probs
    return known - 1 if asked is None else jnp.where(asked[row] > 0, 0, known - 1)


def _sample_with_prompt(queue: Queue, row: Int[Array, ""]) -> Int[Array, ""]:
    """The slot of another sample of a request's prompt, which is in its pages but for the last token; -1 for none.

    Of several the one with the fewest tokens: it has given up the fewest pages that no query of its own sees.
    """
    lengths, is_whole = queue.pool.lengths, _is_of_family(queue, row) & ~_is_on_its_way(queue, row)
    source = jnp.argmin(jnp.where(is_whole, lengths, LARGEST_INT32)).astype(jnp.int32)
    return jnp.where(jnp.any(is_whole), source, -1)


def _is_of_family(queue: Queue, row: Int[Array, ""]) -> Bool[Array, " slots"]:
    """Which slots have samples of a request's prompt, if there are several."""
    assert queue.requests.family is not None and queue.of_slots.family is not None
    family = queue.requests.family[row]
    return queue.is_running & (family >= 0) & (queue.of_slots.family == family)


def _is_on_its_way(queue: Queue, row: Int[Array, ""]) -> Bool[Array, " slots"]:
    """Which slots have not computed all tokens but one of a prompt of this request's length."""
    return queue.pool.lengths < queue.requests.prompt[row] - 1


def keeping_groups(queue: Queue) -> list[bool]:
    """Which groups of layers keep every page."""
    if not isinstance(queue.pool, GroupedPool):
        return [True]
    return [keeps_all(masks) for masks in queue.pool.masks]


def make_free(queue: Queue, pages: Int[Array, " groups"], rows: Int[Array, " slots"]) -> Queue:
    """Give up pages of the cache until so many are free in each group, if they are not already.

    And nodes, for the pages of the tokens that slots have and of so many more rows.
    """
    if queue.cache is None:
        return queue
    pools, cache = pools_of_groups(queue.pool), queue.cache
    entries = -(-(queue.pool.lengths + rows) // queue.pool.page_size)
    nodes = jnp.sum(jnp.where(queue.is_running, entries - queue.kept, 0), dtype=jnp.int32)
    free = jnp.stack([own.num_free for own in pools])
    # Where all that the cache could give up is not enough, it keeps what it has.
    has_more = lambda: jnp.all(free + pages_cached(queue) >= pages)
    lacks = jax.lax.cond(jnp.any(free < pages), has_more, lambda: jnp.zeros((), bool))
    lacks |= cache.num_nodes - cache.num_used < nodes

    def evicted(_: Any, changing: _Changing) -> _Changing:
        held, pool, kept, of_slots, counts = changing
        # Some more than are needed: each search takes longer than a step.
        cache, pool = held.evict(pool, pages, spare=of_slots.shape[0], num_nodes=nodes)
        gone = jnp.sum(jnp.stack([own.num_free for own in pools_of_groups(pool)]) - free, dtype=jnp.int32)
        is_lost = (of_slots >= 0) & (cache.counts[of_slots] == 0)
        kept, of_slots = jnp.where(is_lost, 0, kept), jnp.where(is_lost, -1, of_slots)
        return _Changing(cache, pool, kept, of_slots, counts.plus(evicted_pages=gone))

    return jax.lax.fori_loop(0, lacks.astype(jnp.int32), evicted, _Changing.of(queue)).put(queue)


def keep(queue: Queue, is_last: Bool[Array, " slots"]) -> Queue:
    """Put pages that have become whole into the cache, and of slots that are at their end the last page too."""
    if queue.cache is None:
        return queue
    slots, size, lengths = queue.request.shape[0], queue.pool.page_size, queue.pool.lengths
    entries = jnp.where(is_last, -(-lengths // size), lengths // size)
    number = jnp.arange(_AT_ONCE, dtype=jnp.int32)

    def some(carry: tuple[_Changing, Array]) -> tuple[_Changing, Array]:
        (cache, pool, kept, nodes, counted), left = carry
        wanted = jnp.where(left, entries - kept, 0)
        through = jnp.cumsum(wanted, dtype=jnp.int32)
        slot = jax.lax.optimization_barrier(jnp.sum(through[None] <= number[:, None], axis=1, dtype=jnp.int32))
        at = jnp.minimum(slot, slots - 1)
        which = number - (through - wanted)[at]  # of the pages that the slot has to bring
        own, depths, requests = jnp.maximum(queue.request[at], 0), kept[at] + which, queue.requests
        counts = jnp.where(slot < slots, jnp.clip(lengths[at] - depths * size, 0, size), 0)
        place = depths[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None]
        tokens = requests.tokens[own[:, None], jnp.minimum(place, requests.tokens.shape[1] - 1)]
        tokens = jnp.where(place < lengths[at][:, None], tokens, -1)
        pools = pools_of_groups(pool)
        pages = jnp.stack([each.block_tables[at, jnp.minimum(depths, each.pages_per_seq - 1)] for each in pools])
        new = NextPages((which == 0) | (slot == slots), nodes[at], depths, tokens, counts, requests.salt[own], pages)
        cache, pools, of_pages = with_pages(cache, pools, new)
        to = jnp.where(of_pages >= 0, slot, slots)
        is_latest = ~jnp.append(to[:-1] == to[1:], False)
        # For each slot how many pages more are kept, whether one cannot be, and the last one's node: by one scatter.
        node = jnp.where(is_latest & (to < slots), of_pages + 1, 0)
        told = jnp.stack([*(x.astype(jnp.int32) for x in (of_pages >= 0, of_pages == NO_NODE)), node], axis=1)
        more, is_ended, node = jnp.zeros((slots, 3), jnp.int32).at[slot].add(told, mode="drop").T
        kept, nodes = kept + more, jnp.where(node > 0, node - 1, nodes)
        # A page that cannot be kept ends the chain of its slot, until the next step.
        left = left & (kept < entries) & (is_ended == 0)
        return _Changing(cache, with_pools_of_groups(pool, pools), kept, nodes, counted), left

    left = queue.is_running & (queue.kept < entries)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), some, (_Changing.of(queue), left))[0].put(queue)


def pages_cached(queue: Queue) -> Int[Array, " groups"]:
    """For each group, how many pages nobody but the cache holds."""
    if queue.cache is None:
        return jnp.zeros(1, jnp.int32)
    pairs = zip(pools_of_groups(queue.pool), queue.cache.pages, strict=True)
    return jnp.stack([jnp.sum((pages >= 0) & (own.ref_counts[pages] == 1), dtype=jnp.int32) for own, pages in pairs])
