"""Row blocks: how the query rows of a ragged batch are cut into pieces of one sequence each."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ..program import Sequences, Visits, count_up_to


class RowBlock(NamedTuple):
    """Up to ``rows`` consecutive query rows of one sequence of ``length`` keys.

    Row ``i`` is the batch's row ``row[i]``, at position ``position[i]``. Where ``is_row`` is False the sequence has no
    such row: the batch's row 0 is read instead, and nothing is written. ``visits`` are the pages that the rows see, if
    they have been listed before.
    """

    seq: Int[Array, ""]
    row: Int[Array, " rows"]
    position: Int[Array, " rows"]
    is_row: Bool[Array, " rows"]
    length: Int[Array, ""]
    visits: Visits | None

    @property
    def position_range(self) -> tuple[Any, Any]:
        """The half-open range of the rows' positions."""
        first = self.position[0]
        return first, first + jnp.sum(self.is_row, dtype=jnp.int32)


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
    def of(cls, seqs: Sequences, is_member: Bool[Array, " seqs"], rows: int, tokens: Any) -> "RowBlocks":
        """Cut the query rows of every sequence in ``is_member`` into row blocks of ``rows``.

        ``tokens`` is the number of query rows of all sequences.
        """
        per_seq = jnp.where(is_member, -(-seqs.counts // rows), 0)
        ends = jnp.cumsum(per_seq, dtype=jnp.int32)
        slots = seqs.counts.shape[0]
        most = slots + tokens // rows if rows > 1 else tokens
        seq = jnp.minimum(count_up_to(ends, jnp.arange(most, dtype=jnp.int32)), slots - 1)
        return cls(seq, ends - per_seq, ends[-1])

    def block(self, seqs: Sequences, which: Any, rows: int) -> RowBlock:
        """Row block number ``which``, of at most ``rows`` rows; it has no row if ``which`` is ``count`` or more."""
        seq = self.seq[which]
        offset = (which - self.first[seq]) * rows + jnp.arange(rows, dtype=jnp.int32)
        is_row = (offset < seqs.counts[seq]) & (which < self.count)
        row = jnp.where(is_row, seqs.starts[seq] + offset, 0)
        position = seqs.positions[seq] + offset
        visits = jax.tree.map(lambda x: x[which], self.visits)
        return RowBlock(seq, row, position, is_row, seqs.lengths[seq], visits)
