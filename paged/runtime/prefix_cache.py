"""`PrefixCache`: pages of tokens that were computed before, found again by the tokens; a pytree beside a page pool."""

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer, UInt

from paged.spec import Mask

from . import _prefix_arrays as _arrays
from ._arguments import Number
from ._one_program import one_program
from ._pool_arrays import counted
from ._prefix_chains import Chains
from ._prefix_hit import PrefixHit as PrefixHit
from ._prefix_order import FREEING, UNNEEDED, order_of_removal
from ._prefix_pools import kept_at, masks_of, pools_of_groups, require_no_values, with_pools_of_groups, with_slot

Tokens = Integer[Array | np.ndarray, " tokens"]


class PrefixCache(eqx.Module):
    """Pages that hold the first tokens of sequences, kept after these, for other sequences that begin alike.

    Every *node* is one page and its tokens, and names the node of the page before it. A sequence that begins with the
    same tokens gets the pages of these nodes, and only the rest is prefilled. The cache is a holder of its pages, as a
    slot is: see `PagePool`. A page whose first tokens only are the same is shared too, and copied when its new holder
    writes.

    * A hit compares every token and every parent. A hash finds the place to compare, and proves nothing.
    * ``salt``, a number of each lookup and insertion, keeps sequences apart that have the same tokens but other keys
      and values: one number for each tenant or adapter. `with_new_weights` makes everything unfit that is in the cache.
    * Pages that were used longest ago are given up first, children before parents. Pages that a slot holds are never
      freed, and nodes that are pinned stay.
    * In a `GroupedPool` a node has a page in each group. A group may lack those that its masks hide.

    All operations are pure functions of arrays of fixed shapes, and are traced once, as `PagePool` says. None reads
    keys or values.

    - `tokens` i32[nodes, page_size], `counts` i32[nodes]: the tokens of each node's page, -1 past its ``counts``; a
      node without tokens is free.
    - `parents`, `depths` i32[nodes]: the node of the page before it, -1 for a first page; and how many nodes before it.
    - `keys`, `salts`, `epochs` [nodes]: the hash, the salt, and when the weights were new.
    - `pages` i32[groups, nodes]: the pages.
    - `last_used`, `pins` i32[nodes]: when it was used, and how often it is pinned.
    - `chains`: the nodes that are not free, by the hash of their keys.
    - `clock`, `epoch` i32[]: now.
    - `masks`, static: for each group of pages the mask that says which are needed, None for all.

    >>> pool = PagePool.init(num_pages=8, num_slots=2, pages_per_seq=4, page_size=2)
    >>> cache = PrefixCache.init(pool)
    >>> pool, ok = pool.extend(jnp.array([5, 0]))  # and a step computes tokens 1 to 5 in slot 0
    >>> cache, pool = cache.insert(pool, 0, jnp.array([1, 2, 3, 4, 5]), 5)
    >>> cache, pool, count = cache.attach(pool, 1, jnp.array([1, 2, 3, 7, 8]), 5)
    >>> int(count), pool.block_tables.tolist(), pool.lengths.tolist()
    (3, [[0, 1, 2, -1], [0, 1, -1, -1]], [5, 3])
    """

    tokens: Int[Array, "nodes page_size"]
    counts: Int[Array, " nodes"]
    parents: Int[Array, " nodes"]
    depths: Int[Array, " nodes"]
    keys: UInt[Array, " nodes"]
    salts: Int[Array, " nodes"]
    epochs: Int[Array, " nodes"]
    pages: Int[Array, "groups nodes"]
    last_used: Int[Array, " nodes"]
    pins: Int[Array, " nodes"]
    chains: Chains
    clock: Int[Array, ""]
    epoch: Int[Array, ""]
    masks: tuple[Mask | None, ...] = eqx.field(static=True)

    @classmethod
    def init(cls, pool: Any, num_nodes: int | None = None) -> "PrefixCache":
        """An empty cache beside a pool.

        **Arguments:**

        - `pool`: a `PagePool` or a `GroupedPool`. Of its values nothing is read.
        - `num_nodes`: the most pages that are kept, in each group. None: as many as the pool has, so that only the
          pool is a limit.

        Raises ``ValueError`` where a mask names numbers of a request by `Value`: equal tokens do not make equal keys
        and values then.
        """
        pools, masks = pools_of_groups(pool), masks_of(pool)
        require_no_values(masks)
        nodes = max(p.num_pages for p in pools) if num_nodes is None else num_nodes
        none, zero = jnp.full(nodes, -1, jnp.int32), jnp.zeros(nodes, jnp.int32)
        return cls(
            tokens=jnp.full((nodes, pool.page_size), -1, jnp.int32),
            counts=zero, parents=none, depths=zero, keys=zero.astype(jnp.uint32), salts=zero, epochs=zero,
            pages=jnp.full((len(pools), nodes), -1, jnp.int32),
            last_used=zero, pins=zero, chains=Chains.init(nodes), masks=masks,
            clock=jnp.zeros((), jnp.int32), epoch=jnp.zeros((), jnp.int32),
        )  # fmt: skip

    @property
    def num_nodes(self) -> int:
        """How many nodes there are, free or not."""
        return self.counts.shape[0]

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.tokens.shape[1]

    @property
    def num_used(self) -> Int[Array, ""]:
        """How many nodes are not free."""
        return jnp.sum(self.counts > 0, dtype=jnp.int32)

    @one_program
    def lookup(self, tokens: Tokens, length: Number, salt: Number = 0) -> PrefixHit:
        """Find the longest beginning of some tokens that is in the cache. Nothing changes.

        **Arguments:**

        - `tokens`: the ids of a sequence's tokens, in an array that may be longer. Arrays of one length for all
          sequences, such as ``pool.capacity``, are one program; each other length is another.
        - `length`: how many of them a hit may have. A sequence whose next token is to be drawn must compute its last
          one, so pass one less than it has. May be traced.
        - `salt`: only nodes that were inserted with this number are found.

        **Returns:** the hit.
        """
        rows, length, salt = self._paged(tokens), jnp.asarray(length, jnp.int32), jnp.asarray(salt, jnp.int32)
        found, whole = self._chain(rows, length, salt)
        kept = [kept_at(mask, self.page_size, rows.shape[0]) for mask in self.masks]
        # With so many whole pages, does each group have every page that its masks show to later tokens?
        numbers = jnp.arange(rows.shape[0] + 1, dtype=jnp.int32)
        is_before = numbers[None, :-1] < numbers[:, None]
        may = numbers <= jnp.minimum(whole, length // self.page_size)  # a page that is not full is no whole one
        for group, is_kept in enumerate(kept):
            if is_kept is not None:
                is_lacking = jnp.where(found >= 0, self.pages[group, found], -1) < 0
                may &= ~jnp.any(is_before & is_kept & is_lacking[None], axis=1)
        return self._hit(rows, length, salt, found, jnp.max(jnp.where(may, numbers, 0)), kept)

    def _hit(self, rows: Array, length: Array, salt: Array, found: Array, whole: Array, kept: list[Any]) -> PrefixHit:
        """The hit of ``whole`` pages, and of the tokens that some child of the last one begins with."""
        entries, size = rows.shape
        entry = jnp.arange(entries, dtype=jnp.int32)
        last = jnp.where(whole > 0, found[jnp.maximum(whole - 1, 0)], -1)
        is_child = (self.counts > 0) & (self.parents == last) & self._is_of(salt) & jnp.all(self.pages >= 0, axis=0)
        is_child &= whole < entries
        rest = jnp.clip(length - whole * size, 0, size)
        common = _arrays.common_lengths(self.tokens, self.counts, rows[jnp.minimum(whole, entries - 1)], rest)
        common = jnp.where(is_child, common, 0)
        best = jnp.argmax(common).astype(jnp.int32)
        partial = common[best]
        nodes = jnp.where(entry < whole, found, jnp.where((entry == whole) & (partial > 0), best, -1))
        pages = []
        for group, is_kept in enumerate(kept):
            own = jnp.where(nodes >= 0, self.pages[group, nodes], -1)
            pages.append(own if is_kept is None else jnp.where(jnp.asarray(is_kept)[whole] | (entry >= whole), own, -1))
        return PrefixHit(whole * size + partial, nodes, jnp.stack(pages))

    @one_program
    def attach(
        self, pool: Any, slot: Number, tokens: Tokens, length: Number, salt: Number = 0
    ) -> tuple["PrefixCache", Any, Int[Array, ""]]:
        """Give an empty slot the longest beginning of its tokens that is in the cache.

        **Arguments:**

        - `pool`: the pool.
        - `slot`: the slot; may be traced. One that is not empty gets nothing.
        - `tokens`, `length`, `salt`: see `lookup`.

        **Returns:** the new cache and pool, and how many tokens the slot has got. The sequence is prefilled from there.
        """
        return self.attach_hit(pool, slot, self.lookup(tokens, length, salt))

    @one_program
    def attach_hit(self, pool: Any, slot: Number, hit: PrefixHit) -> tuple["PrefixCache", Any, Int[Array, ""]]:
        """`attach` for what `lookup` has found, in this cache."""
        pools, slot = pools_of_groups(pool), jnp.asarray(slot, jnp.int32)
        at = jnp.clip(slot, 0, pool.num_slots - 1)
        is_empty = (pool.lengths[at] == 0) & jnp.all(jnp.stack([own.block_tables[at] for own in pools]) < 0)
        count = jnp.where((slot == at) & is_empty, hit.count, 0)
        pool = with_slot(
            pool, jnp.where(count > 0, at, -1), [resized(row, pool.pages_per_seq) for row in hit.pages], count
        )
        return self.used_now(jnp.where(count > 0, hit.nodes, -1)), pool, count

    @one_program
    def insert(
        self,
        pool: Any,
        slot: Number,
        tokens: Tokens,
        length: Number,
        salt: Number = 0,
        *,
        has_partial: bool | Bool[Array, ""] = False,
    ) -> tuple["PrefixCache", Any]:
        """Keep the pages of a slot's first tokens, those that are not in the cache yet.

        Insert what a step has computed. Where nodes are lacking, others are given up as `evict` does.

        **Arguments:**

        - `pool`: the pool.
        - `slot`: the slot; may be traced.
        - `tokens`: the ids of its tokens, in an array that may be longer.
        - `length`: how many of them are in its pages. Whole pages of these are kept.
        - `salt`: see `lookup`.
        - `has_partial`: whether the last page is kept too where it is not full. A slot that writes on in it then gets a
          copy: so insert it when the sequence has ended.

        **Returns:** the new cache and pool.
        """
        pools, size = pools_of_groups(pool), self.page_size
        rows, length, salt = self._paged(tokens), jnp.asarray(length, jnp.int32), jnp.asarray(salt, jnp.int32)
        entries = jnp.where(has_partial, -(-length // size), length // size)
        length = jnp.minimum(length, entries * size)
        found, old = self._chain(rows, length, salt)
        entry = jnp.arange(rows.shape[0], dtype=jnp.int32)
        tables = jnp.stack([resized(own.block_tables[slot], rows.shape[0]) for own in pools])
        found = jnp.where(entry < old, found, -1)
        entries = jnp.minimum(entries, _arrays.first_hidden(self.pages, tables, old, [own.num_pages for own in pools]))
        room, pools = self._with_free_nodes(pools, found, entries - old)
        # In token order, each of them the parent of the next, until nodes run out.
        free = jnp.nonzero(room.counts == 0, size=rows.shape[0], fill_value=room.num_nodes)[0].astype(jnp.int32)
        new = jnp.where((entry >= old) & (entry < entries), free[jnp.clip(entry - old, 0, rows.shape[0] - 1)], -1)
        new = jnp.where(new < room.num_nodes, new, -1)
        nodes = jnp.where(entry < old, found, new)
        at, parents = (
            jnp.where(new >= 0, new, room.num_nodes),
            jnp.concatenate([jnp.full(1, -1, jnp.int32), nodes[:-1]]),
        )
        put = lambda x, values: x.at[at].set(values, mode="drop")
        counts = jnp.clip(length - entry * size, 0, size)
        keys = self._keys(rows, counts, salt)
        room = dataclasses.replace(
            room,
            tokens=put(room.tokens, _arrays.first_tokens(rows, counts)),
            counts=put(room.counts, counts),
            parents=put(room.parents, parents),
            depths=put(room.depths, entry),
            keys=put(room.keys, keys),
            salts=put(room.salts, salt),
            epochs=put(room.epochs, room.epoch),
            pins=put(room.pins, 0),
            chains=room.chains.plus(new, keys),
        )
        return room._holding(pool, pools, nodes, tables)

    @one_program
    def evict(self, pool: Any, num_free: Any, *, spare: Number = 0, num_nodes: Number = 0) -> tuple["PrefixCache", Any]:
        """Give up pages until the pool has some number of free ones, or no page can be given up any more.

        Those that were used longest ago go first, and of one sequence the last page first. Pinned nodes stay, and those
        before them. Pages that slots hold are not freed. Nodes of such pages, and those before them, stay as long as
        others are enough. After that they leave the cache where this frees a page that no slot holds.

        **Arguments:**

        - `pool`: the pool.
        - `num_free`: how many pages shall be free, i32[], or i32[groups] in a `GroupedPool`; may be traced.
        - `spare`: how many pages more may go that nobody needs, where too few are free: so that the next call finds
          some.
        - `num_nodes`: how many nodes shall be free.

        **Returns:** the new cache and pool. Whether there are so many says ``pool.num_free``.
        """
        pools = pools_of_groups(pool)
        wanted = jnp.broadcast_to(jnp.asarray(num_free, jnp.int32), (len(pools),))
        lacking = wanted - jnp.stack([own.num_free for own in pools])
        whole = [lacking[group] for group, mask in enumerate(self.masks) if mask is None]
        count = jnp.max(jnp.stack([*whole, num_nodes - (self.num_nodes - self.num_used)]))
        order = order_of_removal(self, self._is_held(pools), self.pins > 0)
        is_unneeded = jnp.sum(order < UNNEEDED, dtype=jnp.int32)
        count = jnp.where(count > 0, jnp.maximum(count, jnp.minimum(count + spare, is_unneeded)), 0)
        gone = _arrays.oldest(order < FREEING, order, self.depths, count)
        cache, pools = self._without(pools, _arrays.with_descendants(gone, self.parents))
        pages, new, used = cache.pages, [], (cache.last_used + 1).astype(jnp.uint32)
        for group, (own, mask) in enumerate(zip(pools, self.masks, strict=True)):
            if mask is not None:  # a node may do without such a page
                is_free = (pages[group] >= 0) & (own.ref_counts[pages[group]] == 1) & (cache.pins == 0)
                count = wanted[group] - own.num_free
                gone = _arrays.oldest(is_free, used, cache.depths, count + jnp.where(count > 0, spare, 0))
                counts = counted(own.ref_counts, jnp.where(gone, pages[group], -1), -1)
                own = dataclasses.replace(own, ref_counts=counts)
                pages = pages.at[group].set(jnp.where(gone, -1, pages[group]))
            new.append(own)
        return dataclasses.replace(cache, pages=pages), with_pools_of_groups(pool, new)

    def pin(self, nodes: Int[Array, " entries"], times: int = 1) -> "PrefixCache":
        """Keep nodes, such as those of a system prompt, from being given up.

        **Arguments:**

        - `nodes`: as `PrefixHit.nodes` has them; -1 is none.
        - `times`: how often; -1 takes a pin away again.
        """
        at = jnp.where(nodes >= 0, nodes, self.num_nodes)
        return dataclasses.replace(self, pins=self.pins.at[at].add(times, mode="drop"))

    def with_new_weights(self) -> "PrefixCache":
        """The cache after a change of the model's weights: nothing that it has is found again, and all goes first."""
        return dataclasses.replace(self, epoch=self.epoch + 1, last_used=jnp.full_like(self.last_used, -1))

    @one_program
    def clear(self, pool: Any) -> tuple["PrefixCache", Any]:
        """Give up every page, pinned or not.

        **Arguments:**

        - `pool`: the pool.

        **Returns:** the new cache and pool.
        """
        cache, pools = self._without(pools_of_groups(pool), self.counts > 0)
        return cache, with_pools_of_groups(pool, pools)

    def _paged(self, tokens: Any) -> Int[Array, "entries page_size"]:
        """Tokens page by page, with -1 past their end."""
        tokens = jnp.asarray(tokens, jnp.int32)
        more = -tokens.shape[0] % self.page_size
        return jnp.pad(tokens, (0, more), constant_values=-1).reshape(-1, self.page_size)

    def _keys(self, rows: Array, counts: Array, salt: Array) -> Array:
        return _arrays.chain_keys(_arrays.first_tokens(rows, counts), salt, self.epoch)

    def _is_of(self, salt: Array) -> Bool[Array, " nodes"]:
        return (self.salts == salt) & (self.epochs == self.epoch)

    def _chain(self, rows: Array, length: Array, salt: Array) -> tuple[Array, Array]:
        """The nodes of the pages of ``length`` tokens, where they are in the cache; and how many of them are, in a row.

        A page that is not full is a node's only if it has the same tokens and no more.
        """
        size, entries = self.page_size, rows.shape[0]
        counts = jnp.clip(length - jnp.arange(entries, dtype=jnp.int32) * size, 0, size)
        entry, own = jnp.arange(entries, dtype=jnp.int32), _arrays.first_tokens(rows, counts)
        found = _arrays.found(self, _arrays.chain_keys(own, salt, self.epoch), entry, own, counts, salt)
        before = jnp.concatenate([jnp.full(1, -1, jnp.int32), found[:-1]])
        is_same = (found >= 0) & (counts > 0) & (self.parents[found] == before)
        count = jnp.min(jnp.where(is_same, entries, entry))
        return jnp.where(entry < count, found, -1), count

    def used_now(self, nodes: Array) -> "PrefixCache":
        """The cache after these nodes were used."""
        at = jnp.where(nodes >= 0, nodes, self.num_nodes)
        last_used = self.last_used.at[at].set(self.clock, mode="drop")
        return dataclasses.replace(self, last_used=last_used, clock=self.clock + 1)

    def _is_held(self, pools: Any) -> Bool[Array, " nodes"]:
        """The nodes of which a slot holds the page: in the groups that keep every page, if there are any."""
        is_held, has_whole = jnp.zeros(self.num_nodes, bool), None in self.masks
        for own, pages, mask in zip(pools, self.pages, self.masks, strict=True):
            if mask is None or not has_whole:
                is_held |= (pages >= 0) & (own.ref_counts[pages] > 1)
        return is_held

    def _without(self, pools: Any, gone: Bool[Array, " nodes"]) -> tuple["PrefixCache", Any]:
        """The cache without these nodes, and the pools of the groups, with a holder less for each of their pages."""
        new = []
        for own, pages in zip(pools, self.pages, strict=True):
            counts = counted(own.ref_counts, jnp.where(gone, pages, -1), -1)
            new.append(dataclasses.replace(own, ref_counts=counts))
        cache = dataclasses.replace(
            self,
            counts=jnp.where(gone, 0, self.counts),
            parents=jnp.where(gone, -1, self.parents),
            pages=jnp.where(gone[None], -1, self.pages),
            pins=jnp.where(gone, 0, self.pins),
            chains=self.chains.minus(gone),
        )
        return cache, tuple(new)

    def _with_free_nodes(self, pools: Any, kept: Array, count: Array) -> tuple["PrefixCache", Any]:
        """The cache with ``count`` free nodes, if there are so many besides those that are kept."""
        at = jnp.where(kept >= 0, kept, self.num_nodes)
        is_fixed = (self.pins > 0).at[at].set(True, mode="drop")
        order = order_of_removal(self, self._is_held(pools), is_fixed)
        lacking = count - (self.num_nodes - self.num_used)
        return self._without(pools, _arrays.oldest(order < UNNEEDED, order, self.depths, lacking))

    def _holding(self, pool: Any, pools: Any, nodes: Array, tables: Array) -> tuple["PrefixCache", Any]:
        """The cache with the pages of these nodes that it has not held yet, and was used now; and the pool."""
        pages, new, at = self.pages, [], jnp.where(nodes >= 0, nodes, self.num_nodes)
        for group, own in enumerate(pools):
            taken = jnp.where((nodes >= 0) & (pages[group, nodes] < 0), tables[group], -1)
            pages = pages.at[group, jnp.where(taken >= 0, at, self.num_nodes)].set(taken, mode="drop")
            new.append(dataclasses.replace(own, ref_counts=counted(own.ref_counts, taken, 1)))
        return dataclasses.replace(self, pages=pages).used_now(nodes), with_pools_of_groups(pool, new)


def resized(row: Int[Array, " entries"], width: int) -> Int[Array, " width"]:
    """A block table of another width."""
    return jnp.pad(row[:width], (0, max(width - row.shape[0], 0)), constant_values=-1)
