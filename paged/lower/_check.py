"""`check`: the values of a batch, looked at when it runs. `require` is for shapes and dtypes, when it is traced."""

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from paged.spec import AttentionSpec, CheckedFor, Given, GroupedBatch, Mask, Minimum, Pages, RaggedBatch

from ._ahead import first_rows, may_cut, seen_ahead
from .program import implies, normal_form
from .require import require_brought

Step = TypeVar("Step", RaggedBatch, GroupedBatch)


def check(spec: AttentionSpec, pages: Pages, batch: Step, tokens: int, *, final_lengths: Any = None) -> Step:
    """Raise ``ValueError`` where the *values* of a batch are at fault, naming the array, the sequence and the value.

    **Arguments:**

    - `spec`: the attention that the batch is for. Its mask decides which pages are needed.
    - `pages`: the pages that the batch is for. Only the page size and the number of pages matter.
    - `batch`: the batch, concrete or traced. Of a `GroupedBatch`, the part of this spec's group is checked and marked.
    - `tokens`: the number of query rows, ``q.shape[0]``.
    - `final_lengths` i32[seqs]: how many tokens each sequence will have when all of its steps are done, such as the
      length of a prompt of which this step is a chunk. Then the mask is asked whether a sequence may be cut where this
      step ends. None: not asked. Needs values: concrete arrays, outside of ``jax.jit``.

    **Returns:** the batch, marked as checked. A marked batch is not checked again for a spec that sees no more, over
    as many rows and as many pages of this size. So a model of many layers checks once.

    **Raises** ``ValueError`` unless, for every live sequence:

    - ``num_seqs`` is in ``[0, seqs]``;
    - ``query_starts`` begins at 0, does not decrease, and ends within ``tokens``;
    - ``lengths`` is in ``[0, pages_per_seq * page_size]``, and at least the number of query rows;
    - no number of its ``values`` is less than the least that its mask, or a score operation, allows;
    - every page that holds a visible token, or one that this step writes, is in ``[0, num_pages)``;
    - no place in the pages is written by two tokens;
    - every page of ``copy_from`` is -1, or a page of the pool that this step does not write;
    - with ``final_lengths``, no row up to the end of this step sees a key that a later step writes, as a prefix longer
      than the chunk does. Such a row would be computed without that key. The error says where the next step may end.

    A value that the spec names and the batch does not bring, or the other way round, is a ``ValueError`` too.
    ``final_lengths`` that are traced, or no integers, raise ``TypeError``. With concrete arrays an error comes at once.
    Under ``jax.jit`` it comes when the returned batch is used, as JAX's runtime error with the same text, through
    a host callback. A lowering itself never adds a callback.

    >>> layout = PageLayout(page_size=2, num_kv_heads=1, head_dim=4)
    >>> batch = RaggedBatch.decode(lengths=[3], block_tables=[[0, 7]])
    >>> spec = AttentionSpec(num_q_heads=1, num_kv_heads=1, head_dim=4)
    >>> check(spec, layout.init(num_pages=4), batch, tokens=1)
    Traceback (most recent call last):
        ...
    ValueError: block_tables[0, 1] = 7 (sequence 0) is no page of the pool: it holds tokens 2 to 2, must be in [0, 4).
    """
    if type(batch) is GroupedBatch:
        return batch.with_group(spec, check(spec, pages, batch.for_spec(spec), tokens, final_lengths=final_lengths))
    if not isinstance(batch, RaggedBatch):
        raise TypeError(f"batch must be a paged.RaggedBatch; got {type(batch).__name__}. Check it before attend.plan.")
    require_brought(spec, batch, tokens)
    size = pages.layout.page_size
    checked = check_values(batch, page_size=size, num_pages=pages.num_pages, tokens=tokens, **demands_of(spec))
    if final_lengths is not None:
        _require_steps_end_at_cuts(batch, final_lengths, spec.visibility)
    return checked


def demands_of(spec: AttentionSpec) -> dict[str, Any]:
    """What a spec demands of the values of a batch, as arguments of `check_values`."""
    return {"mask": spec.visibility, "minima": spec.minima}


def check_values(
    batch: RaggedBatch,
    *,
    page_size: int,
    num_pages: int,
    tokens: int,
    mask: Mask,
    minima: tuple[Minimum, ...],
    is_written: bool = True,
) -> RaggedBatch:
    """`check`, from the facts that it needs.

    A step that writes nothing (``is_written=False``) may have more rows than tokens, and sequences that share pages.
    The batch is then not marked: the same batch could be at fault where it is written.
    """
    facts = CheckedFor(page_size, num_pages, tokens, normal_form(mask), minima)
    if _is_checked(batch, facts):
        return batch
    values, changes = _Values.of(batch), {}
    if any(isinstance(value, jax.core.Tracer) for value in jax.tree.leaves(values)):

        def raise_on_fault(values: _Values) -> np.ndarray:
            _raise_on_fault(jax.tree.map(np.asarray, values), facts, is_written)
            return np.zeros((), np.int32)

        zero = jax.pure_callback(raise_on_fault, jax.ShapeDtypeStruct((), jnp.int32), values, vmap_method="sequential")
        # Everything that reads the batch now waits for the verdict.
        changes = {"lengths": batch.lengths + zero, "query_starts": batch.query_starts + zero}
    else:
        _raise_on_fault(jax.tree.map(np.asarray, values), facts, is_written)
    return dataclasses.replace(batch, **changes, checked_for=facts if is_written else None)


