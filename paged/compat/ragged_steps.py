"""The two steps of ragged batches, each one program per call: attend over the pages, and write to them first."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from paged.lower import Attend, Call, ShardedAttend
from paged.spec import QUANTISED_DTYPES, PageLayout, RaggedBatch, Sinks

from . import arrays
from .caches import ragged_layout, ragged_pages
from .explaining import answer_if_asked
from .hints import lowered, lowered_on
from .static import More, Options

AnyAttend = Attend | ShardedAttend
_CACHE = "[pages, page_size, 2 * kv_heads, head_dim]"


@functools.partial(jax.jit, static_argnums=0)
def attend(
    options: Options,
    query: Any,
    kv_pages: Any,
    context_lens: Any,
    block_tables: Any,
    query_start_loc: Any,
    num_seqs: Any,
    softmax_aux: Any,
) -> Array:
    """Attention over pages that hold this step's keys and values already."""
    q = arrays.rows_of("query", query)
    layout = ragged_layout(options, "kv_pages", kv_pages, q)
    slots = _require_sequences(context_lens, query_start_loc)
    arrays.require_shape("block_tables", block_tables, (slots, "pages_per_seq"), "[seqs, pages_per_seq]")
    arrays.require_integers("block_tables", block_tables)
    arrays.require_integers("num_seqs", num_seqs)
    if num_seqs.shape not in ((), (1,)):
        raise ValueError(f"num_seqs must be one number, [1] or []; got {tuple(num_seqs.shape)}.")
    arrays.require_heads("query", q.shape[1], "kv_pages", layout.num_kv_heads, _CACHE)
    batch = RaggedBatch(context_lens, block_tables, query_start_loc, num_seqs)
    return _over_pages(options, query, q, kv_pages, layout, batch, softmax_aux)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def update(
    options: Options,
    queries: Any,
    keys: Any,
    values: Any,
    kv_pages: Any,
    context_lens: Any,
    block_tables: Any,
    query_start_loc: Any,
    distribution: Any,
    softmax_aux: Any,
) -> tuple[Array, Array]:
    """The write of this step's keys and values, then attention over the pages."""
    q = arrays.rows_of("queries", queries)
    k, v = (_new_rows(options, name, x, kv_pages) for name, x in (("keys", keys), ("values", values)))
    arrays.require_shape("keys", k, (q.shape[0], "kv_heads", q.shape[2]), "[tokens, kv_heads, head_dim]")
    arrays.require_shape("values", v, k.shape, "[tokens, kv_heads, head_dim]")
    repeats = 1 if options.devices is None else options.devices.repeats(k.shape[1])
    # One KV head that every device needs may be in the cache once, whole on every device.
    is_once = k.shape[1] == 1 and kv_pages.size == 2 * math.prod(kv_pages.shape[:2]) * kv_pages.shape[-1]
    layout = ragged_layout(options, "kv_pages", kv_pages, q, k.shape[1] * (1 if is_once else repeats))
    layout = layout.replace(num_kv_heads=k.shape[1])
    slots = _require_sequences(context_lens, query_start_loc)
    width = block_tables.size // max(slots, 1)
    if block_tables.ndim != 1 or block_tables.size != slots * width or (slots and not width):
        raise ValueError(
            f"block_tables must be flat, [seqs * pages_per_seq], a multiple of context_lens' {slots}; got "
            f"{tuple(block_tables.shape)}."
        )
    arrays.require_integers("block_tables", block_tables)
    arrays.require_shape("distribution", distribution, (3,), "[decode_end, prefill_end, total]")
    arrays.require_integers("distribution", distribution)
    arrays.require_heads("queries", q.shape[1], "kv_pages", layout.num_kv_heads, _CACHE)
    batch = RaggedBatch(context_lens, block_tables.reshape(slots, max(width, 1)), query_start_loc, distribution[2])
    if options.more is not None and not options.more.is_written:
        return _over_pages(options, queries, q, kv_pages, layout, batch, softmax_aux), kv_pages
    sinks = arrays.sinks_of(softmax_aux, q.shape[1], layout.num_kv_heads)
    attend, wide = _prepare(options, q, kv_pages, layout, batch, sinks)
    k, v = (arrays.padded(x, layout.head_dim) for x in (k, v))
    if isinstance(attend, ShardedAttend) and is_once and repeats > 1:
        pages = attend.adopt(ragged_pages(options, layout, kv_pages))
        answer_if_asked(attend, wide, pages, batch)
        out, pages = attend.update(wide, k, v, pages, batch, sinks)
        pages = attend.with_each_head_once(pages)
    else:
        pages = ragged_pages(options, attend.layout, kv_pages)
        answer_if_asked(attend, wide, pages, batch)
        out, pages = attend.update(wide, k, v, pages, batch, sinks)
    return _as_queries(options, layout, out, queries), pages.arrays[0].reshape(kv_pages.shape)


