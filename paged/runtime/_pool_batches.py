"""The batches that a `PagePool` makes: steps of its slots, with the pages that a step copies before it writes."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from paged.spec import RaggedBatch

from ._arguments import Counts, Flags, Number, index_or_traced, integer, slot_counts, slot_flags
from ._one_program import one_program


class PoolBatches(eqx.Module):
    """What a pool's slots bring to a step, see `PagePool`."""

    block_tables: eqx.AbstractVar[Int[Array, "seqs pages_per_seq"]]
    lengths: eqx.AbstractVar[Int[Array, " seqs"]]
    copy_from: eqx.AbstractVar[Int[Array, " seqs"]]
    copy_at: eqx.AbstractVar[Int[Array, " seqs"]]
    page_size: eqx.AbstractVar[int]

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
        return self._ragged(slot_counts("query_rows", query_rows, self.num_slots))

    @one_program
    def _ragged(self, query_rows: Int[Array, " seqs"]) -> RaggedBatch:
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(query_rows, dtype=jnp.int32)])
        return RaggedBatch(self.lengths, self.block_tables, starts, copy_from=self._copies_for(query_rows))

    def decode_batch(self, is_decoding: Flags | None = None, query_rows: int = 1) -> RaggedBatch:
        """A step in which every slot has its last token as a row, or as many of its last tokens as every other slot.

        **Arguments:**

        - `is_decoding`: which slots take part; None for all.
        - `query_rows`: rows of each slot: 1 to decode, more to verify drafts.

        **Returns:** the batch. Empty slots and slots that take no part have length 0: their rows give 0 and write
        nothing. Raises ``ValueError`` or ``TypeError`` unless ``is_decoding`` is bool[seqs] and ``query_rows`` an int.

        >>> pool, _ = PagePool.init(4, num_slots=3, pages_per_seq=2, page_size=2).extend(jnp.array([3, 0, 1]))
        >>> pool.decode_batch(jnp.array([False, True, True])).lengths.tolist()
        [0, 0, 1]
        """
        if is_decoding is not None:
            is_decoding = slot_flags("is_decoding", is_decoding, self.num_slots)
        return self._decoding(is_decoding, integer("query_rows", query_rows, least=0))

    @functools.partial(one_program, static=("query_rows",))
    def _decoding(self, is_decoding: Bool[Array, " seqs"] | None, query_rows: int) -> RaggedBatch:
        lengths = self.lengths if is_decoding is None else jnp.where(is_decoding, self.lengths, 0)
        copy_from = self._copies_for(jnp.where(lengths > 0, query_rows, 0))
        return RaggedBatch.decode(lengths, self.block_tables, query_rows=query_rows, copy_from=copy_from)

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
        return self._prefilling(jnp.asarray(slot, jnp.int32), jnp.asarray(query_rows, jnp.int32))

    @one_program
    def _prefilling(self, slot: Int[Array, ""], rows: Int[Array, ""]) -> RaggedBatch:
        copy_from = self._copies_for(jnp.broadcast_to(rows, self.num_slots))[slot][None]
        starts = jnp.stack([jnp.zeros((), jnp.int32), rows])
        return RaggedBatch(self.lengths[slot][None], self.block_tables[slot][None], starts, copy_from=copy_from)

    def _copies_for(self, query_rows: Int[Array, " seqs"]) -> Int[Array, " seqs"]:
        """The page that each slot's step of its last ``query_rows`` tokens copies first, or -1.

        Only the step that begins where the copy waits for it copies; later ones begin further on.
        """
        first = self.lengths - query_rows
        is_first = (first <= self.copy_at) & (first // self.page_size == self.copy_at // self.page_size)
        return jnp.where(is_first & (query_rows > 0), self.copy_from, -1)
