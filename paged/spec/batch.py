"""`RaggedBatch`: the sequences of one step, where their tokens are stored, and which query rows belong to them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from .given import Minimum
from .mask import Mask
from .numbers import LARGEST_INT32, is_integer, within_int32


class CheckedFor(NamedTuple):
    """Facts for which `paged.check` has found the values of a batch right.

    * ``page_size``, ``num_pages``, ``tokens``: tokens per page, pages of the pool, and query rows of the step.
    * ``mask``: the mask in normal form.
    * ``minima``: what the batch's numbers are not less than.
    """

    page_size: int
    num_pages: int
    tokens: int
    mask: Mask
    minima: tuple[Minimum, ...]


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
    - `values`: numbers of each sequence that the spec names by `Value`: a dict from names to i32[S] or f32[S], or
      [S, size] for a value with a size. A whole number below the least that its term allows counts as the least.
    - `positions` i32[tokens]: the position of each query row, for masks, scores and rotary embeddings; None for
      ``lengths[s] - n + i``. Where rows are stored does not change: row ``i`` is still the sequence's token
      ``lengths[s] - n + i``. As a key, a token of this step has its row's position. Tokens before it have their place
      in the sequence as position.
    - `ancestors` i32[tokens, words]: for a mask with a `Tree`, which rows of its own sequence a row descends from. Row
      ``i`` of the sequence has bit ``i % 32`` of word ``i // 32``. A row sees itself, whatever its bits. Given as
      [tokens] where 32 rows suffice; uint32 is read as bits. None where rows follow one another, as in a prompt: each
      descends from all before it.
    - `copy_from` i32[S]: the page whose content a sequence's first written page must have before this step's write, as
      a writer of a shared page needs it. The page that is written is the table's entry for the first new token. -1, or
      any number that is no page, for none; None where no sequence has one. A write copies such pages first, in place.
    - `query_rows`, static: the number of rows that *every* slot has, where that is known (1 for decode), else None.
      Lowerings rely on it: it must agree with ``query_starts``.
    - `has_even_starts`, static: whether ``query_starts`` are known to be the multiples of ``query_rows``. `decode` and
      `prefill` say so. Lowerings then read no starts, so that none are computed from them.
    - `checked_for`, static: for what `paged.check` has found the values right, else None.

    A batch may have no slots, and a step no rows: its results have no rows then.

    Arrays may be lists, NumPy arrays and JAX arrays of any integer dtype. A number outside of int32 becomes the nearest
    int32, and never wraps: a table entry such as ``2**32 + 1``, or int64's least number, is no page of any pool then. A
    length becomes ``2**31 - 1``, which is past any table.

    **Raises:** ``ValueError`` or ``TypeError`` for a wrong rank, shape or dtype. Where values are known when the batch
    is built (lists and NumPy arrays), ``ValueError`` also for a ``num_seqs`` outside ``[0, S]``, and for a length of a
    live slot above ``2**31 - 1``. `paged.check` finds the other values that cannot be right.

    >>> batch = RaggedBatch.decode(lengths=[5, 9], block_tables=[[3, 0], [1, 2]])
    >>> batch.num_slots, batch.pages_per_seq, batch.query_starts.tolist()
    (2, 2, [0, 1, 2])
    """

    lengths: Int[Array, " seqs"]
    block_tables: Int[Array, "seqs pages_per_seq"]
    query_starts: Int[Array, " seqs_plus_1"]
    num_seqs: Int[Array, ""]
    values: dict[str, Array]
    positions: Int[Array, " tokens"] | None
    ancestors: Int[Array, "tokens words"] | None
    copy_from: Int[Array, " seqs"] | None
    query_rows: int | None = eqx.field(static=True)
    checked_for: CheckedFor | None = eqx.field(static=True)
    has_even_starts: bool = eqx.field(static=True)

    def __init__(
        self,
        lengths: Any,
        block_tables: Any,
        query_starts: Any,
        num_seqs: Any = None,
        *,
        query_rows: int | np.integer | None = None,
        checked_for: CheckedFor | None = None,
        has_even_starts: bool = False,
        values: Mapping[str, Any] | None = None,
        positions: Any = None,
        ancestors: Any = None,
        copy_from: Any = None,
    ):
        self.lengths = _as_int32("lengths", lengths, 1)
        self.block_tables = _as_int32("block_tables", block_tables, 2)
        self.query_starts = _as_int32("query_starts", query_starts, 1)
        slots = self.lengths.shape[0]
        if num_seqs is None:  # all; `jax.export` may have a symbolic number of slots
            num_seqs = slots if isinstance(slots, int) else jnp.asarray(slots, jnp.int32)
        self.num_seqs = _as_int32("num_seqs", num_seqs, 0)
        live = _known_num_seqs(num_seqs)
        if live is not None and not 0 <= live <= slots:
            raise ValueError(
                f"num_seqs must be in [0, {slots}], because lengths has {slots} sequence slots and the first num_seqs "
                f"of them are live; got {live}."
            )
        _require_known_lengths(lengths, live)
        self.query_rows = query_rows if query_rows is None else _as_rows(query_rows)
        self.checked_for = checked_for
        self.has_even_starts = has_even_starts
        self.values = {name: _as_numbers(name, x, slots) for name, x in (values or {}).items()}
        self.positions = None if positions is None else _as_int32("positions", positions, 1)
        self.ancestors = None if ancestors is None else _as_words(ancestors)
        self.copy_from = None if copy_from is None else _as_int32("copy_from", copy_from, 1)
        if has_even_starts and query_rows is None:
            raise ValueError("has_even_starts needs query_rows, whose multiples the starts are; got query_rows=None.")
        if self.block_tables.shape[0] != slots or self.block_tables.shape[1] < 1:
            raise ValueError(
                f"block_tables must be [seqs, pages_per_seq] = [{slots}, at least 1] (seqs from lengths); got "
                f"{self.block_tables.shape}."
            )
        if self.query_starts.shape[0] != slots + 1:
            raise ValueError(
                f"query_starts must be [seqs + 1] = [{slots + 1}] (seqs from lengths); got {self.query_starts.shape}."
            )
        if self.copy_from is not None and self.copy_from.shape[0] != slots:
            raise ValueError(
                f"copy_from must be [seqs] = [{slots}] (seqs from lengths); got {tuple(self.copy_from.shape)}."
            )

    @classmethod
    def decode(
        cls,
        lengths: Any,
        block_tables: Any,
        num_seqs: Any = None,
        *,
        query_rows: int | np.integer = 1,
        values: Mapping[str, Any] | None = None,
        positions: Any = None,
        ancestors: Any = None,
        copy_from: Any = None,
    ) -> "RaggedBatch":
        """A step in which every slot has the same number of query rows.

        **Arguments:**

        - `lengths`, `block_tables`, `num_seqs`, `values`, `positions`, `ancestors`, `copy_from`: as in `RaggedBatch`.
        - `query_rows`: rows per slot: 1 to decode, more to score drafted tokens.

        >>> RaggedBatch.decode(lengths=[5, 9], block_tables=[[3], [1]], query_rows=2).query_starts.tolist()
        [0, 2, 4]
        """
        if not isinstance(lengths, jax.Array | jax.ShapeDtypeStruct):
            lengths = _as_numpy("lengths", lengths)
        slots, rows = lengths.shape[0] if lengths.ndim == 1 else 0, _as_rows(query_rows)
        is_known = isinstance(slots, int)  # `jax.export` may have a symbolic number of slots
        starts = (
            np.arange(slots + 1, dtype=np.int64) * rows if is_known else jnp.arange(slots + 1, dtype=jnp.int32) * rows
        )
        brought: dict[str, Any] = {"values": values, "positions": positions, "ancestors": ancestors}
        brought |= {"copy_from": copy_from, "query_rows": rows, "has_even_starts": True}
        return cls(lengths, block_tables, starts, num_seqs, **brought)

    @classmethod
    def prefill(
        cls,
        length: Any,
        block_table: Any,
        query_rows: int | np.integer,
        *,
        values: Mapping[str, Any] | None = None,
        positions: Any = None,
    ) -> "RaggedBatch":
        """A step of one sequence: a prompt, or a chunk of it.

        **Arguments:**

        - `length`: tokens of the sequence, those of this step included.
        - `block_table` i32[pages_per_seq]: the sequence's pages.
        - `query_rows`: rows of this step: the last tokens of the sequence.
        - `values`, `positions`: as in `RaggedBatch`; a value is one number, or a row of them, and not an array of one.

        >>> RaggedBatch.prefill(length=6, block_table=[4, 2], query_rows=3).lengths.tolist()
        [6]
        """
        length = length if isinstance(length, jax.Array) else _as_numpy("length", length)
        if length.size != 1:
            raise ValueError(f"length must be one number; got shape {tuple(length.shape)}.")
        table, rows = _as_int32("block_table", block_table, 1), _as_rows(query_rows)
        numbers = {name: x[None] if isinstance(x, jax.Array) else [x] for name, x in (values or {}).items()}
        facts: dict[str, Any] = {"query_rows": rows, "has_even_starts": True, "positions": positions}
        return cls(length.reshape(1), table[None], [0, rows], values=numbers, **facts)

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
        facts: dict[str, Any] = {
            "query_rows": rows.pop() if len(rows) == 1 else None,
            "checked_for": checked.pop() if len(checked) == 1 else None,
        }
        facts["has_even_starts"] = facts["query_rows"] is not None and all(b.has_even_starts for b in batches)
        same = [dataclasses.replace(b, **facts) for b in batches]
        structures = {jax.tree.structure(b) for b in same}
        if len(structures) > 1:
            raise ValueError("stack needs batches that bring the same values, and all other arrays alike.")
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *same)

    def for_layer(self, layer: Any, num_pages: Any, num_layers: int, devices: int = 1) -> "RaggedBatch":
        """This batch for one of several layers whose pages lie in one pool, one layer after the other.

        Page ``p`` of layer ``i`` is page ``i * num_pages + p`` of the pool. So a model whose layers run in a
        ``jax.lax.scan`` carries one pool and shifts the block tables. Nothing is copied, where pages that are scanned
        over are copied in and out of the loop.

        **Arguments:**

        - `layer`: the layer, an int or a traced int32: a value in ``[0, num_layers)``.
        - `num_pages`: how many pages each layer has.
        - `num_layers`: how many layers the pool holds: it has ``num_layers * num_pages`` pages.
        - `devices`: among how many devices the pages of a layer are divided, by ``Axes(context=...)``. Each device has
          its part of every layer, one layer after the other, with ``num_pages / devices`` pages in each part.

        **Returns:** the batch with its block tables and `copy_from` shifted. An entry that is no page of the layer
        becomes -1, and never a page of another layer. A batch that `paged.check` has passed for ``num_pages`` pages
        counts as checked for the pool.

        >>> batch = RaggedBatch.decode(lengths=[5, 9], block_tables=[[3, 0], [1, 4]])
        >>> batch.for_layer(2, num_pages=4, num_layers=8).block_tables.tolist()
        [[11, 8], [9, -1]]
        """
        part = num_pages // devices

        def moved(ids: Array) -> Array:
            # The devices before an entry's own have the parts of the other layers too.
            before = 0 if devices == 1 else ids // part * (num_layers - 1) * part
            return jnp.where((ids >= 0) & (ids < num_pages), ids + before + layer * part, -1)

        tables, copy_from = moved(self.block_tables), None if self.copy_from is None else moved(self.copy_from)
        checked = self.checked_for
        if checked is not None:
            checked = checked._replace(num_pages=num_layers * num_pages) if checked.num_pages <= num_pages else None
        return self.with_fields(block_tables=tables, copy_from=copy_from, checked_for=checked)

    def with_fields(self, **fields: Any) -> "RaggedBatch":
        """This batch with some fields exchanged as they are, which a batch of `stack` has with an axis of shards."""
        new = object.__new__(RaggedBatch)  # as a pytree is unflattened: `__init__` would refuse that axis
        for field in dataclasses.fields(self):
            object.__setattr__(new, field.name, fields.get(field.name, getattr(self, field.name)))
        return new

    def naming(self, names: Iterable[str]) -> "RaggedBatch":
        """This batch with the values of these names alone: a model brings what any of its layers names.

        **Arguments:**

        - `names`: of values. A name that the batch lacks is left out.
        """
        values = {name: self.values[name] for name in names if name in self.values}
        return self if len(values) == len(self.values) else self.with_fields(values=values)

    def has_rows(self, tokens: Any) -> bool:
        """Whether this batch and a step of ``tokens`` query rows have room for a row of a sequence, by their shapes."""
        return tokens > 0 and self.num_slots > 0

    @property
    def num_slots(self) -> Any:
        """The number of sequence slots ``S``, live or not: an int, or a symbolic size of `jax.export`."""
        return self.lengths.shape[-1]

    @property
    def pages_per_seq(self) -> Any:
        """Entries in the block table of one sequence: the most pages that a sequence may have."""
        return self.block_tables.shape[-1]


