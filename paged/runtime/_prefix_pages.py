"""Pages that are put into a `PrefixCache` one after the other, for several slots at once."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from . import _prefix_arrays as _arrays
from ._pool_arrays import counted, free_pages

Cache = Any  # a `PrefixCache`, whose module imports this one
# What `with_pages` gives in place of a node.
NO_NODE, LATER = -1, -2


class NextPages(NamedTuple):
    """The next page of each of some slots, all of whose pages before it are in the cache.

    * ``parents``, ``depths`` i32[some]: the node of the page before it, -1 for none; and how many are before it.
    * ``tokens`` i32[some, page_size], ``counts`` i32[some]: its tokens, -1 past ``counts``; 0 for no page.
    * ``salts`` i32[some]: see `PrefixCache`.
    * ``pages`` i32[groups, some]: where it lies; -1 where it is freed.
    """

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
    page is in the cache; `LATER` for a page that is to be put in again, after others of this call.
    """
    is_page = new.counts > 0
    keys = _arrays.next_keys(cache.keys[new.parents], new.parents < 0, new.tokens, new.salts, cache.epoch)
    found = _found(cache, new, keys)
    # Of pages that are alike the first one gets a node, and the others have it too.
    earlier = jnp.tri(len(keys), k=-1, dtype=bool) & is_page[None]
    alike = earlier & (keys[:, None] == keys[None]) & (new.parents[:, None] == new.parents[None])
    is_equal = alike & jnp.all(new.tokens[:, None] == new.tokens[None], axis=2)
    is_once = earlier & jnp.any((new.pages[:, :, None] == new.pages[:, None]) & (new.pages >= 0)[:, None], axis=0)
    is_kept = jnp.zeros_like(is_page)
    for own, pages in zip(cache.pages, new.pages, strict=True):
        is_kept |= jnp.any((own[None] == pages[:, None]) & (pages >= 0)[:, None], axis=1)
    is_new = is_page & (found < 0) & ~is_kept & ~jnp.any(alike | is_once, axis=1)
    made = jnp.where(is_new, _free_nodes(cache, is_new), -1)
    nodes = jnp.where(found >= 0, found, made)
    nodes = jnp.where(jnp.any(is_equal, axis=1), nodes[jnp.argmax(is_equal, axis=1)], nodes)
    waits = is_page & (nodes < 0) & ~is_kept & jnp.any(alike | is_once, axis=1)
    at = jnp.where(made >= 0, made, cache.num_nodes)
    put = lambda x, values: x.at[at].set(values, mode="drop")
    cache = dataclasses.replace(
        cache,
        tokens=put(cache.tokens, new.tokens), counts=put(cache.counts, new.counts),
        parents=put(cache.parents, new.parents), depths=put(cache.depths, new.depths), keys=put(cache.keys, keys),
        salts=put(cache.salts, new.salts), epochs=put(cache.epochs, cache.epoch), pins=put(cache.pins, 0),
    )  # fmt: skip
    cache, pools = _holding(cache, pools, jnp.where(jnp.any(is_equal, axis=1), -1, nodes), new.pages)
    used = jnp.where(is_page & (nodes >= 0), nodes, cache.num_nodes)
    last_used = cache.last_used.at[used].set(cache.clock, mode="drop")
    cache = dataclasses.replace(cache, last_used=last_used, clock=cache.clock + 1)
    return cache, pools, jnp.where(waits, LATER, jnp.where(is_page, nodes, NO_NODE))


def _found(cache: Cache, new: NextPages, keys: Array) -> Int[Array, " some"]:
    """The node of each page, if it has one: all its tokens and the node before it are compared."""
    is_same = (cache.keys[None] == keys[:, None]) & (cache.parents[None] == new.parents[:, None])
    is_same &= (cache.counts[None] == new.counts[:, None]) & (cache.salts[None] == new.salts[:, None])
    is_same &= ((cache.counts > 0) & (cache.epochs == cache.epoch))[None]
    node = jnp.min(jnp.where(is_same, jnp.arange(cache.num_nodes, dtype=jnp.int32)[None], cache.num_nodes), axis=1)
    is_found = (node < cache.num_nodes) & jnp.all(cache.tokens[node] == new.tokens, axis=1)
    return jnp.where(is_found, node, -1)


def _free_nodes(cache: Cache, is_new: Bool[Array, " some"]) -> Int[Array, " some"]:
    """A free node for each new page, the first ones in order; -1 where there are no more."""
    free, number = free_pages(cache.counts), jnp.cumsum(is_new, dtype=jnp.int32) - 1
    node = free[jnp.maximum(number, 0)]
    return jnp.where(node < cache.num_nodes, node, -1)


def _holding(cache: Cache, pools: Sequence[Any], nodes: Array, tables: Array) -> tuple[Cache, tuple[Any, ...]]:
    """The cache as a holder of these nodes' pages, of which it lacks some; and the pools."""
    pages, new = cache.pages, []
    for group, own in enumerate(pools):
        taken = jnp.where((nodes >= 0) & (pages[group, nodes] < 0), tables[group], -1)
        at = jnp.where(taken >= 0, nodes, cache.num_nodes)
        pages = pages.at[group, at].set(taken, mode="drop")
        new.append(dataclasses.replace(own, ref_counts=counted(own.ref_counts, taken, 1)))
    return dataclasses.replace(cache, pages=pages), tuple(new)
