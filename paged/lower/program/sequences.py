"""A batch made safe to read: every start, count and length clamped, dead slots without rows."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged.spec import RaggedBatch


class Sequences(NamedTuple):
    """The batch's sequences, for reading without a further thought: no value here can lead out of an array.

    ``starts`` and ``counts`` give each slot's query rows, disjoint and in order; ``counts`` is 0 for dead slots.
    ``lengths`` is within the table. Row ``i`` of slot ``s`` has position ``lengths[s] - counts[s] + i``.
    """

    starts: Int[Array, " seqs"]
    counts: Int[Array, " seqs"]
    lengths: Int[Array, " seqs"]
    tables: Int[Array, "seqs pages_per_seq"]

    @classmethod
    def of(cls, batch: RaggedBatch, tokens: int, page_size: int) -> "Sequences":
        """Clamp a batch over ``tokens`` query rows. Faults of the caller end here: nothing later can crash on them."""
        slot = jnp.arange(batch.num_slots + 1, dtype=jnp.int32)
        live = jnp.clip(batch.num_seqs, 0, batch.num_slots)
        # A running maximum makes decreasing starts into empty sequences, so no row ever has two owners.
        bounds = jnp.maximum.accumulate(jnp.clip(batch.query_starts, 0, tokens))
        bounds = jnp.where(slot <= live, bounds, bounds[live])
        lengths = jnp.clip(batch.lengths, 0, batch.pages_per_seq * page_size)
        counts = bounds[1:] - bounds[:-1]
        return cls(bounds[:-1], counts, jnp.where(slot[:-1] < live, lengths, 0), batch.block_tables)

    def owner(self, tokens: int) -> tuple[Int[Array, " tokens"], Bool[Array, " tokens"]]:
        """Each query row's slot, and whether it has one; the slot of a row without is any valid one."""
        row = jnp.arange(tokens, dtype=jnp.int32)
        slot = jnp.searchsorted(self.starts + self.counts, row, side="right")
        slot = jnp.minimum(slot, self.starts.shape[0] - 1)
        is_owned = (row >= self.starts[slot]) & (row < self.starts[slot] + self.counts[slot])
        return slot, is_owned

    def positions(self, tokens: int) -> tuple[Int[Array, " tokens"], Int[Array, " tokens"], Bool[Array, " tokens"]]:
        """Each query row's slot and absolute position, and whether it is a live row with a position in the cache."""
        slot, is_owned = self.owner(tokens)
        position = self.lengths[slot] - self.counts[slot] + jnp.arange(tokens, dtype=jnp.int32) - self.starts[slot]
        return slot, position, is_owned & (position >= 0)
