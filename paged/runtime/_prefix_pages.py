"""Pages that are put into a `PrefixCache` one after the other, for several slots at once."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from . import _prefix_arrays as _arrays
from ._pool_arrays import Places, counted

Cache = Any  # a `PrefixCache`, whose module imports this one
# What `with_pages` gives in place of a node.
NO_NODE, LATER = -1, -2


class NextPages(NamedTuple):
    """The next pages of some slots: in token order, one slot after the other.

    * ``is_first`` bool[some]: whether a page is the first of its slot in this list. Its predecessors are in the cache.
    * ``parents``, ``depths`` i32[some]: the node of the page before the slot's first one here, -1 for none; and how
      many pages are before each.
    * ``tokens`` i32[some, page_size], ``counts`` i32[some]: their tokens, -1 past ``counts``; 0 for no page.
    * ``salts`` i32[some]: see `PrefixCache`.
    * ``pages`` i32[groups, some]: where they lie; -1 where they are freed.
    """

    is_first: Bool[Array, " some"]
    parents: Int[Array, " some"]
    depths: Int[Array, " some"]
    tokens: Int[Array, "some page_size"]
    counts: Int[Array, " some"]
    salts: Int[Array, " some"]
    pages: Int[Array, "groups some"]


def with_pages(
    cache: Cache, pools: Sequence[Any], new: NextPages
) -> tuple[Cache, tuple[Any, ...], Int[Array, " some"]]:
    """The cache with some pages more, where it lacks them, and the pools of the groups.

    Also the node of each page: `NO_NODE` where there is no free one, or where a node with an equal hash hides that the
    page is in the cache; `LATER` for a page that is to be put in again, after others of this call. Pages after one
    without a node have none either.
    """
    is_page, number = new.counts > 0, jnp.arange(new.counts.shape[0], dtype=jnp.int32)
    is_earlier = number[None] < number[:, None]
    begin = jnp.max(jnp.where((number[None] <= number[:, None]) & new.is_first[None], number[None], 0), axis=1)
    is_up_to = (begin[:, None] == begin[None]) & (number[None] <= number[:, None])  # of a slot's own pages
    keys = _arrays.next_keys(cache.keys[new.parents], new.parents < 0, begin, new.tokens, new.salts, cache.epoch)
    found = _arrays.found(cache, keys, new.depths, new.tokens, new.counts, new.salts)
    before = lambda nodes: jnp.where(new.is_first, new.parents, jnp.roll(nodes, 1))
    is_lacking = is_page & ((found < 0) | (cache.parents[found] != before(found)))
    is_lacking = is_page & jnp.any(is_up_to & is_lacking[None], axis=1)
    # Of pages that are alike the first one gets a node, and the others find it in the next call.
    is_alike = is_earlier & is_page[None] & (keys[:, None] == keys[None])
    is_once = jnp.any((new.pages[:, :, None] == new.pages[:, None]) & (new.pages >= 0)[:, None], axis=0)
    comes_again = jnp.any(is_alike | (is_earlier & is_page[None] & is_once), axis=1)
    is_kept = is_lacking & _is_kept(cache, pools, jnp.where(is_lacking, new.pages, -1))
    is_new = is_lacking & ~jnp.any(is_up_to & (is_lacking & (comes_again | is_kept))[None], axis=1)
    free = Places.of(cache.counts == 0).at(jnp.cumsum(is_new, dtype=jnp.int32) - 1)
    made = jnp.where(is_new & (free < cache.num_nodes), free, NO_NODE)
    nodes = jnp.where(is_lacking, made, jnp.where(is_page, found, NO_NODE))
    at = jnp.where(made >= 0, made, cache.num_nodes)
    put = lambda x, values: x.at[at].set(values, mode="drop")
    cache = dataclasses.replace(
        cache,
        tokens=put(cache.tokens, new.tokens), counts=put(cache.counts, new.counts),
        parents=put(cache.parents, before(nodes)), depths=put(cache.depths, new.depths), keys=put(cache.keys, keys),
        salts=put(cache.salts, new.salts), epochs=put(cache.epochs, cache.epoch), pins=put(cache.pins, 0),
        chains=cache.chains.plus(made, keys),
    )  # fmt: skip
    cache, pools = _holding(cache, pools, jnp.where(jnp.any(is_alike, axis=1), NO_NODE, nodes), new.pages)
    used = jnp.where(nodes >= 0, nodes, cache.num_nodes)
    last_used = cache.last_used.at[used].set(cache.clock, mode="drop")
    cache = dataclasses.replace(cache, last_used=last_used, clock=cache.clock + 1)
    # The first page that has no node says why those after it have none.
    waits = is_lacking & comes_again & ~is_kept
    is_first_lacking = is_page & (nodes < 0) & ((before(nodes) >= 0) | new.is_first)
    waits = jnp.any(is_up_to & (is_first_lacking & waits)[None], axis=1)
    return cache, pools, jnp.where(waits & (nodes < 0), LATER, nodes)


def _is_kept(cache: Cache, pools: Sequence[Any], pages: Int[Array, "groups some"]) -> Bool[Array, " some"]:
    """Which pages some node has already. Looked for only where any has several holders, as such a page has."""
    has_several = [(own >= 0) & (pool.ref_counts[own] > 1) for own, pool in zip(pages, pools, strict=True)]

    def found() -> Array:
        is_kept = (cache.pages[:, None] == pages[:, :, None]) & (pages >= 0)[:, :, None]
        return jnp.any(is_kept, axis=(0, 2))

    return jax.lax.cond(jnp.any(jnp.stack(has_several)), found, lambda: jnp.zeros(pages.shape[1], bool))


def _holding(cache: Cache, pools: Sequence[Any], nodes: Array, tables: Array) -> tuple[Cache, tuple[Any, ...]]:
    """The cache as a holder of these nodes' pages, of which it lacks some; and the pools."""
    pages, new = cache.pages, []
    for group, own in enumerate(pools):
        taken = jnp.where((nodes >= 0) & (pages[group, nodes] < 0), tables[group], -1)
        at = jnp.where(taken >= 0, nodes, cache.num_nodes)
        pages = pages.at[group, at].set(taken, mode="drop")
        new.append(dataclasses.replace(own, ref_counts=counted(own.ref_counts, taken, 1)))
    return dataclasses.replace(cache, pages=pages), tuple(new)
