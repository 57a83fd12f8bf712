"""What `PrefixCache` computes with arrays: hashes of pages of tokens, ancestors of nodes, and the oldest nodes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt

Cache = Any  # a `PrefixCache`, whose module imports this one

# Odd, so that multiplication by it has an inverse modulo 2**32.
_FACTOR = 0x9E3779B1
_INVERSE = pow(_FACTOR, -1, 2**32)


def chain_keys(
    tokens: Int[Array, "pages page_size"], salt: Int[Array, ""], epoch: Int[Array, ""]
) -> UInt[Array, " pages"]:
    """A hash of each page's tokens and of all before them, which finds a page's node. Equal hashes prove nothing.

    The key of page ``l`` is ``key[l - 1] * factor + hash(tokens[l])`` modulo 2**32, for all pages at once.
    """
    count = tokens.shape[0]
    sums = jnp.cumsum(_hashes(tokens) * jnp.asarray(_powers(_INVERSE, count)), dtype=jnp.uint32)
    return (sums + _seed(salt, epoch)) * jnp.asarray(_powers(_FACTOR, count))


def next_keys(
    before: UInt[Array, " some"],
    is_root: Bool[Array, " some"],
    begin: Int[Array, " some"],
    tokens: Int[Array, "some page_size"],
    salts: Int[Array, " some"],
    epoch: Int[Array, ""],
) -> UInt[Array, " some"]:
    """The keys of pages of several sequences, one after the other, as `chain_keys` gives them for each.

    **Arguments:**

    - `before`: the key of the page before the first one of each sequence. - `is_root`: whether there is no such page.
    - `begin`: where the first page of each page's sequence is.
    - `tokens`, `salts`, `epoch`: of the pages.
    """
    some = tokens.shape[0]
    inverse, factor = jnp.asarray(_powers(_INVERSE, some)), jnp.asarray(_powers(_FACTOR, some))
    own = _hashes(tokens) * inverse
    sums = jnp.cumsum(own, dtype=jnp.uint32)
    seed = jnp.where(is_root, _seed(salts, epoch), before * jnp.uint32(_FACTOR))
    return seed * factor[jnp.arange(some) - begin] + (sums - sums[begin] + own[begin]) * factor


def _seed(salt: Array, epoch: Array) -> Array:
    return _mixed(salt.astype(jnp.uint32) * jnp.uint32(0xC2B2AE35) + _mixed(epoch.astype(jnp.uint32)))


def _hashes(tokens: Int[Array, "pages page_size"]) -> UInt[Array, " pages"]:
    weights = jnp.asarray(_powers(0x85EBCA6B, tokens.shape[1]))
    # Not 0, which stays 0 when it is mixed: pages of the token 0 would all have one key.
    mixed = _mixed(tokens.astype(jnp.uint32) + jnp.uint32(0x27D4EB2F))
    return _mixed(jnp.sum(mixed * weights[None], axis=1, dtype=jnp.uint32))


def _powers(base: int, count: int) -> np.ndarray:
    powers = [1]
    for _ in range(count - 1):
        powers.append(powers[-1] * base % 2**32)
    return np.array(powers[:count], np.uint32)


def _mixed(x: UInt[Array, "..."]) -> UInt[Array, "..."]:
    """Numbers whose every bit depends on every bit of ``x``."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def first_tokens(rows: Int[Array, "pages page_size"], counts: Int[Array, " pages"]) -> Int[Array, "pages page_size"]:
    """The first ``counts`` tokens of each page, and -1 past them."""
    return jnp.where(jnp.arange(rows.shape[1], dtype=jnp.int32)[None] < counts[:, None], rows, -1)


def found(
    cache: Cache,
    keys: UInt[Array, " some"],
    depths: Int[Array, " some"],
    tokens: Int[Array, "some page_size"],
    counts: Int[Array, " some"],
    salts: Int[Array, "*some"],
) -> Int[Array, " some"]:
    """For each page a node of its key that has all its tokens, -1 for none. Parents are not compared."""

    def is_wanted(nodes: Array) -> Array:
        is_same = (cache.keys[nodes] == keys) & (cache.depths[nodes] == depths) & (cache.counts[nodes] == counts)
        return is_same & (cache.salts[nodes] == salts) & (cache.epochs[nodes] == cache.epoch)

    nodes = cache.chains.found(keys, is_wanted)
    return jnp.where((nodes >= 0) & jnp.all(cache.tokens[nodes] == tokens, axis=1), nodes, -1)