def _known_num_seqs(num_seqs: Any) -> int | None:
    """The number of live slots, if it is known when the batch is built: `paged.check` looks at JAX arrays' values."""
    if num_seqs is None or isinstance(num_seqs, jax.Array | jax.ShapeDtypeStruct):
        return None
    value = _as_numpy("num_seqs", num_seqs)
    if isinstance(value, jax.Array) or value.size != 1 or not is_integer(value):
        return None  # `_as_int32` says so
    return int(value.reshape(()))


def _require_known_lengths(lengths: Any, live: int | None) -> None:
    """Lengths of live slots that are known when the batch is built must be int32: a position could not be told."""
    if live is None or isinstance(lengths, jax.Array | jax.ShapeDtypeStruct):
        return
    values = _as_numpy("lengths", lengths)[:live]
    if isinstance(values, jax.Array):
        return
    if values.dtype.itemsize > 2 and values.size and values.max() > LARGEST_INT32:
        slot = int(values.argmax())
        raise ValueError(
            f"lengths[{slot}] (sequence {slot}) must be at most 2**31 - 1, because positions are int32; got "
            f"{values[slot]}."
        )


def _as_rows(query_rows: Any) -> int:
    if isinstance(query_rows, bool) or not isinstance(query_rows, int | np.integer) or query_rows < 0:
        raise TypeError(f"query_rows must be a whole number of rows, or None where it varies; got {query_rows!r}.")
    return int(query_rows)


