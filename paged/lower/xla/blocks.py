"""Blocks of query rows: how the rows of a ragged batch are cut into tiles of one sequence each."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ..program import Sequences


class Block(NamedTuple):
    """Up to ``rows`` consecutive query rows of one sequence: rows ``row[i]`` at positions ``position[i]``.

    Rows past the sequence's end are not ``is_row``; they are read as row 0 of the batch, and never written.
    """

    seq: Int[Array, ""]
    row: Int[Array, " rows"]
    position: Int[Array, " rows"]
    is_row: Bool[Array, " rows"]
    length: Int[Array, ""]

    @property
    def position_range(self) -> tuple[Any, Any]:
        """The half-open range of positions of the block's rows."""
        first = self.position[0]
        return first, first + jnp.sum(self.is_row, dtype=jnp.int32)


class Blocks(NamedTuple):
    """The blocks of those sequences that ``is_member`` selects: ``ends`` counts them up, sequence by sequence."""

    seqs: Sequences
    ends: Int[Array, " seqs"]

    @classmethod
    def of(cls, seqs: Sequences, is_member: Bool[Array, " seqs"], rows: int) -> "Blocks":
        """Cut every selected sequence's query rows into blocks of ``rows``."""
        per_seq = jnp.where(is_member, -(-seqs.counts // rows), 0)
        return cls(seqs, jnp.cumsum(per_seq))

    @property
    def count(self) -> Int[Array, ""]:
        """How many blocks there are."""
        return self.ends[-1]

    def block(self, which: Any, rows: int) -> Block:
        """Block number ``which``, of at most ``rows`` rows; without a row if it is ``count`` or more."""
        seqs = self.seqs
        seq = jnp.minimum(jnp.searchsorted(self.ends, which, side="right"), self.ends.shape[0] - 1)
        before = jnp.where(seq > 0, self.ends[jnp.maximum(seq - 1, 0)], 0)
        offset = (which - before) * rows + jnp.arange(rows)
        is_row = (offset < seqs.counts[seq]) & (which < self.count)
        row = jnp.where(is_row, seqs.starts[seq] + offset, 0)
        position = seqs.positions[seq] + offset
        return Block(seq, row, position, is_row, seqs.lengths[seq])
