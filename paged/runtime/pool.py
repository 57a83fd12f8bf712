"""`PagePool`: which pages are free, and which sequence slot holds which; pure state of fixed shapes."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from paged.spec import RaggedBatch, register_module


class PagePool(eqx.Module):
    """The book-keeping of ``N`` pages shared by ``S`` sequence slots. It holds integers only; tokens live in `Pages`.

    * ``ref_counts`` i32[N]: users of each page, 0 for a free one. They alone say what is free.
    * ``block_tables`` i32[S, pages_per_seq]: the pages of each slot in token order, -1 past them.
    * ``lengths`` i32[S]: tokens of each slot; 0 for an empty one.
    * ``page_size``, static: tokens in a page.

    Every operation is a pure function that works on all slots at once, traces once under ``jax.jit`` and returns a new
    pool. Running out of pages is a result to branch on: a slot that cannot be served fully is left exactly as it was,
    and its ``ok`` is False. A page is handed out only while its count is 0, so no two slots ever write to one.

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

        Raises ``TypeError`` or ``ValueError`` unless all four are positive integers and a full table's tokens can be
        counted in int32.
        """
        sizes = {"num_pages": num_pages, "num_slots": num_slots, "pages_per_seq": pages_per_seq, "page_size": page_size}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a Python int; got {value!r}.")
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
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
        """How many pages are not free, i32[]; a page with several users counts once."""
        return self.num_pages - self.num_free

    def reserve(self, tokens: Int[Array, " seqs"]) -> tuple["PagePool", Bool[Array, " seqs"]]:
        """Make sure that each slot has pages for at least ``tokens[s]`` tokens in all; lengths stay as they are.

        Slots are served in order, each fully or not at all; one that does not fit does not stop the next.
        ``ok[s]`` is False, and the slot unchanged, where too few pages are free, and where ``tokens[s]`` is negative or
        more than `capacity`. Asking for what a slot already has costs nothing and is always ok.
        Raises ``ValueError`` or ``TypeError`` unless ``tokens`` is int32[seqs].
        """
        tokens = self._per_slot("tokens", tokens, jnp.integer)
        fits = (tokens >= 0) & (tokens <= self.capacity)
        held = jnp.sum(self.block_tables >= 0, axis=1, dtype=jnp.int32)
        needed = -(-jnp.where(fits, tokens, 0) // self.page_size)
        ok, first = _serve_in_order(jnp.maximum(needed - held, 0), fits, self.num_free)
        return self._take(held, jnp.where(ok, needed, held), first), ok

    def extend(self, tokens: Int[Array, " seqs"]) -> tuple["PagePool", Bool[Array, " seqs"]]:
        """`reserve` room for ``tokens[s]`` more tokens in each slot and, where that is ok, add them to its length.

        The new lengths are what a batch wants: they count the tokens that this step is about to write. Zero tokens are
        always ok; a negative number never is.
        """
        tokens = self._per_slot("tokens", tokens, jnp.integer)
        # Compared before the addition, which could overflow; -1 is what reserve refuses.
        fits = (tokens >= 0) & (tokens <= self.capacity - self.lengths)
        total = jnp.where(fits, self.lengths + tokens, -1)
        pool, ok = self.reserve(total)
        return pool._replace_lengths(jnp.where(ok, total, self.lengths)), ok

    def release(self, is_released: Bool[Array, " seqs"]) -> "PagePool":
        """Give back the pages of the slots where ``is_released``: each loses one user and is free without any.

        Those slots become empty, their tables all -1, so that nothing points to a page that it does not hold, and
        releasing them again does nothing. Raises ``ValueError`` or ``TypeError`` unless ``is_released`` is bool[seqs].
        """
        is_released = self._per_slot("is_released", is_released, jnp.bool_)[:, None]
        given_back = jnp.where(is_released & (self.block_tables >= 0), self.block_tables, self.num_pages)
        return PagePool(
            ref_counts=self.ref_counts.at[given_back].add(-1, mode="drop"),
            block_tables=jnp.where(is_released, -1, self.block_tables),
            lengths=jnp.where(is_released[:, 0], 0, self.lengths),
            page_size=self.page_size,
        )

    def ragged_batch(self, query_rows: Int[Array, " seqs"]) -> RaggedBatch:
        """A step in which slot ``s`` has the last ``query_rows[s]`` of its tokens as rows, packed in slot order.

        Slots with 0 rows take no part. Rows of the step past the last slot's are padding: they are 0 and write nothing.

        >>> pool, _ = PagePool.init(4, num_slots=3, pages_per_seq=2, page_size=2).extend(jnp.array([3, 0, 1]))
        >>> pool.ragged_batch(jnp.array([2, 0, 1])).query_starts.tolist()
        [0, 2, 2, 3]
        """
        query_rows = self._per_slot("query_rows", query_rows, jnp.integer)
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(query_rows, dtype=jnp.int32)])
        return RaggedBatch(self.lengths, self.block_tables, starts)

    def decode_batch(self, is_decoding: Bool[Array, " seqs"] | None = None) -> RaggedBatch:
        """A step with one row for every slot, its last token. Row ``s`` is slot ``s``, so live slots may lie anywhere.

        Empty slots, and those not ``is_decoding``, get length 0: their rows are 0 and write nothing.

        >>> pool, _ = PagePool.init(4, num_slots=3, pages_per_seq=2, page_size=2).extend(jnp.array([3, 0, 1]))
        >>> pool.decode_batch(jnp.array([False, True, True])).lengths.tolist()
        [0, 0, 1]
        """
        lengths = self.lengths
        if is_decoding is not None:
            lengths = jnp.where(self._per_slot("is_decoding", is_decoding, jnp.bool_), lengths, 0)
        return RaggedBatch.decode(lengths, self.block_tables)

    def prefill_batch(self, slot: Int[Array, ""] | int, query_rows: Int[Array, ""] | int) -> RaggedBatch:
        """A step of one sequence: the last ``query_rows`` tokens of ``slot``, which may both be traced.

        Rows of the step past ``query_rows`` are padding, so one compiled step takes every chunk up to its size.

        >>> pool, _ = PagePool.init(4, num_slots=2, pages_per_seq=2, page_size=2).extend(jnp.array([0, 3]))
        >>> batch = pool.prefill_batch(slot=1, query_rows=2)
        >>> batch.lengths.tolist(), batch.block_tables.tolist(), batch.query_starts.tolist()
        ([3], [[0, 1]], [0, 2])
        """
        starts = jnp.stack([jnp.zeros((), jnp.int32), jnp.asarray(query_rows, jnp.int32)])
        return RaggedBatch(self.lengths[slot][None], self.block_tables[slot][None], starts)

    def _take(self, held: Array, wanted: Array, first: Array) -> "PagePool":
        """Fill table entries ``held[s] .. wanted[s] - 1`` with free pages, from number ``first[s]`` of them onward."""
        free = jnp.nonzero(self.ref_counts == 0, size=self.num_pages, fill_value=self.num_pages)[0].astype(jnp.int32)
        entry = jnp.arange(self.pages_per_seq)
        is_new = (entry >= held[:, None]) & (entry < wanted[:, None])
        which = jnp.clip(first[:, None] + entry - held[:, None], 0, self.num_pages - 1)
        taken = jnp.where(is_new, free[which], self.num_pages)
        return PagePool(
            ref_counts=self.ref_counts.at[taken].add(1, mode="drop"),
            block_tables=jnp.where(is_new, taken, self.block_tables),
            lengths=self.lengths,
            page_size=self.page_size,
        )

    def _replace_lengths(self, lengths: Array) -> "PagePool":
        return PagePool(self.ref_counts, self.block_tables, lengths, self.page_size)

    def _per_slot(self, name: str, value: Any, kind: Any) -> Array:
        """The argument as an array with one entry a slot. A wider one would be cut silently by a scatter."""
        value = jnp.asarray(value)
        if value.shape != (self.num_slots,):
            raise ValueError(f"{name} must be [seqs] = [{self.num_slots}], one for each slot; got {value.shape}.")
        if not jnp.issubdtype(value.dtype, kind):
            wanted = "bool" if kind is jnp.bool_ else "int32"
            raise TypeError(f"{name} must be {wanted}; got {value.dtype.name}.")
        return value if kind is jnp.bool_ else value.astype(jnp.int32)


def _serve_in_order(
    extra: Int[Array, " seqs"], fits: Bool[Array, " seqs"], num_free: Int[Array, ""]
) -> tuple[Bool[Array, " seqs"], Int[Array, " seqs"]]:
    """Which slots get their ``extra`` pages, in slot order, and the number of pages handed out before each."""

    def serve(used, request):
        more, may = request
        is_served = may & (more <= num_free - used)
        return used + jnp.where(is_served, more, 0), (is_served, used)

    return jax.lax.scan(serve, jnp.zeros((), jnp.int32), (extra, fits))[1]


_INTEGERS: Any = jax.ShapeDtypeStruct((1,), jnp.int32)
register_module(PagePool(_INTEGERS, _INTEGERS, _INTEGERS, page_size=1), "page_size")
