"""`RaggedBatch`: which sequences a step works on, where their tokens live, and which query rows are theirs."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from .masks import Mask


class RaggedBatch(eqx.Module):
    """The integers of one step over ``S`` sequence slots; rows of all sequences lie packed, one after the other.

    * ``lengths`` i32[S]: KV tokens of each sequence *after* this step's own tokens are written.
    * ``block_tables`` i32[S, pages_per_seq]: token ``j`` of sequence ``s`` is slot ``j % P`` of page
      ``block_tables[s, j // P]``. Entries that no visible token needs may hold anything.
    * ``query_starts`` i32[S + 1]: sequence ``s`` owns query rows ``query_starts[s] : query_starts[s + 1]``.
      Row ``i`` of a sequence with ``n`` rows has position ``lengths[s] - n + i``.
    * ``num_seqs`` i32[]: the first ``num_seqs`` slots are live; the others are never read.
    * ``query_rows``, static: the number of rows that *every* slot has, where that is known (1 for decode), else None.
    * ``checked_for``, static: the page size, pages, query rows and mask that `paged.check` has found the values
      sound for, else None.

    `stack` gives the batches of several shards of sequences as one, each array with a leading axis of shards.

    Raises ``ValueError`` or ``TypeError`` for a wrong rank, shape or dtype. What only the values show is the
    business of `paged.check`.

    >>> batch = RaggedBatch.decode(lengths=[5, 9], block_tables=[[3, 0], [1, 2]])
    >>> batch.num_slots, batch.pages_per_seq, batch.query_starts.tolist()
    (2, 2, [0, 1, 2])
    """

    lengths: Int[Array, " seqs"]
    block_tables: Int[Array, "seqs pages_per_seq"]
    query_starts: Int[Array, " seqs_plus_1"]
    num_seqs: Int[Array, ""]
    query_rows: int | None = eqx.field(static=True)
    checked_for: tuple[int, int, int, Mask] | None = eqx.field(static=True)

    def __init__(
        self,
        lengths: Any,
        block_tables: Any,
        query_starts: Any,
        num_seqs: Any = None,
        *,
        query_rows: int | None = None,
        checked_for: tuple[int, int, int, Mask] | None = None,
    ):
        self.lengths = _as_int32("lengths", lengths, 1)
        self.block_tables = _as_int32("block_tables", block_tables, 2)
        self.query_starts = _as_int32("query_starts", query_starts, 1)
        slots = self.lengths.shape[0]
        self.num_seqs = _as_int32("num_seqs", slots if num_seqs is None else num_seqs, 0)
        _require_known_num_seqs(num_seqs, slots)
        self.query_rows = query_rows
        self.checked_for = checked_for
        if self.block_tables.shape[0] != slots or self.block_tables.shape[1] < 1:
            raise ValueError(
                f"block_tables must be [seqs, pages_per_seq] = [{slots}, at least 1] (seqs from lengths); got "
                f"{self.block_tables.shape}."
            )
        if self.query_starts.shape[0] != slots + 1:
            raise ValueError(
                f"query_starts must be [seqs + 1] = [{slots + 1}] (seqs from lengths); got {self.query_starts.shape}."
            )

    @classmethod
    def decode(cls, lengths: Any, block_tables: Any, num_seqs: Any = None, *, query_rows: int = 1) -> "RaggedBatch":
        """A step in which every slot has ``query_rows`` rows: 1, or more to score drafted tokens."""
        slots = np.shape(lengths)[0] if np.ndim(lengths) == 1 else 0
        starts = np.arange(slots + 1, dtype=np.int32) * query_rows
        return cls(lengths, block_tables, starts, num_seqs, query_rows=query_rows)

    @classmethod
    def prefill(cls, length: Any, block_table: Any, query_rows: int) -> "RaggedBatch":
        """One sequence's chunk: the last ``query_rows`` of its ``length`` tokens; ``block_table`` is i32[pages]."""
        table = _as_int32("block_table", block_table, 1)
        return cls(jnp.reshape(jnp.asarray(length), (1,)), table[None], [0, query_rows], query_rows=query_rows)

    @classmethod
    def stack(cls, batches: "Sequence[RaggedBatch]") -> "RaggedBatch":
        """Batches of one shape, one for each shard of the sequences on a mesh, in arrays with a new leading axis.

        Only attentions lowered with ``axes=Axes(sequences=...)`` take such a batch, and ``jax.vmap`` over its arrays.
        Raises ``ValueError`` for batches that differ in slots or in the width of tables: pad them, with ``num_seqs``.

        >>> RaggedBatch.stack([RaggedBatch.decode([5], [[3]]), RaggedBatch.decode([9], [[2]])]).lengths.tolist()
        [[5], [9]]
        """
        shapes = [batch.block_tables.shape for batch in batches]
        if len(set(shapes)) != 1 or len(shapes[0]) != 2:
            raise ValueError(f"stack needs batches with block_tables of one shape [seqs, pages_per_seq]; got {shapes}.")
        rows, checked = ({getattr(b, name) for b in batches} for name in ("query_rows", "checked_for"))
        facts = {
            "query_rows": rows.pop() if len(rows) == 1 else None,
            "checked_for": checked.pop() if len(checked) == 1 else None,
        }
        same = [cls(b.lengths, b.block_tables, b.query_starts, b.num_seqs, **facts) for b in batches]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *same)

    def has_rows(self, tokens: int) -> bool:
        """Whether a step of ``tokens`` query rows may have a row that belongs to a sequence, as far as shapes tell."""
        return tokens > 0 and self.num_slots > 0

    @property
    def num_slots(self) -> int:
        """Sequence slots ``S``, live or not."""
        return self.lengths.shape[-1]

    @property
    def pages_per_seq(self) -> int:
        """Width of the block tables."""
        return self.block_tables.shape[-1]


def _require_known_num_seqs(num_seqs: Any, slots: int) -> None:
    """A number that is known when the batch is built. The values of JAX arrays are for `paged.check`."""
    if num_seqs is None or isinstance(num_seqs, jax.Array | jax.ShapeDtypeStruct):
        return
    live = int(np.asarray(num_seqs).reshape(()))
    if not 0 <= live <= slots:
        raise ValueError(
            f"num_seqs must be in [0, {slots}], because lengths has {slots} sequence slots and the first num_seqs of "
            f"them are live; got {live}."
        )


def _as_int32(name: str, value: Any, rank: int) -> Any:
    if not isinstance(value, jax.Array | jax.ShapeDtypeStruct):
        is_typed = hasattr(value, "dtype")
        value = np.asarray(value)
        if not value.size and not is_typed:
            value = value.astype(np.int32)  # an empty list says nothing of its dtype
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name} must be int32; got {value.dtype.name}.")
    if name == "num_seqs" and value.shape == (1,) and not isinstance(value, jax.ShapeDtypeStruct):
        value = value.reshape(())  # the field passes it either way
    if value.ndim != rank:
        raise ValueError(f"{name} must have {rank} dimension(s); got shape {tuple(value.shape)}.")
    is_done = isinstance(value, jax.ShapeDtypeStruct) or (isinstance(value, jax.Array) and value.dtype == jnp.int32)
    return value if is_done else jnp.asarray(value, jnp.int32)
