"""Checks at the door: shapes and dtypes when traced, and on request the values of a batch when run."""

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from paged.spec import FLOAT_DTYPES, AttentionSpec, PageLayout, Pages, RaggedBatch, sinks_per_head

from .program import Program, implies


def require_layout(spec: AttentionSpec, layout: PageLayout) -> None:
    """Raise ``ValueError`` when pages of this layout cannot hold this spec's keys."""
    for name in ("num_kv_heads", "head_dim"):
        if getattr(spec, name) != getattr(layout, name):
            raise ValueError(
                f"layout.{name} must equal spec.{name} = {getattr(spec, name)}; got {getattr(layout, name)}."
            )


def require_queries(spec: AttentionSpec, q: Any, batch: RaggedBatch) -> None:
    """Raise unless ``q`` is [tokens, q_heads, head_dim] in a float dtype, with the rows its batch says."""
    _require_rows("q", q, (spec.num_q_heads, spec.head_dim), "q_heads and head_dim from the spec")
    if len(batch.lengths.shape) != 1:
        raise ValueError(
            f"batch must be of one shard; got lengths of shape {batch.lengths.shape}. Stacked batches are for an "
            "attention lowered with mesh= and axes=Axes(sequences=...)."
        )
    expected = None if batch.query_rows is None else batch.query_rows * batch.num_slots
    if expected is not None and q.shape[0] != expected:
        raise ValueError(
            f"q must have {expected} rows, {batch.query_rows} for each of the batch's {batch.num_slots} slots; got "
            f"{q.shape[0]}. For rows of varying number build RaggedBatch(lengths, block_tables, query_starts)."
        )


def require_pages(layout: PageLayout | None, pages: Any) -> None:
    """Raise unless ``pages`` were made by this layout; by any layout when it is None."""
    if not isinstance(pages, Pages):
        raise TypeError(f"pages must come from layout.init(...) or layout.wrap(...); got {type(pages).__name__}.")
    if layout is not None and pages.layout != layout:
        raise ValueError(f"pages must have the layout that was lowered for, {layout}; got {pages.layout}.")


def require_new_tokens(layout: PageLayout, k: Any, v: Any, tokens: int | None = None) -> None:
    """Raise unless ``k`` and ``v`` are a step's keys and values for pages of this layout."""
    _require_rows("k", k, (layout.num_kv_heads, layout.head_dim), "kv_heads and head_dim from the layout")
    _require_rows("v", v, (layout.num_kv_heads, layout.value_dim), "kv_heads and value_dim from the layout")
    tokens = k.shape[0] if tokens is None else tokens
    if k.shape[0] != tokens or v.shape[0] != tokens:
        raise ValueError(f"k and v must have one row a query token, {tokens}; got {k.shape[0]} and {v.shape[0]}.")


def require_sinks(spec: AttentionSpec, sinks: Any) -> None:
    """Raise unless sinks are given exactly when the spec has them, in one of the accepted shapes."""
    if spec.sinks and sinks is None:
        raise ValueError(
            f"sinks is missing: the spec says sinks=True, so the call needs float32[{spec.num_q_heads}], one learnt "
            "logit a query head."
        )
    if sinks is None:
        return
    if not spec.sinks:
        raise ValueError("sinks were given, but the spec says sinks=False: use spec.replace(sinks=True).")
    if not jnp.issubdtype(jnp.result_type(sinks), jnp.floating):
        raise TypeError(f"sinks must be floating point; got {jnp.result_type(sinks).name}.")
    jax.eval_shape(lambda s: sinks_per_head(spec, s), jax.ShapeDtypeStruct(np.shape(sinks), jnp.float32))


def _require_rows(name: str, array: Any, tail: tuple[int, int], why: str) -> None:
    shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    if shape is None or dtype is None:
        raise TypeError(f"{name} must be an array; got {type(array).__name__}.")
    if len(shape) != 3 or tuple(shape[1:]) != tail or shape[0] < 1:
        heads = "q_heads" if name == "q" else "kv_heads"
        dim = "value_dim" if name == "v" else "head_dim"
        raise ValueError(
            f"{name} must be [tokens, {heads}, {dim}] = [at least 1, {tail[0]}, {tail[1]}] ({why}); got {tuple(shape)}."
        )
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16 or float32; got {dtype.name}.")


