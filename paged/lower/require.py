"""Errors of shape and dtype, raised when a call is traced. `check` is for values, when it runs."""

from typing import Any

from paged.spec import FLOAT_DTYPES, AttentionSpec, GroupedBatch, PageLayout, Pages, RaggedBatch, require_scales


def require_layout(spec: Any, layout: Any) -> None:
    """Raise unless these are a spec and a layout, and pages of the layout can hold the spec's keys."""
    require_type("spec", spec, AttentionSpec)
    require_type("layout", layout, PageLayout)
    for name in ("num_kv_heads", "head_dim"):
        if getattr(spec, name) != getattr(layout, name):
            raise ValueError(
                f"layout.{name} must equal spec.{name} = {getattr(spec, name)}; got {getattr(layout, name)}."
            )


def require_type(name: str, value: Any, kind: type) -> None:
    """Raise ``TypeError`` unless ``value`` is a ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a paged.{kind.__name__}; got {value!r}.")


def require_batch(batch: Any) -> None:
    """Raise ``TypeError`` unless ``batch`` is a `RaggedBatch`."""
    if type(batch) is not RaggedBatch and not isinstance(batch, RaggedBatch):  # the first test is the fast one
        is_grouped = type(batch) is GroupedBatch
        remedy = " Pass batch.for_spec(spec), with the block table of one group." if is_grouped else ""
        raise TypeError(f"batch must be a paged.RaggedBatch; got {type(batch).__name__}.{remedy}")


def require_queries(spec: AttentionSpec, q: Any, batch: RaggedBatch) -> None:
    """Raise unless ``q`` is [tokens, q_heads, head_dim] in a float dtype, with the rows its batch says."""
    require_batch(batch)
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
    require_brought(spec, batch, q.shape[0])


def require_brought(spec: AttentionSpec, batch: RaggedBatch, tokens: Any) -> None:
    """Raise unless the batch brings the values that the spec names, and no others; and one number for each row."""
    # As a dictionary: every read of an Equinox module's field takes Python a quarter of a microsecond.
    brought = vars(batch)
    if brought["values"] or spec.values:
        _require_values(spec, batch)
    if brought["positions"] is None and brought["ancestors"] is None:
        return
    if brought["ancestors"] is not None and not spec.has_ancestors:
        raise ValueError("The batch brings ancestors, and the mask has no Tree() that would ask for them: & Tree().")
    for name in ("positions", "ancestors"):
        array = brought[name]
        if array is not None and array.shape[0] != tokens:
            raise ValueError(f"{name} must have one entry for each of the {tokens} query rows; got {array.shape}.")


def _require_values(spec: AttentionSpec, batch: RaggedBatch) -> None:
    named = {value.name: value for value in spec.values}
    missing, unknown = [x for x in named if x not in batch.values], [x for x in batch.values if x not in named]
    if missing:
        raise ValueError(f"The spec names {missing}, which the batch must bring: RaggedBatch(..., values={{...}}).")
    if unknown:
        raise ValueError(f"The batch brings values {unknown}, which the spec does not name; it names {sorted(named)}.")
    for name, value in named.items():
        array, slots = batch.values[name], batch.num_slots
        shape = (slots,) if value.size is None else (slots, value.size)
        if array.shape != shape or array.dtype != value.dtype:
            raise ValueError(
                f"values[{name!r}] must be {value.dtype}{list(shape)}, as {value!r} says; got {array.dtype.name}"
                f"{list(array.shape)}."
            )


def require_pages(layout: PageLayout | None, pages: Any) -> None:
    """Raise unless ``pages`` were made by this layout, or by any layout when it is None, and have their scales."""
    if not isinstance(pages, Pages):
        raise TypeError(f"pages must come from layout.init(...) or layout.wrap(...); got {type(pages).__name__}.")
    own = pages.layout  # read once: every read of an Equinox module's field takes Python a quarter of a microsecond
    if layout is not None and own != layout:
        raise ValueError(f"pages must have the layout that was lowered for, {layout}; got {own}.")
    if own.scales is not None:
        require_scales(pages)


def require_new_tokens(layout: PageLayout, k: Any, v: Any, tokens: Any = None) -> None:
    """Raise unless ``k`` and ``v`` are a step's keys and values for pages of this layout."""
    _require_rows("k", k, (layout.num_kv_heads, layout.head_dim), "kv_heads and head_dim from the layout")
    _require_rows("v", v, (layout.num_kv_heads, layout.value_dim), "kv_heads and value_dim from the layout")
    tokens = k.shape[0] if tokens is None else tokens
    if k.shape[0] != tokens or v.shape[0] != tokens:
        raise ValueError(f"k and v must have one row per query token, {tokens}; got {k.shape[0]} and {v.shape[0]}.")


def require_whole_call(**arguments: Any) -> None:
    """Raise ``TypeError`` if only some of these arguments are given: the call that they describe would be ignored."""
    given = [name for name, value in arguments.items() if value is not None]
    if given and len(given) < len(arguments):
        raise TypeError(f"explain needs {', '.join(arguments)} together, or none of them; got only {', '.join(given)}.")


def _require_rows(name: str, array: Any, tail: tuple[int, int], why: str) -> None:
    shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    if shape is None or dtype is None:
        raise TypeError(f"{name} must be an array; got {type(array).__name__}.")
    if len(shape) != 3 or tuple(shape[1:]) != tail:
        heads = "q_heads" if name == "q" else "kv_heads"
        dim = "value_dim" if name == "v" else "head_dim"
        raise ValueError(
            f"{name} must be [tokens, {heads}, {dim}] = [*, {tail[0]}, {tail[1]}] ({why}); got {tuple(shape)}."
        )
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16 or float32; got {dtype.name}.")
