"""`GroupedPool`: a page pool for each group of layers, with the same sequences in all of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged.spec import AttentionSpec, GroupedBatch, Mask, RaggedBatch

from ._arguments import Counts, Flags, Number, slot_counts, slot_flags
from ._groups import Masks, keeps_all, mask_of, page_groups, pages_for
from ._kept import kept_pages
from ._one_program import one_program
from ._pool_arrays import entries_missing
from ._pool_requests import extend_in_all, release_in_all, reserve_in_all
from .pool import PagePool


class GroupedPool(eqx.Module):
    """A `PagePool` for each group of layers whose masks keep the same pages. All have the same slots and lengths.

    Layers with a window need few pages, whatever the length of a sequence. In one pool they would hold as many as
    layers without a window. Here each group has pages of its own, and `trim` frees what its masks hide. The batches are
    `GroupedBatch`, in which each layer finds the block table of its group by its spec.

    Operations are those of `PagePool`, on all slots at once. A slot gets its pages in all groups, or in none.

    **Arguments:**

    - `pools`: the pool of each group, all with as many slots and entries, and one page size.
    - `masks`: for each group the masks of its attentions, as `page_groups` gives them.

    **Raises:** ``ValueError`` unless these fit together.

    >>> spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=4)
    >>> specs = [spec.replace(window=4), spec]
    >>> pool = GroupedPool.init(specs, num_pages=8, num_slots=1, pages_per_seq=8, page_size=2, chunk_size=4)
    >>> pool.num_pages  # of the layers without a window, and of those with one
    (8, 5)
    >>> pool, ok = pool.extend(jnp.array([9]))
    >>> ok.tolist(), pool.num_free.tolist()
    ([True], [3, 0])
    >>> pool = pool.trim()
    >>> pool.decode_batch().for_spec(specs[0]).block_tables.tolist()
    [[-1, -1, -1, 3, 4, -1, -1, -1]]
    """

    pools: tuple[PagePool, ...]
    masks: tuple[Masks, ...] = eqx.field(static=True)

    def __init__(self, pools: Iterable[PagePool], masks: Iterable[Iterable[Mask]]):
        self.pools, self.masks = tuple(pools), tuple(map(tuple, masks))
        if not self.pools or len(self.masks) != len(self.pools):
            raise ValueError(f"masks must be one group for each of {len(self.pools)} pools; got {len(self.masks)}.")
        sizes = {(pool.num_slots, pool.pages_per_seq, pool.page_size) for pool in self.pools}
        if len(sizes) > 1:
            raise ValueError(
                f"The pools of all groups must have the same slots, entries and page size; got {sorted(sizes)}."
            )

    @classmethod
    def init(
        cls,
        specs: Iterable[AttentionSpec],
        num_pages: int,
        num_slots: int,
        pages_per_seq: int,
        page_size: int,
        *,
        chunk_size: int = 64,
    ) -> "GroupedPool":
        """A pool for a model's attentions, in which each group has the pages that its masks keep.

        **Arguments:**

        - `specs`: of the attentions.
        - `num_pages`: pages of a group that keeps every page. Another one has fewer, if `most_pages` for each slot are
          fewer.
        - `num_slots`, `pages_per_seq`, `page_size`: see `PagePool.init`.
        - `chunk_size`: the most rows that a sequence has in one step.

        Raises as `PagePool.init` and `most_pages` do, and ``ValueError`` for no specs.
        """
        groups = page_groups(specs)
        if not groups:
            raise ValueError("specs must be those of a model's attentions; got none.")
        pools = []
        for masks in groups:
            sizes = {"num_slots": num_slots, "pages_per_seq": pages_per_seq, "page_size": page_size}
            own = pages_for(mask_of(masks), num_pages=num_pages, chunk_size=chunk_size, **sizes)
            pools.append(PagePool.init(num_pages if keeps_all(masks) else own, **sizes))
        return cls(pools, groups)

    @property
    def num_groups(self) -> int:
        """How many groups there are."""
        return len(self.pools)

    @property
    def num_pages(self) -> tuple[int, ...]:
        """Pages of each group, free or not."""
        return tuple(pool.num_pages for pool in self.pools)

    @property
    def num_slots(self) -> int:
        """Sequence slots ``S``, empty or not."""
        return self.pools[0].num_slots

    @property
    def pages_per_seq(self) -> int:
        """Entries of each block table."""
        return self.pools[0].pages_per_seq

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.pools[0].page_size

    @property
    def capacity(self) -> int:
        """The most tokens that one slot can have."""
        return self.pools[0].capacity

    @property
    def lengths(self) -> Int[Array, " seqs"]:
        """How many tokens each slot has."""
        return self.pools[0].lengths

    @property
    def num_free(self) -> Int[Array, " groups"]:
        """How many pages of each group are free."""
        return jnp.stack([pool.num_free for pool in self.pools])

    @property
    def pages_in_use(self) -> Int[Array, " groups"]:
        """How many pages of each group are not free."""
        return jnp.stack([pool.pages_in_use for pool in self.pools])

    @property
    def pages_trimmed(self) -> Int[Array, " groups"]:
        """How many pages more each group would hold for its slots if `trim` had freed none."""
        return jnp.stack(list(map(pages_trimmed, self.pools)))

    def reserve(self, tokens: Counts) -> tuple["GroupedPool", Bool[Array, " seqs"]]:
        """Give slots free pages in every group, until each has room for a number of tokens. See `PagePool.reserve`.

        **Arguments:**

        - `tokens`: for how many tokens in all each slot shall have pages.

        **Returns:** the new pool, and ``ok``. A slot that some group cannot serve is unchanged in all of them.
        """
        pools, ok = reserve_in_all(self.pools, tokens)
        return GroupedPool(pools, self.masks), ok

    def extend(self, tokens: Counts) -> tuple["GroupedPool", Bool[Array, " seqs"]]:
        """Add tokens to slots: `reserve` pages for them and, where that is ok, count them. See `PagePool.extend`.

        **Arguments:**

        - `tokens`: how many tokens to add to each slot.

        **Returns:** the new pool, and ``ok``, as `reserve` does.
        """
        pools, ok = extend_in_all(self.pools, tokens)
        return GroupedPool(pools, self.masks), ok

    def release(self, is_released: Flags) -> "GroupedPool":
        """Empty some slots in every group. See `PagePool.release`.

        **Arguments:**

        - `is_released`: which slots.
        """
        is_released = slot_flags("is_released", is_released, self.num_slots)
        return GroupedPool(release_in_all(self.pools, is_released), self.masks)

    def trim(self, values: Mapping[str, Any] | None = None) -> "GroupedPool":
        """Free the pages that the masks of their group hide from every query to come. See `PagePool.trim`.

        **Arguments:**

        - `values`: the numbers that masks name by `Value`, one for each slot.
        """
        pairs = zip(self.pools, self.masks, strict=True)
        pools = [pool if keeps_all(masks) else pool.trim(mask_of(masks), values) for pool, masks in pairs]
        return GroupedPool(pools, self.masks)

    def fork(self, source: Counts) -> tuple["GroupedPool", Bool[Array, " seqs"]]:
        """Give empty slots all tokens of other slots. See `PagePool.fork`.

        **Arguments:**

        - `source`: for each slot the one whose tokens it gets; -1 for a slot that stays as it is.

        **Returns:** the new pool, and ``ok``, as there.
        """
        return self._shared(slot_counts("source", source, self.num_slots), None, None)

    def share(
        self, source: Counts, tokens: Counts, values: Mapping[str, Any] | None = None
    ) -> tuple["GroupedPool", Bool[Array, " seqs"]]:
        """Give empty slots the first tokens of other slots. See `PagePool.share`.

        Of a group that has freed pages only those are needed that its masks may show to a token that comes after the
        shared ones.

        **Arguments:**

        - `source`, `tokens`: as there.
        - `values`: the numbers that masks name by `Value`, one for each slot, of the slots that get tokens.

        **Returns:** the new pool, and ``ok``: False too where any group has freed a page that is needed.
        """
        source = slot_counts("source", source, self.num_slots)
        tokens = slot_counts("tokens", tokens, self.num_slots)
        return self._shared(source, tokens, None if values is None else dict(values))

    @one_program
    def _shared(
        self, source: Int[Array, " seqs"], tokens: Int[Array, " seqs"] | None, values: dict[str, Any] | None
    ) -> tuple["GroupedPool", Bool[Array, " seqs"]]:
        """`share`, or `fork` where ``tokens`` is None."""
        tokens = self.lengths[jnp.clip(source, 0, self.num_slots - 1)] if tokens is None else tokens
        tables, is_given = self.prefix_of(source, tokens, values)
        is_given = is_given & self.is_empty
        return self.attach(is_given, tables, tokens), is_given | (source == -1)

    def prefix_of(
        self, source: Int[Array, " some"], tokens: Int[Array, " some"], values: Mapping[str, Any] | None = None
    ) -> tuple[list[Int[Array, "some pages_per_seq"]], Bool[Array, " some"]]:
        """For each group the pages of the first tokens of some slots, and whether `share` may give them to others.

        **Arguments:**

        - `source`, `tokens`: see `PagePool.prefix_of`.
        - `values`: the numbers that masks name by `Value`, one for each of those who get them.
        """
        at = jnp.clip(source, 0, self.num_slots - 1)
        tables, length = [pool.tables_of(at, tokens) for pool in self.pools], self.lengths[at]
        may = (source == at) & (tokens >= 0) & (tokens <= length)
        for table, masks in zip(tables, self.masks, strict=True):
            may = may & ((tokens == length) | self._has_needed(table, tokens, masks, values))
        return tables, may

    def reorder(self, parents: Counts) -> tuple["GroupedPool", Bool[Array, " seqs"]]:
        """Make every slot a continuation of some slot, all at once. See `PagePool.reorder`.

        **Arguments:**

        - `parents`: for each slot the one whose tokens it has afterwards; -1 to be empty.

        **Returns:** the new pool, and ``ok``, as there.
        """
        moved = [pool.reorder(parents) for pool in self.pools]
        return GroupedPool([pool for pool, _ in moved], self.masks), moved[0][1]

    def settle(self) -> "GroupedPool":
        """Let go of the shared pages that steps have copied. See `PagePool.settle`."""
        return self._map(lambda pool: pool.settle())

    def attach(
        self, is_given: Flags, block_tables: Sequence[Int[Array, "seqs pages_per_seq"]], lengths: Counts
    ) -> "GroupedPool":
        """Give empty slots pages that others hold, by number. See `PagePool.attach`.

        **Arguments:**

        - `is_given`, `lengths`: as there.
        - `block_tables`: for each group the pages of the slots.
        """
        pairs = zip(self.pools, block_tables, strict=True)
        return GroupedPool([pool.attach(is_given, table, lengths) for pool, table in pairs], self.masks)

    @property
    def is_empty(self) -> Bool[Array, " seqs"]:
        """Which slots have no tokens and no pages."""
        return jnp.all(jnp.stack([pool.is_empty for pool in self.pools]), axis=0)

    def _has_needed(
        self, table: Int[Array, "some pages_per_seq"], tokens: Int[Array, " some"], masks: Masks, values: Any
    ) -> Bool[Array, " some"]:
        """Whether a table has all pages of so many tokens that masks may show to a later one."""
        if keeps_all(masks):
            return jnp.ones(tokens.shape, bool)
        kept = kept_pages(mask_of(masks), tokens, self.page_size, self.pages_per_seq, values)
        first = jnp.arange(self.pages_per_seq, dtype=jnp.int32)[None] * self.page_size
        # A page that is not full is needed in any case: it is written.
        is_needed = (first < tokens[:, None]) & (kept | (first + self.page_size > tokens[:, None]))
        return ~jnp.any(is_needed & (table < 0), axis=1)

    def ragged_batch(self, query_rows: Counts) -> GroupedBatch:
        """A step in which every slot has some query rows. See `PagePool.ragged_batch`.

        **Arguments:**

        - `query_rows`: how many rows each slot has, its last tokens.
        """
        return self._batch(lambda pool: pool.ragged_batch(query_rows))

    def decode_batch(self, is_decoding: Flags | None = None, query_rows: int = 1) -> GroupedBatch:
        """A step of each slot's last token, or of several. See `PagePool.decode_batch`.

        **Arguments:**

        - `is_decoding`, `query_rows`: as there.
        """
        return self._batch(lambda pool: pool.decode_batch(is_decoding, query_rows))

    def prefill_batch(self, slot: Number, query_rows: Number) -> GroupedBatch:
        """A step of one sequence. See `PagePool.prefill_batch`.

        **Arguments:**

        - `slot`, `query_rows`: as there.
        """
        return self._batch(lambda pool: pool.prefill_batch(slot, query_rows))

    def _map(self, change: Callable[[PagePool], PagePool]) -> "GroupedPool":
        return GroupedPool(map(change, self.pools), self.masks)

    def _batch(self, batch_of: Callable[[PagePool], RaggedBatch]) -> GroupedBatch:
        return GroupedBatch(map(batch_of, self.pools), self.masks)


def pages_trimmed(pool: PagePool) -> Int[Array, ""]:
    """How many pages of a pool's tokens `PagePool.trim` has freed."""
    return jnp.sum(entries_missing(pool.block_tables, pool.lengths, pool.page_size), dtype=jnp.int32)
