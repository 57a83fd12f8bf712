"""`PagePool`: which pages are free, and which sequence slot holds which; arrays of fixed shapes."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer

from paged.lower import vary_alike
from paged.spec import Mask, RaggedBatch, register_module, require_positive_int

from ._arguments import index_or_traced, slot_counts, slot_flags
from ._kept import kept_pages

# One per slot: an array, which may be traced, or a list.
Counts = Integer[Array | np.ndarray, " seqs"] | Sequence[int]
Flags = Bool[Array | np.ndarray, " seqs"] | Sequence[bool]
Number = Integer[Array | np.ndarray, ""] | int | np.integer


class PagePool(eqx.Module):
    """Book-keeping of the pages that sequence slots share: integers only, the tokens themselves live in `Pages`.

    * ``ref_counts`` i32[pages]: how many slots hold each page. A page is free where its count is 0, and only free pages
      are handed out. Counts are 0 or 1 as yet: no operation gives a page a second holder.
    * ``block_tables`` i32[seqs, pages_per_seq]: the pages of each slot in token order, -1 past them, and in the place
      of pages that `trim` has freed.
    * ``lengths`` i32[seqs]: how many tokens each slot has; 0 for an empty slot.
    * ``page_size``, static: tokens per page.

    Every operation is a pure function that works on all slots at once and returns a new pool. It is traced once under
    ``jax.jit``, whatever the values. Running out of pages raises nothing: a slot that cannot have all that was asked
    for stays as it was, and its entry of ``ok`` is False, to branch on.

    >>> pool = PagePool.init(num_pages=4, num_slots=2, pages_per_seq=3, page_size=2)
    >>> pool, ok = pool.extend(jnp.array([5, 3]))
    >>> ok.tolist(), pool.lengths.tolist(), pool.block_tables.tolist()
    ([True, False], [5, 0], [[0, 1, 2], [-1, -1, -1]])
    >>> pool, ok = pool.release(jnp.array([True, False])).extend(jnp.array([0, 3]))
    >>> ok.tolist(), int(pool.num_free)
    ([True, True], 2)
    """

    ref_counts: Int[Array, " pages"]
    block_tables: Int[Array, "seqs pages_per_seq"]
    lengths: Int[Array, " seqs"]
    page_size: int = eqx.field(static=True)

    @classmethod
    def init(cls, num_pages: int, num_slots: int, pages_per_seq: int, page_size: int) -> "PagePool":
        """A pool in which every page is free and every slot empty.

        **Arguments:**

        - `num_pages`: how many pages there are, as many as the `Pages` that the tables will be used with.
        - `num_slots`: how many sequences may run at once.
        - `pages_per_seq`: the most pages of one sequence; the width of the tables.
        - `page_size`: tokens per page.

        Raises ``TypeError`` or ``ValueError`` unless all four are positive integers, and a full table has no more
        tokens than int32 can count.
        """
        sizes = {"num_pages": num_pages, "num_slots": num_slots, "pages_per_seq": pages_per_seq, "page_size": page_size}
        for name, value in sizes.items():
            require_positive_int(name, value)
        if pages_per_seq * page_size > np.iinfo(np.int32).max:
            raise ValueError(
                f"pages_per_seq * page_size must fit in int32, in which lengths are counted; got {pages_per_seq} * "
                f"{page_size}."
            )
        return cls(
            ref_counts=jnp.zeros(num_pages, jnp.int32),
            block_tables=jnp.full((num_slots, pages_per_seq), -1, jnp.int32),
            lengths=jnp.zeros(num_slots, jnp.int32),
            page_size=page_size,
        )

    @property
    def num_pages(self) -> int:
        """Pages ``N``, free or not."""
        return self.ref_counts.shape[0]

    @property
    def num_slots(self) -> int:
        """Sequence slots ``S``, empty or not."""
        return self.lengths.shape[0]

    @property
    def pages_per_seq(self) -> int:
        """The most pages that one slot can hold."""
        return self.block_tables.shape[1]

    @property
    def capacity(self) -> int:
        """The most tokens that one slot can hold: ``pages_per_seq * page_size``."""
        return self.pages_per_seq * self.page_size

    @property
    def num_free(self) -> Int[Array, ""]:
        """How many pages are free, i32[]."""
        return jnp.sum(self.ref_counts == 0, dtype=jnp.int32)

    @property
    def pages_in_use(self) -> Int[Array, ""]:
        """How many pages are not free, i32[]."""
        return self.num_pages - self.num_free

    def reserve(self, tokens: Counts) -> tuple["PagePool", Bool[Array, " seqs"]]:
        """Give slots free pages, until each has room for a number of tokens. Lengths stay as they are.

        Slots are served in order. A slot that does not fit does not stop the next one.

        **Arguments:**

        - `tokens`: for how many tokens in all each slot shall have pages. A slot that has them already is ok.

        **Returns:** the new pool, and ``ok`` bool[seqs]. Where too few pages are free, or ``tokens[s]`` is negative or
        above `capacity`, ``ok[s]`` is False and the slot unchanged.

        Raises ``ValueError`` or ``TypeError`` unless ``tokens`` is int[seqs]. What int32 cannot hold is above every
        capacity.

        >>> pool, ok = PagePool.init(4, num_slots=2, pages_per_seq=3, page_size=2).reserve(jnp.array([5, 3]))
        >>> ok.tolist(), pool.block_tables.tolist(), pool.lengths.tolist()
        ([True, False], [[0, 1, 2], [-1, -1, -1]], [0, 0])
        """
        tokens = slot_counts("tokens", tokens, self.num_slots)
        fits = (tokens >= 0) & (tokens <= self.capacity)
        taken = self._entries_taken()
        needed = -(-jnp.where(fits, tokens, 0) // self.page_size)
        ok, first = _serve_in_order(jnp.maximum(needed - taken, 0), fits, self.num_free)
        return self._take(taken, jnp.where(ok, needed, taken), first), ok

    def extend(self, tokens: Counts) -> tuple["PagePool", Bool[Array, " seqs"]]:
        """Add tokens to slots: `reserve` pages for them and, where that is ok, count them in the lengths.

        A step that writes these tokens needs its batch to be made after this, since a batch's lengths count them.

        **Arguments:**

        - `tokens`: how many tokens to add to each slot. 0 is always ok, a negative number never.

        **Returns:** the new pool and ``ok`` bool[seqs], and raises, as `reserve` does.
        """
        tokens = slot_counts("tokens", tokens, self.num_slots)
        # Compared before the addition, which could overflow; -1 is what reserve refuses.
        fits = (tokens >= 0) & (tokens <= self.capacity - self.lengths)
        total = jnp.where(fits, self.lengths + tokens, -1)
        pool, ok = self.reserve(total)
        return pool._replace_lengths(jnp.where(ok, total, self.lengths)), ok

    def release(self, is_released: Flags) -> "PagePool":
        """Empty some slots: their pages have one holder less, and are free without any.

        Their tables become -1, so that nothing leads to a page that the slot no longer holds. Releasing an empty slot
        does nothing.

        **Arguments:**

        - `is_released`: which slots.

        **Returns:** the new pool. Raises ``ValueError`` or ``TypeError`` unless ``is_released`` is bool[seqs].
        """
        is_released = slot_flags("is_released", is_released, self.num_slots)[:, None]
        given_back = jnp.where(is_released & (self.block_tables >= 0), self.block_tables, self.num_pages)
        return PagePool(
            ref_counts=self.ref_counts.at[given_back].add(-1, mode="drop"),
            block_tables=jnp.where(is_released, -1, self.block_tables),
            lengths=jnp.where(is_released[:, 0], 0, self.lengths),
            page_size=self.page_size,
        )

    def trim(self, mask: Mask, values: Mapping[str, Any] | None = None) -> "PagePool":
        """Free the pages that a mask hides from every query still to come.

        A slot's next token has the position ``lengths[s]``. A page that is full is freed where the mask's `coverage` of
        ``[lengths[s], infinity) x page`` is empty: then no query of this slot can see a key of the page any more. So a
        window frees what has left it, a prefix keeps its pages, and a `Where` frees nothing. The slot has one holder's
        claim less on the page, and its table entry becomes -1, which attentions with this mask never read.

        Trim before `extend`, so that the freed pages can be handed out again.

        **Arguments:**

        - `mask`: the mask of every attention that reads these tables: ``spec.visibility``. For several masks, pass
          ``a | b``, which keeps what any of them needs.
        - `values`: the numbers that the mask names by `Value`, one for each slot: as in `RaggedBatch`.

        **Returns:** the new pool. Lengths stay. Batches that bring ``positions`` below a slot's length must be served
        before its pages are trimmed.

        Raises ``ValueError`` for a value that the mask names and ``values`` lacks, or of another shape.

        >>> pool, _ = PagePool.init(4, num_slots=1, pages_per_seq=4, page_size=2).extend(jnp.array([6]))
        >>> pool = pool.trim(paged.Causal() & paged.Window(3))  # position 6 sees tokens 4, 5 and 6
        >>> pool.block_tables.tolist(), int(pool.num_free)
        ([[-1, -1, 2, -1]], 3)
        >>> pool.extend(jnp.array([1]))[0].block_tables.tolist()
        [[-1, -1, 2, 0]]
        """
        kept = kept_pages(mask, self.lengths, self.page_size, self.pages_per_seq, values)
        is_full = jnp.arange(self.pages_per_seq, dtype=jnp.int32)[None] < (self.lengths // self.page_size)[:, None]
        is_freed = is_full & ~kept & (self.block_tables >= 0)
        freed = jnp.where(is_freed, self.block_tables, self.num_pages)
        return PagePool(
            ref_counts=self.ref_counts.at[freed].add(-1, mode="drop"),
            block_tables=jnp.where(is_freed, -1, self.block_tables),
            lengths=self.lengths,
            page_size=self.page_size,
        )

    def ragged_batch(self, query_rows: Counts) -> RaggedBatch:
        """A step in which every slot has some query rows, packed in slot order.

        **Arguments:**

        - `query_rows`: how many rows each slot has, its last tokens. A slot with 0 rows takes no part.

        **Returns:** the batch. A step may have more rows than these: such rows give 0 and write nothing. Raises
        ``ValueError`` or ``TypeError`` unless ``query_rows`` is int32[seqs], and for a list or a NumPy array with a
        negative number.

        >>> pool, _ = PagePool.init(4, num_slots=3, pages_per_seq=2, page_size=2).extend(jnp.array([3, 0, 1]))
        >>> pool.ragged_batch(jnp.array([2, 0, 1])).query_starts.tolist()
        [0, 2, 2, 3]
        """
        if not isinstance(query_rows, jax.Array) and np.any(np.asarray(query_rows) < 0):
            raise ValueError(f"query_rows must not be negative; got {np.asarray(query_rows).tolist()}.")
        query_rows = slot_counts("query_rows", query_rows, self.num_slots)
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(query_rows, dtype=jnp.int32)])
        return RaggedBatch(self.lengths, self.block_tables, starts)

    def decode_batch(self, is_decoding: Flags | None = None) -> RaggedBatch:
        """A step in which row ``s`` is the last token of slot ``s``.

        **Arguments:**

        - `is_decoding`: which slots take part; None for all.

        **Returns:** the batch. Empty slots and slots that take no part have length 0: their rows give 0 and write
        nothing. Raises ``ValueError`` or ``TypeError`` unless ``is_decoding`` is bool[seqs].

        >>> pool, _ = PagePool.init(4, num_slots=3, pages_per_seq=2, page_size=2).extend(jnp.array([3, 0, 1]))
        >>> pool.decode_batch(jnp.array([False, True, True])).lengths.tolist()
        [0, 0, 1]
        """
        lengths = self.lengths
        if is_decoding is not None:
            lengths = jnp.where(slot_flags("is_decoding", is_decoding, self.num_slots), lengths, 0)
        return RaggedBatch.decode(lengths, self.block_tables)

    def prefill_batch(self, slot: Number, query_rows: Number) -> RaggedBatch:
        """A step of one sequence.

        **Arguments:**

        - `slot`: the sequence's slot; may be traced.
        - `query_rows`: how many of its last tokens are rows; may be traced.

        **Returns:** a batch of one slot. A step may have more rows than ``query_rows``: such rows give 0 and write
        nothing, so that one compiled step serves every chunk up to its size. Raises ``TypeError`` or ``ValueError``
        unless both are integers, and for an int that no slot or no row count has.

        >>> pool, _ = PagePool.init(4, num_slots=2, pages_per_seq=2, page_size=2).extend(jnp.array([0, 3]))
        >>> batch = pool.prefill_batch(slot=1, query_rows=2)
        >>> batch.lengths.tolist(), batch.block_tables.tolist(), batch.query_starts.tolist()
        ([3], [[0, 1]], [0, 2])
        """
        slot = index_or_traced("slot", slot, 0, self.num_slots - 1)
        query_rows = index_or_traced("query_rows", query_rows, 0, self.capacity)
        starts = jnp.stack([jnp.zeros((), jnp.int32), jnp.asarray(query_rows, jnp.int32)])
        return RaggedBatch(self.lengths[slot][None], self.block_tables[slot][None], starts)

    def _entries_taken(self) -> Int[Array, " seqs"]:
        """How many table entries of each slot have had their page: for its tokens, trimmed or not, or reserved."""
        entry = jnp.arange(1, self.pages_per_seq + 1, dtype=jnp.int32)[None]
        last = jnp.max(jnp.where(self.block_tables >= 0, entry, 0), axis=1)
        return jnp.maximum(last, -(-self.lengths // self.page_size))

    def _take(self, taken: Array, wanted: Array, first: Array) -> "PagePool":
        """Fill table entries ``taken[s] .. wanted[s] - 1`` with free pages, from number ``first[s]`` of those on."""
        free = jnp.nonzero(self.ref_counts == 0, size=self.num_pages, fill_value=self.num_pages)[0].astype(jnp.int32)
        entry = jnp.arange(self.pages_per_seq, dtype=jnp.int32)[None]
        is_new = (entry >= taken[:, None]) & (entry < wanted[:, None])
        which = jnp.clip(first[:, None] + entry - taken[:, None], 0, self.num_pages - 1)
        new = jnp.where(is_new, free[which], self.num_pages)
        return PagePool(
            ref_counts=self.ref_counts.at[new].add(1, mode="drop"),
            block_tables=jnp.where(is_new, new, self.block_tables),
            lengths=self.lengths,
            page_size=self.page_size,
        )

    def _replace_lengths(self, lengths: Array) -> "PagePool":
        return PagePool(self.ref_counts, self.block_tables, lengths, self.page_size)


def _serve_in_order(
    extra: Int[Array, " seqs"], fits: Bool[Array, " seqs"], num_free: Int[Array, ""]
) -> tuple[Bool[Array, " seqs"], Int[Array, " seqs"]]:
    """Which slots get their ``extra`` pages, and how many pages are handed out before each slot's."""

    def serve(used, request):
        more, may = request
        is_served = may & (more <= num_free - used)
        return used + jnp.where(is_served, more, 0), (is_served, used)

    requests, _, used = vary_alike((extra, fits), num_free, jnp.zeros((), jnp.int32))
    return jax.lax.scan(serve, used, requests)[1]


register_module(jax.eval_shape(lambda: PagePool.init(1, num_slots=1, pages_per_seq=1, page_size=1)), "page_size")