def _new_rows(options: Options, name: str, array: Any, kv_pages: Any) -> Array:
    """New keys or values as floats. Rows in the dtype of quantised pages are multiplied by their scale."""
    if array.dtype == kv_pages.dtype and array.dtype in QUANTISED_DTYPES:
        # Without scales the pages are refused, later and with what to write: the rows are not at fault.
        more = options.more or More()
        array = array.astype(jnp.float32) * ((more.k_scale if name == "keys" else more.v_scale) or 1.0)
    return arrays.rows_of(name, array)


def _over_pages(
    options: Options,
    query: Any,
    q: Any,
    kv_pages: Any,
    layout: PageLayout,
    batch: RaggedBatch,
    softmax_aux: Any,
) -> Array:
    """Attention over the pages as they are, in the shape and dtype that the caller wants."""
    sinks = arrays.sinks_of(softmax_aux, q.shape[1], layout.num_kv_heads)
    attend, wide = _prepare(options, q, kv_pages, layout, batch, sinks)
    pages = ragged_pages(options, layout, kv_pages)
    pages = attend.adopt(pages) if isinstance(attend, ShardedAttend) else pages
    answer_if_asked(attend, wide, pages, batch)
    return _as_queries(options, layout, attend(wide, pages, batch, sinks), query)


def _as_queries(options: Options, layout: PageLayout, out: Array, query: Any) -> Array:
    """The output in the shape of the caller's queries, and in the dtype that the caller wants."""
    out = out if out.shape[-1] == query.shape[-1] else out[..., : query.shape[-1]]
    v_scale, dtype = options.scales(layout)[1], options.out_dtype(query)
    out = out if v_scale == 1.0 else out * v_scale
    out = out if out.dtype == dtype else out.astype(dtype)
    return out if query.ndim == 3 else out.reshape(query.shape)


def _prepare(
    options: Options, q: Any, kv_pages: Any, layout: PageLayout, batch: RaggedBatch, sinks: Sinks | None
) -> tuple[AnyAttend, Array]:
    """The attention, and the queries padded to the head dimension of the pages."""
    spec = options.spec(q.shape[1], q.shape[2], layout, sinks is not None)
    is_wider = options.is_float32 or options.out_dtype(q).itemsize > q.dtype.itemsize
    wide = arrays.padded(q.astype(jnp.float32) if is_wider else q, layout.head_dim)
    call = Call(wide.shape[0], batch.num_slots, batch.pages_per_seq, kv_pages.shape[0], None, jnp.dtype(wide.dtype))
    how = (options.target, options.interpret, options.hints, spec, layout, call)
    return lowered(*how) if options.devices is None else lowered_on(options.devices, *how), wide


def _require_sequences(context_lens: Any, query_start_loc: Any) -> int:
    """The number of sequence slots."""
    arrays.require_shape("context_lens", context_lens, ("seqs",), "[seqs]")
    arrays.require_integers("context_lens", context_lens)
    slots = context_lens.shape[0]
    arrays.require_shape("query_start_loc", query_start_loc, (slots + 1,), "[seqs + 1], with context_lens' seqs,")
    arrays.require_integers("query_start_loc", query_start_loc)
    return slots