def first_hidden(
    pages: Int[Array, "groups nodes"], tables: Int[Array, "groups entries"], old: Array, num_pages: Sequence[int]
) -> Int[Array, ""]:
    """The first entry from ``old`` on whose page a node has already, which another one with an equal hash hides.

    No page is that of two nodes: neither would ever be given up.
    """
    entry = jnp.arange(tables.shape[1], dtype=jnp.int32)
    is_hidden = jnp.zeros(entry.shape, bool)
    for own, table, count in zip(pages, tables, num_pages, strict=True):
        is_kept = jnp.zeros(count, bool).at[jnp.where(own >= 0, own, count)].set(True, mode="drop")
        is_hidden |= (table >= 0) & is_kept[table]
    return jnp.min(jnp.where(is_hidden & (entry >= old), entry, tables.shape[1]))


def common_lengths(
    tokens: Int[Array, "nodes page_size"], counts: Int[Array, " nodes"], wanted: Int[Array, " page_size"], most: Array
) -> Int[Array, " nodes"]:
    """How many tokens of each node, from its first on, are those that are wanted: at most ``most``."""
    size = tokens.shape[1]
    place = jnp.arange(size, dtype=jnp.int32)[None]
    return jnp.minimum(jnp.min(jnp.where(tokens == wanted[None], size, place), axis=1), jnp.minimum(counts, most))


def with_ancestors(values: UInt[Array, " nodes"], parents: Int[Array, " nodes"]) -> UInt[Array, " nodes"]:
    """For each node the largest value of it and of all that come after it, by twice as many in every turn."""
    nodes = parents.shape[0]

    def turn(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        values, end = carry
        return values.at[end].max(values, mode="drop"), jnp.where(end < nodes, end[jnp.minimum(end, nodes - 1)], nodes)

    carry = values, jnp.where(parents >= 0, parents, nodes)
    return jax.lax.while_loop(lambda carry: jnp.any(carry[1] < nodes), turn, carry)[0]


def with_descendants(is_node: Bool[Array, " nodes"], parents: Int[Array, " nodes"]) -> Bool[Array, " nodes"]:
    """These nodes and all that come after them, as `with_ancestors` finds those before them."""

    def turn(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        is_node, above = carry
        return is_node | ((above >= 0) & is_node[above]), jnp.where(above >= 0, above[above], -1)

    return jax.lax.while_loop(lambda carry: jnp.any(carry[1] >= 0), turn, (is_node, parents))[0]


def oldest(
    is_node: Bool[Array, " nodes"], order: UInt[Array, " nodes"], depths: Int[Array, " nodes"], count: Array
) -> Bool[Array, " nodes"]:
    """The ``count`` of these nodes that are first in an order; of equal ones the deepest first."""
    is_taken = jnp.zeros_like(is_node)
    for key in (order, depths.shape[0] - depths.astype(jnp.uint32)):
        # Those before the ones that the last place falls among; then only these are asked for the next order.
        last = _number_at(is_node, key, count)
        is_before = is_node & (key < last)
        is_taken, count = is_taken | is_before, count - jnp.sum(is_before, dtype=jnp.int32)
        is_node = is_node & (key == last)
    return is_taken | (is_node & (jnp.cumsum(is_node, dtype=jnp.int32) <= count))


def _number_at(is_node: Array, order: Array, count: Array) -> Array:
    """The largest number below which fewer than ``count`` of the nodes are: by halves, because a sort takes longer."""

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # fewer than count are below low, and enough below high, if there are so many
        middle = low + ((high - low) >> 1)
        is_enough = jnp.sum(is_node & (order < middle), dtype=jnp.int32) >= count
        return jnp.where(is_enough, low, middle), jnp.where(is_enough, middle, high)

    return jax.lax.fori_loop(0, 32, halve, (jnp.uint32(0), jnp.uint32(2**32 - 1)))[0]
