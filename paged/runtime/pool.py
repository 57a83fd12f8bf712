"""`PagePool`: which pages are free, and which sequence slots hold which; arrays of fixed shapes."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from paged.spec import Mask, register_module, require_positive_int

from ._arguments import Counts, Flags, slot_counts, slot_flags
from ._kept import kept_pages
from ._one_program import one_program
from ._pool_arrays import counted, entries_held, entries_missing, given_rows, given_up
from ._pool_batches import PoolBatches
from ._pool_requests import extend_in_all, release_in_all, reserve_in_all


class PagePool(PoolBatches):
    """Book-keeping of the pages that sequence slots share: integers only, the tokens themselves live in `Pages`.

    * ``ref_counts`` i32[pages]: how many holders each page has: the table entries that name it, the copies that wait
      for it, and whoever else has counted it. A page is free where its count is 0, and only free pages are handed out.
    * ``block_tables`` i32[seqs, pages_per_seq]: the pages of each slot in token order, -1 past them, and in the place
      of pages that `trim` has freed.
    * ``lengths`` i32[seqs]: how many tokens each slot has; 0 for an empty slot.
    * ``copy_from``, ``copy_at`` i32[seqs]: where a slot has got a page of its own in place of a shared one, the shared
      page, and the token at which it begins to write; else -1. The copy is a part of the slot's next step.
    * ``page_size``, static: tokens per page.

    `fork`, `share` and `reorder` give slots the pages of other slots, and copy nothing. A page that several hold is
    never written: `reserve` and `extend` give the slot that is about to write a page of its own, once. The batches that
    the pool makes say which page that step copies before it writes.

    Every operation is a pure function that works on all slots at once and returns a new pool. It is traced once,
    whatever the values: under ``jax.jit`` as a part of the caller's program, elsewhere as one of its own. Running out
    of pages raises nothing: a slot that cannot have all that was asked for stays as it was, and its entry of ``ok`` is
    False, to branch on.

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
    copy_from: Int[Array, " seqs"]
    copy_at: Int[Array, " seqs"]
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
            copy_from=jnp.full(num_slots, -1, jnp.int32),
            copy_at=jnp.full(num_slots, -1, jnp.int32),
            page_size=page_size,
        )

    @property
    def num_pages(self) -> int:
        """Pages ``N``, free or not."""
        return self.ref_counts.shape[0]

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

        Slots are served in order. A slot that does not fit does not stop the next one. A slot that asks for more tokens
        than it has is about to write. If others hold the page in which it would begin, it gets a page of its own there,
        and the shared one is kept until `settle`.

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
        (pool,), ok = reserve_in_all((self,), tokens)
        return pool, ok

    def extend(self, tokens: Counts) -> tuple["PagePool", Bool[Array, " seqs"]]:
        """Add tokens to slots: `reserve` pages for them and, where that is ok, count them in the lengths.

        A step that writes these tokens needs its batch to be made after this, since a batch's lengths count them.

        **Arguments:**

        - `tokens`: how many tokens to add to each slot. 0 is always ok, a negative number never.

        **Returns:** the new pool and ``ok`` bool[seqs], and raises, as `reserve` does.
        """
        (pool,), ok = extend_in_all((self,), tokens)
        return pool, ok

    def release(self, is_released: Flags) -> "PagePool":
        """Empty some slots: their pages have one holder less, and are free without any.

        Their tables become -1, so that nothing leads to a page that the slot no longer holds. Releasing an empty slot
        does nothing.

        **Arguments:**

        - `is_released`: which slots.

        **Returns:** the new pool. Raises ``ValueError`` or ``TypeError`` unless ``is_released`` is bool[seqs].
        """
        is_released = slot_flags("is_released", is_released, self.num_slots)
        return release_in_all((self,), is_released)[0]

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

        Raises ``TypeError`` for what is no mask, and ``ValueError`` for a value that the mask names and ``values``
        lacks, or of another shape.

        >>> pool, _ = PagePool.init(4, num_slots=1, pages_per_seq=4, page_size=2).extend(jnp.array([6]))
        >>> pool = pool.trim(paged.Causal() & paged.Window(3))  # position 6 sees tokens 4, 5 and 6
        >>> pool.block_tables.tolist(), int(pool.num_free)
        ([[-1, -1, 2, -1]], 3)
        >>> pool.extend(jnp.array([1]))[0].block_tables.tolist()
        [[-1, -1, 2, 0]]
        """
        if not isinstance(mask, Mask):
            raise TypeError(f"mask must be a Mask, such as that of a spec, spec.visibility; got {mask!r}.")
        return self._trimmed(mask, None if values is None else dict(values))

    @functools.partial(one_program, static=("mask",))
    def _trimmed(self, mask: Mask, values: dict[str, Any] | None) -> "PagePool":
        kept = kept_pages(mask, self.lengths, self.page_size, self.pages_per_seq, values)
        is_full = jnp.arange(self.pages_per_seq, dtype=jnp.int32)[None] < (self.lengths // self.page_size)[:, None]
        is_freed = is_full & ~kept & (self.block_tables >= 0)
        ((counts, tables),) = given_up(((self.ref_counts, self.block_tables),), jnp.any(is_freed, axis=1), (is_freed,))
        return self._replace(ref_counts=counts, block_tables=tables)

    def fork(self, source: Counts) -> tuple["PagePool", Bool[Array, " seqs"]]:
        """Give empty slots all tokens of other slots, many at once. Nothing is copied: the slots share the pages.

        Whichever slot writes first into a page that several hold gets a page of its own then, see `reserve`.

        **Arguments:**

        - `source`: for each slot the one whose tokens it gets, which may be the source of several; -1 for a slot that
          stays as it is. The steps of the source's tokens must have run before a step of the new slot does.

        **Returns:** the new pool and ``ok`` bool[seqs]: False, and the slot unchanged, for a slot that is not empty,
        and for a number that is no slot. Raises ``ValueError`` or ``TypeError`` unless ``source`` is int[seqs].

        >>> pool, _ = PagePool.init(4, num_slots=2, pages_per_seq=3, page_size=2).extend(jnp.array([3, 0]))
        >>> pool, ok = pool.fork(jnp.array([-1, 0]))
        >>> pool.block_tables.tolist(), pool.ref_counts.tolist()
        ([[0, 1, -1], [0, 1, -1]], [2, 2, 0, 0])
        >>> pool, ok = pool.extend(jnp.array([0, 1]))
        >>> pool.block_tables.tolist(), pool.decode_batch().copy_from.tolist()
        ([[0, 1, -1], [0, 2, -1]], [-1, 1])
        """
        return self._shared(slot_counts("source", source, self.num_slots), None)

    def share(self, source: Counts, tokens: Counts) -> tuple["PagePool", Bool[Array, " seqs"]]:
        """Give empty slots the first tokens of other slots: `fork` of a prefix.

        **Arguments:**

        - `source`: see `fork`.
        - `tokens`: how many of the source's tokens each slot gets, which need not fill a page. Ignored where ``source``
          is -1.

        **Returns:** the new pool and ``ok``, as `fork` does; ``ok`` is False too where the source does not have so many
        tokens, and where it does not have all of their pages, because `trim` has freed some: fewer tokens than the
        source has may need these. Raises as `fork` does.
        """
        source = slot_counts("source", source, self.num_slots)
        return self._shared(source, slot_counts("tokens", tokens, self.num_slots))

    @one_program
    def _shared(
        self, source: Int[Array, " seqs"], tokens: Int[Array, " seqs"] | None
    ) -> tuple["PagePool", Bool[Array, " seqs"]]:
        """`share`, or `fork` where ``tokens`` is None."""
        tokens = self.lengths[jnp.clip(source, 0, self.num_slots - 1)] if tokens is None else tokens
        tables, is_given = self.prefix_of(source, tokens)
        is_given = is_given & self.is_empty
        return self.attach(is_given, tables, tokens), is_given | (source == -1)

    def prefix_of(
        self, source: Int[Array, " some"], tokens: Int[Array, " some"]
    ) -> tuple[Int[Array, "some pages_per_seq"], Bool[Array, " some"]]:
        """The pages of the first tokens of some slots, as `share` gives them to others, and whether it may.

        **Arguments:**

        - `source`, `tokens`: of which slots, and how many; a number that is no slot may not be shared.
        """
        at = jnp.clip(source, 0, self.num_slots - 1)
        tables, length = self.tables_of(at, tokens), self.lengths[at]
        is_whole = entries_missing(tables, tokens, self.page_size) == 0
        return tables, (source == at) & (tokens >= 0) & (tokens <= length) & (is_whole | (tokens == length))

    def reorder(self, parents: Counts) -> tuple["PagePool", Bool[Array, " seqs"]]:
        """Make every slot a continuation of some slot, all at once, as a step of beam search does.

        Slots that no slot continues give up their tokens. Nothing is copied.

        **Arguments:**

        - `parents`: for each slot the one whose tokens it has afterwards: its own number to stay as it is, -1 to be
          empty. The steps of all tokens must have run.

        **Returns:** the new pool and ``ok`` bool[seqs]: False, and the slot unchanged, for a number that is no slot.
        Raises as `fork` does.

        >>> pool, _ = PagePool.init(4, num_slots=2, pages_per_seq=2, page_size=2).extend(jnp.array([3, 1]))
        >>> pool, ok = pool.reorder(jnp.array([1, 1]))
        >>> pool.block_tables.tolist(), pool.lengths.tolist(), int(pool.num_free)
        ([[2, -1], [2, -1]], [1, 1], 3)
        """
        return self._reordered(slot_counts("parents", parents, self.num_slots))

    @one_program
    def _reordered(self, parents: Int[Array, " seqs"]) -> tuple["PagePool", Bool[Array, " seqs"]]:
        ok = (parents >= -1) & (parents < self.num_slots)
        moves = ok & (parents != jnp.arange(self.num_slots, dtype=jnp.int32))
        at = jnp.clip(parents, 0, self.num_slots - 1)
        tokens = jnp.where(parents < 0, 0, self.lengths[at])
        return self.release(moves).attach(moves, self.tables_of(at, tokens), tokens), ok

    @one_program
    def settle(self) -> "PagePool":
        """Let go of the shared pages that steps have copied.

        A page that a slot has written elsewhere is kept, because the step that copies it may not have run yet. Call
        this when the steps of all tokens that are counted in the lengths have run, or been given to the device in
        order. Without it such a page is kept until its slot is released or gets another page of its own.

        **Returns:** the new pool. What no step may have copied yet stays.
        """
        return self._without_copies(self.lengths > self.copy_at)

    def attach(self, is_given: Flags, block_tables: Int[Array, "seqs pages_per_seq"], lengths: Counts) -> "PagePool":
        """Give empty slots pages that others hold, by number: what `share` and a prefix cache do.

        **Arguments:**

        - `is_given`: which slots.
        - `block_tables`: their pages in token order, each of them held by somebody; -1 for a page that is freed, and
          past the pages of ``lengths`` tokens.
        - `lengths`: how many tokens these pages hold for each slot.

        **Returns:** the new pool. Slots that are not empty are overwritten, and their pages never freed. Raises
        ``ValueError`` or ``TypeError`` unless the arguments have one entry for each slot.
        """
        is_given = slot_flags("is_given", is_given, self.num_slots)
        return self._attached(is_given, block_tables, slot_counts("lengths", lengths, self.num_slots))

    @one_program
    def _attached(
        self,
        is_given: Bool[Array, " seqs"],
        block_tables: Int[Array, "seqs pages_per_seq"],
        lengths: Int[Array, " seqs"],
    ) -> "PagePool":
        counts, tables = given_rows((self.ref_counts, self.block_tables), is_given, block_tables)
        return self._replace(ref_counts=counts, block_tables=tables, lengths=jnp.where(is_given, lengths, self.lengths))

    @property
    def is_empty(self) -> Bool[Array, " seqs"]:
        """Which slots have no tokens and no pages."""
        return self.entries == 0

    @property
    def entries(self) -> Int[Array, " seqs"]:
        """How many table entries each slot uses: for its tokens, trimmed or not, and for what is reserved."""
        return jnp.maximum(entries_held(self.block_tables), -(-self.lengths // self.page_size))

    def tables_of(self, at: Int[Array, " seqs"], tokens: Int[Array, " seqs"]) -> Int[Array, "seqs pages_per_seq"]:
        """The pages that hold the first ``tokens`` of the slots ``at``.

        A slot that is about to write has a page of its own, whose content is not there yet: up to the token at which it
        begins, the shared page has it.
        """
        first = jnp.arange(self.pages_per_seq, dtype=jnp.int32)[None] * self.page_size
        copy_from, copy_at = self.copy_from[at][:, None], self.copy_at[at][:, None]
        waits = (copy_from >= 0) & (copy_at // self.page_size == first // self.page_size) & (tokens[:, None] <= copy_at)
        return jnp.where(first < tokens[:, None], jnp.where(waits, copy_from, self.block_tables[at]), -1)

    def _without_copies(self, which: Bool[Array, " seqs"]) -> "PagePool":
        return self._replace(
            ref_counts=counted(self.ref_counts, jnp.where(which, self.copy_from, -1), -1),
            copy_from=jnp.where(which, -1, self.copy_from),
            copy_at=jnp.where(which, -1, self.copy_at),
        )

    def _replace(self, **changes: Array) -> "PagePool":
        return dataclasses.replace(self, **changes)


register_module(jax.eval_shape(lambda: PagePool.init(1, num_slots=1, pages_per_seq=1, page_size=1)), "page_size")
