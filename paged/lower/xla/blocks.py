"""Row blocks: how the query rows of a ragged batch are cut into pieces of one sequence each."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ..program import QueryRows, Sequences, Visits, count_up_to, position_range


class OwnOfBlock(NamedTuple):
    """What the batch brings for the rows of a row block, and where their sequence's rows of this step are.

    * ``number``: which of the sequence's rows in this step each row is.
    * ``start``, ``place``: the batch's row that is the first of these, and the place of its token in the sequence.
    * ``positions``: of all rows of the batch.
    * ``words``: the bits of each row's ancestors, None where no term asks.
    """

    number: Int[Array, " rows"]
    start: Int[Array, ""]
    place: Int[Array, ""]
    positions: Int[Array, " tokens"]
    words: Int[Array, "rows words"] | None

    def number_of(self, place: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """Which of the sequence's rows in this step a key is, by its place; negative before the step's own tokens."""
        return place - self.place


class RowBlock(NamedTuple):
    """Up to ``rows`` consecutive query rows of one sequence of ``length`` keys.

    Row ``i`` is the batch's row ``row[i]``, at position ``position[i]``. The first ``num_rows`` of them are rows of the
    sequence. Where ``is_row`` is False the batch's row 0 is read instead, and nothing is written. ``numbers`` are those
    of the sequence. ``own`` is what the batch brings for the rows, None if nothing. ``visits`` are the pages that the
    rows see, if they have been listed before.
    """

    seq: Int[Array, ""]
    row: Int[Array, " rows"]
    position: Int[Array, " rows"]
    num_rows: Int[Array, ""]
    is_row: Bool[Array, " rows"]
    length: Int[Array, ""]
    numbers: Mapping[str, Any]
    own: OwnOfBlock | None
    visits: Visits | None

    @property
    def query_rows(self) -> QueryRows:
        """The rows, as coverage sees them."""
        if self.own is not None:
            own_range = position_range(self.position, self.is_row)
            return QueryRows(*own_range, self.length, self.numbers, self.own.place)
        first = self.position[0]
        return QueryRows(first, first + self.num_rows, self.length, self.numbers)


class RowBlocks(NamedTuple):
    """The row blocks of some sequences, in the order of these.

    ``count`` is how many there are. Row block ``i`` is of sequence ``seq[i]``, whose row blocks begin with number
    ``first[seq[i]]``. ``seq`` has room for all that the rows of a batch can be cut into. ``visits`` are the pages that
    each of them sees, if they have been listed.
    """

    seq: Int[Array, " row_blocks"]
    first: Int[Array, " seqs"]
    count: Int[Array, ""]
    visits: Visits | None = None

    @classmethod
    def of(
        cls, seqs: Sequences, is_member: Bool[Array, " seqs"], rows: int, tokens: Any, most: Any = None
    ) -> "RowBlocks":
        """Cut the query rows of every sequence in ``is_member`` into row blocks of ``rows``.

        ``tokens`` is the number of query rows of all sequences. There is room for ``most`` row blocks, which is enough
        for any batch if it is not given.
        """
        per_seq = jnp.where(is_member, -(-seqs.counts // rows), 0)
        ends = jnp.cumsum(per_seq, dtype=jnp.int32)
        slots = seqs.counts.shape[0]
        if most is None:
            most = slots + tokens // rows if rows > 1 else tokens
        seq = jnp.minimum(count_up_to(ends, jnp.arange(most, dtype=jnp.int32)), slots - 1)
        return cls(seq, ends - per_seq, ends[-1])

    @classmethod
    def even(cls, slots: int, query_rows: int, rows: int, used: Any = None) -> "RowBlocks":
        """Row blocks of ``rows``, as many of every slot as ``query_rows`` rows make.

        Only the first ``used`` slots have row blocks, if that is given. Otherwise everything is constant.
        """
        per_slot = -(-query_rows // rows)
        slot = np.arange(slots, dtype=np.int32)
        count = jnp.asarray(per_slot * (slots if used is None else used), jnp.int32)
        return cls(jnp.asarray(np.repeat(slot, per_slot)), jnp.asarray(slot * per_slot), count)

    def block(self, seqs: Sequences, which: Any, rows: int) -> RowBlock:
        """Row block number ``which``, of at most ``rows`` rows; it has no row if ``which`` is ``count`` or more."""
        seq = self.seq[which]
        number = jnp.arange(rows, dtype=jnp.int32)
        first = (which - self.first[seq]) * rows
        num_rows = jnp.where(which < self.count, jnp.clip(seqs.counts[seq] - first, 0, rows), 0)
        offset, is_row = first + number, number < num_rows
        row = jnp.where(is_row, seqs.starts[seq] + offset, 0)
        position, own = seqs.positions[seq] + offset, None
        if seqs.own is not None:
            words = None if seqs.own.ancestors is None else seqs.own.ancestors[row]
            own = OwnOfBlock(offset, seqs.starts[seq], seqs.positions[seq], seqs.own.positions, words)
            position = seqs.own.positions[row]
        visits = jax.tree.map(lambda x: x[which], self.visits)
        numbers = seqs.numbers_of(seq)
        return RowBlock(seq, row, position, num_rows, is_row, seqs.lengths[seq], numbers, own, visits)