def _as_numbers(name: str, value: Any, slots: Any) -> Any:
    """Numbers of a `Value`, [seqs] or [seqs, size]: float32 where they are floats, else int32."""
    if not isinstance(value, jax.Array | jax.ShapeDtypeStruct):
        value = _as_numpy(f"values[{name!r}]", value)
    if jnp.issubdtype(value.dtype, jnp.floating):
        is_done = isinstance(value, jax.ShapeDtypeStruct) or value.dtype == jnp.float32
        value = value if is_done and not isinstance(value, np.ndarray) else jnp.asarray(value, jnp.float32)
    else:
        value = _as_int32(f"values[{name!r}]", value, value.ndim)
    if value.ndim not in (1, 2) or value.shape[0] != slots:
        raise ValueError(
            f"values[{name!r}] must be [seqs] = [{slots}], or [seqs, size] for a Value with a size; got {value.shape}."
        )
    return value


def _as_words(ancestors: Any) -> Any:
    """Bits of ancestors as i32[tokens, words]."""
    if not isinstance(ancestors, jax.Array | jax.ShapeDtypeStruct):
        ancestors = _as_numpy("ancestors", ancestors)
    if ancestors.dtype == np.uint32 and not isinstance(ancestors, jax.ShapeDtypeStruct):
        is_traced = isinstance(ancestors, jax.Array)
        ancestors = jax.lax.bitcast_convert_type(ancestors, jnp.int32) if is_traced else ancestors.view(np.int32)
    if ancestors.ndim == 1 and not isinstance(ancestors, jax.ShapeDtypeStruct):
        ancestors = ancestors[:, None]
    return _as_int32("ancestors", ancestors, 2)


