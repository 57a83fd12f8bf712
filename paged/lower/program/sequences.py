"""A batch made safe to read: every start, count and length clamped, dead slots without rows."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from paged.spec import LARGEST_INT32, SMALLEST_INT32, RaggedBatch

from .brought import OwnRows, QueryRows


class Sequences(NamedTuple):
    """The sequences of a batch, as lowerings read them: no value here can lead out of an array.

    Made once for each call. Slot ``s`` owns the query rows ``starts[s] : starts[s] + counts[s]``; slots' rows are
    disjoint and in order, and ``counts`` is 0 for dead slots. Its first row is at position ``positions[s]``, row ``i``
    at ``positions[s] + i``. Positions follow the caller's lengths, whatever the table holds. ``lengths`` counts the
    keys that exist: those that have an entry in the table. A row at ``lengths[s]`` or beyond has no place to be
    written to.

    ``numbers`` are those that the batch brings, by name: of each an array [seqs], or a tuple of arrays for a value with
    a size. ``own`` is what the batch brings for its rows, None if it brings neither positions nor ancestors: then a
    row's position is its place, as above.

    ``planned`` is what a lowering has computed from the other fields for one step, see `Lowering.plan`, or None. Other
    sequences have other lists: who replaces a field sets it to None.
    """

    starts: Int[Array, " seqs"]
    counts: Int[Array, " seqs"]
    positions: Int[Array, " seqs"]
    lengths: Int[Array, " seqs"]
    tables: Int[Array, "seqs pages_per_seq"]
    numbers: Mapping[str, Any] = {}
    own: OwnRows | None = None
    planned: Any = None

    @classmethod
    def of(cls, batch: RaggedBatch, tokens: int, page_size: int) -> "Sequences":
        """Clamp a batch over ``tokens`` query rows. Faults of the caller end here: nothing later can crash on them."""
        slot = jnp.arange(batch.num_slots + 1, dtype=jnp.int32)
        live = jnp.clip(batch.num_seqs, 0, batch.num_slots)
        if batch.has_even_starts:
            bounds = _even_bounds(batch.num_slots, batch.query_rows, tokens)
        else:
            # A running maximum makes decreasing starts into empty sequences, so no row ever has two owners. It is one
            # operation: `jnp.maximum.accumulate` is a loop over the sequences.
            bounds = jax.lax.cummax(jnp.clip(batch.query_starts, 0, tokens))
        counts = jnp.where(slot[:-1] < live, bounds[1:] - bounds[:-1], 0)
        lengths = jnp.where(slot[:-1] < live, jnp.maximum(batch.lengths, 0), 0)
        stored = jnp.minimum(lengths, batch.pages_per_seq * page_size)
        first = jnp.asarray(bounds[:-1])
        seqs = cls(first, counts, lengths - counts, stored, batch.block_tables, _numbers(batch))
        if batch.positions is None and batch.ancestors is None:
            return seqs
        positions = seqs.rows(tokens)[1] if batch.positions is None else batch.positions
        return seqs._replace(own=OwnRows(positions, batch.ancestors))

    def owner(self, tokens: int) -> tuple[Int[Array, " tokens"], Bool[Array, " tokens"]]:
        """Each query row's slot, and whether it has one; the slot of a row without is any valid one."""
        row = jnp.arange(tokens, dtype=jnp.int32)
        slot = count_up_to(self.starts + self.counts, row)
        slot = jnp.minimum(slot, self.starts.shape[0] - 1)
        is_owned = (row >= self.starts[slot]) & (row < self.starts[slot] + self.counts[slot])
        return slot, is_owned

    def numbers_of(self, slot: Any) -> dict[str, Any]:
        """The numbers of the sequence in a slot, or of those in several slots, by name."""
        return jax.tree.map(lambda x: x[slot], dict(self.numbers))

    def query_rows(self) -> QueryRows:
        """The rows of every sequence, as coverage sees them."""
        p0, p1, own = self.positions, self.positions + self.counts, None
        if self.own is not None:
            tokens = self.own.positions.shape[0]
            slot, is_owned = self.owner(tokens)
            is_row = is_owned[None] & (slot[None] == jnp.arange(self.starts.shape[0], dtype=jnp.int32)[:, None])
            p0, p1, own = *position_range(self.own.positions[None], is_row), self.positions
        return QueryRows(p0, p1, self.lengths, dict(self.numbers), own)

    def rows(self, tokens: int) -> tuple[Int[Array, " tokens"], Int[Array, " tokens"], Bool[Array, " tokens"]]:
        """Each query row's slot and absolute position, and whether a slot owns it and its position is not negative."""
        slot, is_owned = self.owner(tokens)
        position = self.positions[slot] + jnp.arange(tokens, dtype=jnp.int32) - self.starts[slot]
        return slot, position, is_owned & (position >= 0)


def position_range(positions: Int[Array, "*shape rows"], is_row: Bool[Array, "*shape rows"]) -> tuple[Any, Any]:
    """The half-open range of the positions of some rows; an empty one where there is none."""
    first = jnp.min(jnp.where(is_row, positions, LARGEST_INT32), axis=-1)
    last = jnp.max(jnp.where(is_row, positions, SMALLEST_INT32), axis=-1)
    return jnp.where(first <= last, first, 0), jnp.where(first <= last, jnp.minimum(last, LARGEST_INT32 - 1) + 1, 0)


def _numbers(batch: RaggedBatch) -> dict[str, Any]:
    """A batch's numbers by name. No gradient flows to them."""

    def of_value(x: Array) -> Any:
        x = jax.lax.stop_gradient(x)
        return x if x.ndim == 1 else tuple(x[:, i] for i in range(x.shape[1]))

    return {name: of_value(x) for name, x in batch.values.items()}


def count_up_to(ends: Int[Array, " seqs"], x: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """How many of the sorted ``ends`` are ``<= x``.

    Every pair is compared, in one pass. A bisection is a loop of gathers, which on a TPU takes 400 times as long.
    """
    x = jnp.asarray(x)
    ends = jnp.expand_dims(ends, tuple(range(x.ndim)))
    return jnp.sum(ends <= x[..., None], axis=-1, dtype=jnp.int32)


def _even_bounds(slots: Any, rows: Any, tokens: Any) -> Any:
    """Where the rows of each slot begin, ``rows`` to each, and where the last ones end; a constant if sizes are."""
    if isinstance(slots, int) and isinstance(tokens, int):
        return np.minimum(np.arange(slots + 1, dtype=np.int64) * rows, tokens).astype(np.int32)
    return jnp.minimum(jnp.arange(slots + 1, dtype=jnp.int32) * rows, tokens)