def check(batch: RaggedBatch, pages: Pages, tokens: int, spec: AttentionSpec) -> RaggedBatch:
    """Raise ``ValueError`` where the batch's *values* are at fault, naming the array, the sequence and the value.

    What is checked, for live sequences only: ``num_seqs`` in ``[0, S]``; ``query_starts`` from 0, not decreasing, and
    within the ``tokens`` query rows; ``lengths`` in ``[0, pages_per_seq * P]`` and not under the number of query rows;
    every page with a token that the spec may see, or that this step writes, in ``[0, N)``; no slot written twice.

    Returns the batch, marked so that it is not checked again for a spec that sees no more, over as many rows and as
    many pages of this size. With concrete arrays it raises at once. Under ``jax.jit`` it raises when the returned
    batch is used, through a host callback, as JAX's runtime error with the same text; that adds a custom call to the
    program, which a lowering itself never does.

    >>> layout = PageLayout(page_size=2, num_kv_heads=1, head_dim=4)
    >>> batch = RaggedBatch.decode(lengths=[3], block_tables=[[0, 7]])
    >>> spec = AttentionSpec(num_q_heads=1, num_kv_heads=1, head_dim=4)
    >>> check(batch, layout.init(num_pages=4), tokens=1, spec=spec)
    Traceback (most recent call last):
        ...
    ValueError: block_tables[0, 1] = 7 (sequence 0) is no page of the pool: it holds tokens 2 to 2, must be in [0, 4).
    """
    program = Program.from_spec(spec)
    facts = _Facts(pages.layout.page_size, pages.num_pages, tokens, program)
    if batch.checked_for is not None:
        *shapes, mask = batch.checked_for
        if shapes == [*facts[:-1]] and implies(program.mask, mask):
            return batch
    values = (batch.lengths, batch.block_tables, batch.query_starts, batch.num_seqs)
    if any(isinstance(value, jax.core.Tracer) for value in values):

        def raise_on_fault(*arrays: Any) -> np.ndarray:
            _raise_on_fault(_Values(*map(np.asarray, arrays)), facts)
            return np.zeros((), np.int32)

        zero = jax.pure_callback(raise_on_fault, jax.ShapeDtypeStruct((), jnp.int32), *values, vmap_method="sequential")
        # Everything that reads the batch now waits for the verdict.
        values = (values[0] + zero, values[1], values[2] + zero, values[3])
    else:
        _raise_on_fault(_Values(*map(np.asarray, values)), facts)
    return RaggedBatch(*values, query_rows=batch.query_rows, checked_for=(*facts[:-1], program.mask))


class _Values(NamedTuple):
    lengths: np.ndarray
    tables: np.ndarray
    starts: np.ndarray
    num_seqs: np.ndarray


class _Facts(NamedTuple):
    page_size: int
    num_pages: int
    tokens: int
    program: Program


def _raise_on_fault(values: _Values, facts: _Facts) -> None:
    lengths, tables, starts, num_seqs = values
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
        if stop - start > length > 0:
            raise ValueError(
                f"lengths[{s}] = {length} (sequence {s}) is less than its {stop - start} query rows: lengths count "
                "this step's own tokens."
            )
        _require_pages_in_pool(s, length, stop - start, tables[s], facts)
    _require_distinct_slots(lengths[:live], tables[:live], np.diff(starts[: live + 1]), page_size)


def _require_pages_in_pool(s: int, length: int, rows: int, table: np.ndarray, facts: _Facts) -> None:
    """Of one sequence, the pages it may see or writes to."""
    page_size, num_pages = facts.page_size, facts.num_pages
    first = np.arange(-(-length // page_size)) * page_size
    some = facts.program.coverage(length - rows, length, first, first + page_size, length).some
    is_needed = (some | (first + page_size > length - rows)) & (rows > 0)
    entry = table[: len(first)]
    for i in np.flatnonzero(is_needed & ((entry < 0) | (entry >= num_pages))):
        last = min(length, first[i] + page_size) - 1
        raise ValueError(
            f"block_tables[{s}, {i}] = {entry[i]} (sequence {s}) is no page of the pool: it holds tokens {first[i]} to "
            f"{last}, must be in [0, {num_pages})."
        )


def _require_distinct_slots(lengths: np.ndarray, tables: np.ndarray, rows: np.ndarray, page_size: int) -> None:
    """No slot is written by two tokens of this step."""
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
