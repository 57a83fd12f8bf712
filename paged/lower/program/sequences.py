"""A batch made safe to read: every start, count and length clamped, dead slots without rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged.spec import RaggedBatch


class Sequences(NamedTuple):
    """The sequences of a batch, as lowerings read them: no value here can lead out of an array.

    Made once for each call. Slot ``s`` owns the query rows ``starts[s] : starts[s] + counts[s]``; slots' rows are
    disjoint and in order, and ``counts`` is 0 for dead slots. Its first row is at position ``positions[s]``, row ``i``
    at ``positions[s] + i``. Positions follow the caller's lengths, whatever the table holds. ``lengths`` counts the
    keys that exist: those that have an entry in the table. A row at ``lengths[s]`` or beyond has no place to be
    written to.
    """

    starts: Int[Array, " seqs"]
    counts: Int[Array, " seqs"]
    positions: Int[Array, " seqs"]
    lengths: Int[Array, " seqs"]
    tables: Int[Array, "seqs pages_per_seq"]

    @classmethod
    def of(cls, batch: RaggedBatch, tokens: int, page_size: int) -> "Sequences":
        """Clamp a batch over ``tokens`` query rows. Faults of the caller end here: nothing later can crash on them."""
        slot = jnp.arange(batch.num_slots + 1, dtype=jnp.int32)
        live = jnp.clip(batch.num_seqs, 0, batch.num_slots)
        # A running maximum makes decreasing starts into empty sequences, so no row ever has two owners.
        bounds = _running_maximum(jnp.clip(batch.query_starts, 0, tokens))
        bounds = jnp.where(slot <= live, bounds, bounds[live])
        counts = bounds[1:] - bounds[:-1]
        lengths = jnp.where(slot[:-1] < live, jnp.maximum(batch.lengths, 0), 0)
        stored = jnp.minimum(lengths, batch.pages_per_seq * page_size)
        return cls(bounds[:-1], counts, lengths - counts, stored, batch.block_tables)

    def owner(self, tokens: int) -> tuple[Int[Array, " tokens"], Bool[Array, " tokens"]]:
        """Each query row's slot, and whether it has one; the slot of a row without is any valid one."""
        row = jnp.arange(tokens, dtype=jnp.int32)
        slot = count_up_to(self.starts + self.counts, row)
        slot = jnp.minimum(slot, self.starts.shape[0] - 1)
        is_owned = (row >= self.starts[slot]) & (row < self.starts[slot] + self.counts[slot])
        return slot, is_owned

    def rows(self, tokens: int) -> tuple[Int[Array, " tokens"], Int[Array, " tokens"], Bool[Array, " tokens"]]:
        """Each query row's slot and absolute position, and whether a slot owns it and its position is not negative."""
        slot, is_owned = self.owner(tokens)
        position = self.positions[slot] + jnp.arange(tokens, dtype=jnp.int32) - self.starts[slot]
        return slot, position, is_owned & (position >= 0)

    def cut(self, rows: int, most: int) -> "Sequences":
        """Tiles of up to ``rows`` consecutive query rows of one sequence, as if each were a sequence of its own.

        There are ``most`` tiles. Those with rows come first, in the order of their sequences.
        """
        per_seq = (self.counts + rows - 1) // rows
        ends = jnp.cumsum(per_seq, dtype=jnp.int32)
        tile = jnp.arange(most, dtype=jnp.int32)
        seq = jnp.sum(ends[None] <= tile[:, None], axis=1, dtype=jnp.int32)
        is_live, seq = seq < ends.shape[0], jnp.minimum(seq, ends.shape[0] - 1)
        first = (tile - (ends - per_seq)[seq]) * rows
        counts = jnp.where(is_live, jnp.clip(self.counts[seq] - first, 0, rows), 0)
        return Sequences(
            self.starts[seq] + first, counts, self.positions[seq] + first, self.lengths[seq], self.tables[seq]
        )


def count_up_to(ends: Int[Array, " seqs"], x: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """How many of the sorted ``ends`` are ``<= x``. A symbolic number of them has no known depth of bisection."""
    if isinstance(ends.shape[0], int):
        return jnp.searchsorted(ends, x, side="right")
    x = jnp.asarray(x)
    ends = jnp.expand_dims(ends, tuple(range(x.ndim)))
    return jnp.sum(ends <= x[..., None], axis=-1, dtype=jnp.int32)


def _running_maximum(x: Int[Array, " n"]) -> Int[Array, " n"]:
    """The maximum of all entries up to each one."""
    return jnp.maximum.accumulate(x) if isinstance(x.shape[0], int) else jax.lax.cummax(x)