def _as_int32(name: str, value: Any, rank: int) -> Any:
    if not isinstance(value, jax.Array | jax.ShapeDtypeStruct):
        value = _as_numpy(name, value)
    if not is_integer(value):
        raise TypeError(f"{name} must be int32; got {value.dtype.name}.")
    if name == "num_seqs" and value.shape == (1,) and not isinstance(value, jax.ShapeDtypeStruct):
        value = value.reshape(())  # callers of other libraries pass [1]
    if value.ndim != rank:
        raise ValueError(f"{name} must have {rank} dimension(s); got shape {tuple(value.shape)}.")
    if isinstance(value, jax.ShapeDtypeStruct) or (isinstance(value, jax.Array) and value.dtype == jnp.int32):
        return value
    return jnp.asarray(within_int32(value), jnp.int32)


def _as_numpy(name: str, value: Any) -> Any:
    """A host value as an array; a list that holds traced numbers as a traced array."""
    is_typed = hasattr(value, "dtype")
    try:
        value = np.asarray(value)
    except jax.errors.TracerArrayConversionError:
        return jnp.asarray(value)
    except ValueError:
        raise ValueError(f"{name} must be an array, or lists of one length each; got {value!r}.") from None
    return value.astype(np.int32) if not value.size and not is_typed else value  # [] says nothing of its dtype