def require_checked(
    batch: RaggedBatch, *, page_size: int, num_pages: int, tokens: int, mask: Mask, minima: tuple[Minimum, ...]
) -> None:
    """``ValueError`` unless a plan's batch has been checked: the plan is made, and cannot wait for a verdict."""
    facts = CheckedFor(page_size, num_pages, tokens, normal_form(mask), minima)
    if not _is_checked(batch, facts):
        raise ValueError(
            "This attention checks its batches, and the plan's batch has not been checked for it: make the plan with "
            "this attention, attend.plan(q, pages, batch), or from a batch that paged.check has returned."
        )


def _is_checked(batch: RaggedBatch, facts: CheckedFor) -> bool:
    if batch.checked_for is None:
        return False
    checked = batch.checked_for
    is_known = all(any(m.name == own.name and m.least >= own.least for m in checked.minima) for own in facts.minima)
    is_of_sizes = (checked.page_size, checked.tokens) == (facts.page_size, facts.tokens)
    # Pages of a smaller pool are pages of a larger one.
    is_of_sizes &= checked.num_pages <= facts.num_pages
    return is_of_sizes and is_known and implies(facts.mask, checked.mask)


class _Values(NamedTuple):
    lengths: np.ndarray
    tables: np.ndarray
    starts: np.ndarray
    num_seqs: np.ndarray
    numbers: dict[str, Any]
    positions: np.ndarray | None
    copy_from: np.ndarray | None

    @classmethod
    def of(cls, batch: RaggedBatch) -> "_Values":
        integers: Any = (batch.lengths, batch.block_tables, batch.query_starts, batch.num_seqs)
        return cls(*integers, batch.values, batch.positions, batch.copy_from)  # pyright: ignore

    def given(self, s: int) -> Given:
        """What the batch brings for sequence ``s``, for questions about the tokens before the step's own."""
        numbers = {name: x[s].tolist() if x.ndim == 1 else tuple(x[s].tolist()) for name, x in self.numbers.items()}
        return Given(numbers, is_ancestor=True)

    def row_range(self, s: int) -> tuple[int, int]:
        """The half-open range of the positions of the rows of sequence ``s``."""
        start, stop, length = int(self.starts[s]), int(self.starts[s + 1]), int(self.lengths[s])
        if self.positions is None or stop <= start:
            return length - (stop - start), length
        own = self.positions[start:stop]
        return int(own.min()), int(own.max()) + 1


def _raise_on_fault(values: _Values, facts: CheckedFor, is_written: bool) -> None:
    lengths, tables, starts, num_seqs, *_ = values
    page_size = facts.page_size
    slots, capacity, live = tables.shape[0], tables.shape[1] * page_size, int(num_seqs)
    if not 0 <= live <= slots:
        raise ValueError(f"num_seqs = {live} is out of range: there are {slots} slots, so it must be in [0, {slots}].")
    if starts[0] != 0:
        raise ValueError(f"query_starts[0] = {starts[0]} (sequence 0) must be 0: rows are packed from the first.")
    for s in range(live):
        start, stop, length = int(starts[s]), int(starts[s + 1]), int(lengths[s])
        if stop < start:
            raise ValueError(f"query_starts[{s + 1}] = {stop} (sequence {s}) decreases: it follows {start}.")
        if stop > facts.tokens:
            raise ValueError(f"query_starts[{s + 1}] = {stop} (sequence {s}) is past the {facts.tokens} query rows.")
        if not 0 <= length <= capacity:
            raise ValueError(
                f"lengths[{s}] = {length} (sequence {s}) is out of range: its {tables.shape[1]} table entries of "
                f"{page_size} tokens hold [0, {capacity}]."
            )
        if is_written and stop - start > length > 0:
            raise ValueError(
                f"lengths[{s}] = {length} (sequence {s}) is less than its {stop - start} query rows: lengths count "
                "this step's own tokens."
            )
        _require_numbers(s, values, facts.minima)
        _require_pages_in_pool(s, length, stop - start, values, facts, is_written)
    if is_written:
        _require_distinct_slots(lengths[:live], tables[:live], np.diff(starts[: live + 1]), page_size)
    if is_written and values.copy_from is not None and (values.copy_from[:live] != -1).any():
        _require_kept_sources(values, live, facts)


