"""`RaggedBatch`: the sequences of one step, where their tokens are stored, and which query rows belong to them."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from .masks import Mask


class RaggedBatch(eqx.Module):
    """The integers of one step. A batch has ``S`` sequence slots, and each slot holds one sequence or none.

    The query rows of all sequences lie packed, one sequence after the other. A slot is a sequence's place in the batch;
    an offset is a token's place in its page.

    **Arguments:**

    - `lengths` i32[S]: tokens of each sequence *after* this step's own tokens are written.
    - `block_tables` i32[S, pages_per_seq]: where tokens are stored. Token ``j`` of the sequence in slot ``s`` is at
      offset ``j % P`` of page ``block_tables[s, j // P]``, where ``P`` is the page size. Entries that no visible token
      needs may hold anything.
    - `query_starts` i32[S + 1]: slot ``s`` owns the query rows ``query_starts[s] : query_starts[s + 1]``. Row ``i`` of
      ``n`` is at position ``lengths[s] - n + i``.
    - `num_seqs` i32[]: the first ``num_seqs`` slots are live, by default all. Values of the others are never used.
    - `query_rows`, static: the number of rows that *every* slot has, where that is known (1 for decode), else None.
    - `checked_for`, static: the page size, the number of pages, the number of query rows and the mask for which
      `paged.check` has found the values right, else None.

    A batch may have no slots, and a step no rows: its results have no rows then.

    **Raises:** ``ValueError`` or ``TypeError`` for a wrong rank, shape or dtype, and for a ``num_seqs`` outside
    ``[0, S]`` that is known when the batch is built. `paged.check` finds the other values that cannot be right.

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
        """A step in which every slot has the same number of query rows.

        **Arguments:**

        - `lengths`, `block_tables`, `num_seqs`: as in `RaggedBatch`.
        - `query_rows`: rows per slot: 1 to decode, more to score drafted tokens.

        >>> RaggedBatch.decode(lengths=[5, 9], block_tables=[[3], [1]], query_rows=2).query_starts.tolist()
        [0, 2, 4]
        """
        slots = np.shape(lengths)[0] if np.ndim(lengths) == 1 else 0
        starts = np.arange(slots + 1, dtype=np.int32) * query_rows
        return cls(lengths, block_tables, starts, num_seqs, query_rows=query_rows)

    @classmethod
    def prefill(cls, length: Any, block_table: Any, query_rows: int) -> "RaggedBatch":
        """A step of one sequence: a prompt, or a chunk of it.

        **Arguments:**

        - `length`: tokens of the sequence, those of this step included.
        - `block_table` i32[pages_per_seq]: the sequence's pages.
        - `query_rows`: rows of this step: the last tokens of the sequence.

        >>> RaggedBatch.prefill(length=6, block_table=[4, 2], query_rows=3).lengths.tolist()
        [6]
        """
        table = _as_int32("block_table", block_table, 1)
        return cls(jnp.reshape(jnp.asarray(length), (1,)), table[None], [0, query_rows], query_rows=query_rows)

    @classmethod
    def stack(cls, batches: "Sequence[RaggedBatch]") -> "RaggedBatch":
        """Put the batches of several shards of sequences into one, whose arrays have a leading axis of shards.

        An attention that was lowered with ``axes=Axes(sequences=...)`` accepts such a batch, and so does ``jax.vmap``.

        **Arguments:**

        - `batches`: one batch for each shard, all with as many slots and tables as wide. Pad the smaller ones, and set
          their ``num_seqs``.

        **Raises:** ``ValueError`` for batches of different shapes.

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
        """Whether this batch and a step of ``tokens`` query rows have room for a row of a sequence, by their shapes."""
        return tokens > 0 and self.num_slots > 0

    @property
    def num_slots(self) -> int:
        """The number of sequence slots ``S``, live or not."""
        return self.lengths.shape[-1]

    @property
    def pages_per_seq(self) -> int:
        """Entries in the block table of one sequence: the most pages that a sequence may have."""
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
        value = value.reshape(())  # callers of other libraries pass [1]
    if value.ndim != rank:
        raise ValueError(f"{name} must have {rank} dimension(s); got shape {tuple(value.shape)}.")
    is_done = isinstance(value, jax.ShapeDtypeStruct) or (isinstance(value, jax.Array) and value.dtype == jnp.int32)
    return value if is_done else jnp.asarray(value, jnp.int32)