def _require_numbers(s: int, values: _Values, minima: tuple[Minimum, ...]) -> None:
    """No number of sequence ``s`` may be less than the least that its term allows."""
    for name, least, term in minima:
        number = values.numbers[name][s]
        if np.min(number) < least:
            raise ValueError(f"values[{name!r}][{s}] = {number} (sequence {s}) must be at least {least}, for {term}.")


def _require_pages_in_pool(
    s: int, length: int, rows: int, values: _Values, facts: CheckedFor, is_written: bool
) -> None:
    """Every page that holds a token which sequence ``s`` may see or writes must be in the pool."""
    page_size, num_pages, table = facts.page_size, facts.num_pages, values.tables[s]
    first = np.arange(-(-length // page_size)) * page_size
    mask: Any = facts.mask.given(values.given(s))
    some = mask.coverage(*values.row_range(s), first, first + page_size).some
    is_needed = (some | (is_written & (first + page_size > length - rows))) & (rows > 0)
    entry = table[: len(first)]
    for i in np.flatnonzero(is_needed & ((entry < 0) | (entry >= num_pages))):
        last = min(length, first[i] + page_size) - 1
        raise ValueError(
            f"block_tables[{s}, {i}] = {entry[i]} (sequence {s}) is no page of the pool: it holds tokens {first[i]} to "
            f"{last}, must be in [0, {num_pages})."
        )


def _require_distinct_slots(lengths: np.ndarray, tables: np.ndarray, rows: np.ndarray, page_size: int) -> None:
    """No two tokens of this step may be written to one place in the pages."""
    seq = np.repeat(np.arange(len(rows)), rows)
    position = np.concatenate([np.arange(length - n, length) for length, n in zip(lengths, rows, strict=True)] or [[]])
    seq, position = seq[position >= 0], position[position >= 0].astype(int)
    page = tables[seq, position // page_size]
    order = np.lexsort((seq, position % page_size, page))
    same = (np.diff(page[order]) == 0) & (np.diff(position[order] % page_size) == 0)
    for i in np.flatnonzero(same):
        a, b = order[i], order[i + 1]
        raise ValueError(
            f"block_tables[{seq[b]}, {position[b] // page_size}] = {page[b]} (sequence {seq[b]}) is stale: slot "
            f"{position[b] % page_size} of that page is also written by sequence {seq[a]} in this step."
        )


def _require_kept_sources(values: _Values, live: int, facts: CheckedFor) -> None:
    """Every page that is copied must be in the pool, and none may be written in this step: others hold it."""
    writers = {}
    for s in range(live):
        length, rows = int(values.lengths[s]), int(values.starts[s + 1] - values.starts[s])
        entries = range(max(length - rows, 0) // facts.page_size, -(-length // facts.page_size)) if rows else ()
        writers |= {int(values.tables[s, i]): s for i in entries}
    for s in range(live):
        page, rows = int(values.copy_from[s]), values.starts[s + 1] - values.starts[s]  # pyright: ignore
        if rows and page != -1 and not 0 <= page < facts.num_pages:
            raise ValueError(
                f"copy_from[{s}] = {page} (sequence {s}) is no page of the pool: it must be in [0, {facts.num_pages}), "
                "or -1 to copy none."
            )
        if rows and page in writers:
            raise ValueError(
                f"copy_from[{s}] = {page} (sequence {s}) is written by sequence {writers[page]} in this step: a page "
                "that several hold is copied, and not written."
            )


def _require_steps_end_at_cuts(batch: RaggedBatch, final_lengths: Any, mask: Mask) -> None:
    """No row up to the end of a sequence's step may see what a later step writes."""
    values = (batch.lengths, batch.query_starts, batch.num_seqs, final_lengths)
    if any(isinstance(value, jax.core.Tracer) for value in values):
        raise TypeError("final_lengths are compared on the host, so the batch and they must be concrete, not traced.")
    lengths, starts, num_seqs, final = map(np.asarray, values)
    brought = jax.tree.map(np.asarray, _Values.of(batch))
    if not np.issubdtype(final.dtype, np.integer) or final.shape != lengths.shape:
        raise TypeError(f"final_lengths must be int32[{len(lengths)}]; got {final.dtype.name} of shape {final.shape}.")
    for s in np.flatnonzero(np.diff(starts)[: int(num_seqs)] > 0):
        length, tokens = int(lengths[s]), int(final[s])
        if tokens < length:
            raise ValueError(f"final_lengths[{s}] = {tokens} (sequence {s}) is less than lengths[{s}] = {length}.")
        first = first_rows(mask.given(brought.given(int(s))), tokens)  # pyright: ignore
        cuts = may_cut(first)
        if not cuts[length]:
            row, key = seen_ahead(first, length)
            following = length + int(np.argmax(cuts[length:]))
            raise ValueError(
                f"lengths[{s}] = {length} (sequence {s}) ends a step where the mask {mask} sees ahead: row {row} sees "
                f"token {key}, which a later step writes. Let the step end at token {following} of {tokens}."
            )
