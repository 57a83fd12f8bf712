"""Entry points over a cache of one array, keys on even heads and values on odd ones: ragged batches."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from paged.lower import Attend, Axes, Call, ShardedAttend
from paged.spec import PageLayout, Pages, RaggedBatch, Sinks

from . import arrays
from .arrays import AnyArray
from .devices import Devices
from .hints import Hints, lowered, lowered_on
from .number import flag
from .static import Options

AnyAttend = Attend | ShardedAttend
_CACHE = "[pages, page_size, 2 * kv_heads, head_dim]"


def ragged_page_attention_v2(
    query: Float[Array, "*tokens q_heads head_dim"],
    kv_pages: Shaped[Array, "pages page_size *heads head_dim"],
    context_lens: Int[AnyArray, " seqs"] | Sequence[Any],
    block_tables: Int[AnyArray, "seqs pages_per_seq"] | Sequence[Any],
    query_start_loc: Int[AnyArray, " seqs_plus_1"] | Sequence[Any],
    num_seqs: Int[AnyArray, "..."] | Sequence[Any] | int,
    softmax_aux: Float[Array, "..."] | None = None,
    *,
    softmax_scale: float | None = None,
    logits_soft_cap: float | None = None,
    compute_dtype: Any = jnp.bfloat16,
    optimized: bool = False,
    sliding_window: int | None = None,
    mask_value: float | None = None,
    num_kv_pages_per_block: int | None = None,
    num_queries_per_block: int | None = None,
    vmem_limit_bytes: int | None = None,
    target: str = "auto",
    interpret: Any = False,
    mesh: Mesh | None = None,
    axes: Axes | None = None,
    in_specs: Any = None,
    out_specs: Any = None,
) -> Float[Array, "*tokens q_heads head_dim"]:
    """Causal attention of a ragged batch over pages that hold this step's keys and values already.

    **Arguments:**

    - `query`: rows of all sequences, one after the other, or ``[batch, seq, q_heads, head_dim]``.
    - `kv_pages`: pages with keys on even heads and values on odd ones, or packed; see `ragged_page_attention_v3`.
    - `context_lens`: how many tokens each sequence has, this step's included.
    - `block_tables`: token ``j`` of sequence ``s`` lies in page ``block_tables[s, j // page_size]``. Entries that no
      visible token needs may hold anything.
    - `query_start_loc`: sequence ``s`` owns the rows ``query_start_loc[s] : query_start_loc[s + 1]``, its last tokens.
    - `num_seqs`: the first ``num_seqs`` sequences are live.
    - `softmax_aux`: sinks, learnt logits in the denominator. ``[q_heads]`` and ``[kv_heads, group]`` are one sink of
      each query head. ``[n]`` are ``n`` sinks of every head, ``[kv_heads, n]`` are ``n`` sinks of every head of a
      group, and they add up. `paged.lower` accepts only ``[q_heads]`` and ``[q_heads, n]``.
    - `softmax_scale`: scale of scores. None: ``1 / sqrt(head_dim)``.
    - `logits_soft_cap`: scores become ``cap * tanh(score / cap)``, before the mask. None: no cap.
    - `compute_dtype`: float32 computes products and weights in float32 even where queries and pages are narrower. Other
      dtypes change nothing: products are never narrower than queries and pages, and the softmax is float32.
    - `optimized`: not needed. It chose between two implementations, and here there is one.
    - `sliding_window`: how many tokens a query sees, its own included. None: all.
    - `mask_value`: not needed. Values that could change a result are refused.
    - `num_kv_pages_per_block`, `num_queries_per_block`: the schedule, on TPUs, of the kernel for sequences of several
      rows. Any schedule gives the same attention; None leaves it to `paged`.
    - `vmem_limit_bytes`: the vector memory that kernels may use, on TPUs. None: what the chip has.
    - `target`, `interpret`: see `paged.lower`.
    - `mesh`, `axes`, `in_specs`, `out_specs`: many devices, see `paged.compat`.

    **Returns:** the output in the query's shape and dtype, 0 in rows of no sequence and in rows that see no key.

    Raises ``ValueError`` or ``TypeError``, when traced, naming the argument.

    >>> kv_pages, query = jnp.ones((8, 4, 2 * 2, 16)), jnp.ones((5, 4, 16))
    >>> ragged_page_attention_v2(query, kv_pages, [6, 2], [[3, 1], [0, -1]], [0, 3, 4], 2).shape
    (5, 4, 16)
    """
    flag("optimized", optimized)
    named = {"query": query, "kv_pages": kv_pages, "context_lens": context_lens, "block_tables": block_tables}
    named |= {"query_start_loc": query_start_loc, "num_seqs": num_seqs}
    options = Options.of(
        target,
        interpret,
        ("softmax_scale", softmax_scale),
        ("logits_soft_cap", logits_soft_cap),
        sliding_window,
        mask_value,
        Hints.of_ragged(vmem_limit_bytes, num_kv_pages_per_block, num_queries_per_block),
        compute_dtype=compute_dtype,
        devices=Devices.of(mesh, axes, in_specs, out_specs, **named, softmax_aux=softmax_aux),
    )
    given = arrays.as_arrays(**named)
    _require_known_num_seqs(given[-1], given[2])
    return _attend(options, *given, _sinks(softmax_aux))


def ragged_page_attention_v3(
    queries: Float[Array, "*tokens q_heads head_dim"],
    keys: Float[Array, "*tokens kv_heads head_dim"],
    values: Float[Array, "*tokens kv_heads head_dim"],
    kv_pages: Shaped[Array, "pages page_size *heads head_dim"],
    context_lens: Int[AnyArray, " seqs"] | Sequence[Any],
    block_tables: Int[AnyArray, " seqs_times_pages_per_seq"] | Sequence[Any],
    query_start_loc: Int[AnyArray, " seqs_plus_1"] | Sequence[Any],
    distribution: Int[AnyArray, "3"] | Sequence[Any],
    softmax_aux: Float[Array, "..."] | None = None,
    *,
    softmax_scale: float | None = None,
    logits_soft_cap: float | None = None,
    sliding_window: int | None = None,
    vmem_limit_bytes: int | None = None,
    target: str = "auto",
    interpret: Any = False,
    mesh: Mesh | None = None,
    axes: Axes | None = None,
    in_specs: Any = None,
    out_specs: Any = None,
) -> tuple[Float[Array, "*tokens q_heads head_dim"], Shaped[Array, "pages page_size *heads head_dim"]]:
    """Write the keys and values of a ragged batch into its pages, then attend causally.

    ``kv_pages`` is donated: the array that was passed is gone afterwards. Inside of another ``jax.jit``, donate it
    there.

    **Arguments:**

    - `queries`, `keys`, `values`: rows of all sequences, one after the other, or ``[batch, seq, heads, head_dim]``.
    - `kv_pages`: pages ``[pages, page_size, 2 * kv_heads, D']``, keys on even heads and values on odd ones; or packed,
      ``[pages, page_size, 2 * kv_heads / pack, pack, D']``, which are the same bytes. ``D'`` is ``head_dim``, or the
      next multiple of 128, padded with zeros.
    - `context_lens`: how many tokens each sequence has, this step's included.
    - `block_tables`: the table rows of all sequences, one after the other. Token ``j`` of sequence ``s`` lies in page
      ``block_tables[s * pages_per_seq + j // page_size]``. Entries that no visible token needs may hold anything.
    - `query_start_loc`: sequence ``s`` owns the rows ``query_start_loc[s] : query_start_loc[s + 1]``, its last tokens.
    - `distribution`: ``[decode_end, prefill_end, total]``. Only ``total``, the number of live sequences, is needed. The
      three must not decrease or exceed the number of sequences, which is checked where their values are known.
    - `softmax_aux`: sinks, in the shapes of `ragged_page_attention_v2`.
    - `softmax_scale`: scale of scores. None: ``1 / sqrt(head_dim)``.
    - `logits_soft_cap`: scores become ``cap * tanh(score / cap)``, before the mask. None: no cap.
    - `sliding_window`: how many tokens a query sees, its own included. None: all.
    - `vmem_limit_bytes`: the vector memory that kernels may use, on TPUs. None: what the chip has.
    - `target`, `interpret`: see `paged.lower`.
    - `mesh`, `axes`, `in_specs`, `out_specs`: many devices, see `paged.compat`.

    **Returns:** ``(out, kv_pages)``. ``out`` has the queries' shape and dtype, and is 0 in rows of no sequence and in
    rows that see no key. ``kv_pages`` has the shape that was passed.

    Raises ``ValueError`` or ``TypeError``, when traced, naming the argument.

    >>> kv_pages, q, kv = jnp.zeros((8, 4, 2 * 2, 16)), jnp.ones((4, 4, 16)), jnp.ones((4, 2, 16))
    >>> out, kv_pages = ragged_page_attention_v3(q, kv, kv, kv_pages, [3, 1], [3, 1, 0, -1], [0, 3, 4], [0, 0, 2])
    >>> out.shape, float(kv_pages[3, :3].min())
    ((4, 4, 16), 1.0)
    """
    scale, soft_cap = ("softmax_scale", softmax_scale), ("logits_soft_cap", logits_soft_cap)
    named = {"queries": queries, "keys": keys, "values": values, "kv_pages": kv_pages, "context_lens": context_lens}
    named |= {"block_tables": block_tables, "query_start_loc": query_start_loc, "distribution": distribution}
    devices = Devices.of(mesh, axes, in_specs, out_specs, **named, softmax_aux=softmax_aux)
    hints = Hints.of_ragged(vmem_limit_bytes)
    options = Options.of(target, interpret, scale, soft_cap, sliding_window, hints=hints, devices=devices)
    given = arrays.as_arrays(**named)
    _require_ends(given[-1], given[4])
    return _update(options, *given, _sinks(softmax_aux))


@functools.partial(jax.jit, static_argnums=0)
def _attend(
    options: Options,
    query: Array,
    kv_pages: Array,
    context_lens: Array,
    block_tables: Array,
    query_start_loc: Array,
    num_seqs: Array,
    softmax_aux: Array | None,
) -> Array:
    q = arrays.rows_of("query", query)
    layout = arrays.interleaved_layout("kv_pages", kv_pages, q.shape[-1])
    slots = _require_sequences(context_lens, query_start_loc)
    arrays.require_shape("block_tables", block_tables, (slots, "pages_per_seq"), "[seqs, pages_per_seq]")
    arrays.require_integers("block_tables", block_tables)
    arrays.require_integers("num_seqs", num_seqs)
    if num_seqs.shape not in ((), (1,)):
        raise ValueError(f"num_seqs must be one number, [1] or []; got {tuple(num_seqs.shape)}.")
    arrays.require_heads("query", q.shape[1], "kv_pages", layout.num_kv_heads, _CACHE)
    batch = RaggedBatch(context_lens, block_tables, query_start_loc, num_seqs)
    sinks = arrays.sinks_of(softmax_aux, q.shape[1], layout.num_kv_heads)
    attend, wide = _prepare(options, q, kv_pages, layout, batch, sinks)
    pages = _pages(layout, kv_pages)
    pages = attend.adopt(pages) if isinstance(attend, ShardedAttend) else pages
    return _as_queries(attend(wide, pages, batch, sinks), query)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _update(
    options: Options,
    queries: Array,
    keys: Array,
    values: Array,
    kv_pages: Array,
    context_lens: Array,
    block_tables: Array,
    query_start_loc: Array,
    distribution: Array,
    softmax_aux: Array | None,
) -> tuple[Array, Array]:
    q, k = arrays.rows_of("queries", queries), arrays.rows_of("keys", keys)
    v = arrays.rows_of("values", values)
    arrays.require_shape("keys", k, (q.shape[0], "kv_heads", q.shape[2]), "[tokens, kv_heads, head_dim]")
    arrays.require_shape("values", v, k.shape, "[tokens, kv_heads, head_dim]")
    repeats = 1 if options.devices is None else options.devices.repeats(k.shape[1])
    layout = arrays.interleaved_layout("kv_pages", kv_pages, q.shape[-1], k.shape[1] * repeats)
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
    arrays.require_heads(
        "queries", q.shape[1], "kv_pages", layout.num_kv_heads, "[pages, page_size, 2 * kv_heads, dim]"
    )
    batch = RaggedBatch(context_lens, block_tables.reshape(slots, max(width, 1)), query_start_loc, distribution[2])
    sinks = arrays.sinks_of(softmax_aux, q.shape[1], layout.num_kv_heads)
    attend, wide = _prepare(options, q, kv_pages, layout, batch, sinks)
    k, v = (arrays.padded(x, layout.head_dim) for x in (k, v))
    out, pages = attend.update(wide, k, v, _pages(attend.layout, kv_pages), batch, sinks)
    return _as_queries(out, queries), pages.arrays[0].reshape(kv_pages.shape)


def _pages(layout: PageLayout, kv_pages: Array) -> Pages:
    """The pages, packed or not. A packed cache is the same bytes: a reshape under ``jax.jit`` moves nothing."""
    return layout.wrap(kv_pages.reshape(layout.array_shapes(kv_pages.shape[0])[0]))


def _as_queries(out: Array, query: Array) -> Array:
    """The output in the shape and dtype of the caller's queries."""
    out = out if out.shape[-1] == query.shape[-1] else out[..., : query.shape[-1]]
    out = out if out.dtype == query.dtype else out.astype(query.dtype)
    return out if query.ndim == 3 else out.reshape(query.shape)


def _prepare(
    options: Options, q: Array, kv_pages: Array, layout: PageLayout, batch: RaggedBatch, sinks: Sinks | None
) -> tuple[AnyAttend, Array]:
    """The attention, and the queries padded to the head dimension of the pages."""
    spec = options.spec(q.shape[1], q.shape[2], layout, sinks is not None)
    wide = arrays.padded(q.astype(jnp.float32) if options.is_float32 else q, layout.head_dim)
    call = Call(wide.shape[0], batch.num_slots, batch.pages_per_seq, kv_pages.shape[0], None, jnp.dtype(wide.dtype))
    how = (options.target, options.interpret, options.hints, spec, layout, call)
    return lowered(*how) if options.devices is None else lowered_on(options.devices, *how), wide


def _require_sequences(context_lens: Array, query_start_loc: Array) -> int:
    """The number of sequence slots."""
    arrays.require_shape("context_lens", context_lens, ("seqs",), "[seqs]")
    arrays.require_integers("context_lens", context_lens)
    slots = context_lens.shape[0]
    arrays.require_shape("query_start_loc", query_start_loc, (slots + 1,), "[seqs + 1], with context_lens' seqs,")
    arrays.require_integers("query_start_loc", query_start_loc)
    return slots


def _require_known_num_seqs(num_seqs: Any, context_lens: Any) -> None:
    """Check the value of ``num_seqs`` where it is known. `_attend` checks its shape and dtype."""
    if not isinstance(num_seqs, np.ndarray | np.integer) or num_seqs.size != 1 or num_seqs.dtype.kind not in "iu":
        return
    if len(context_lens.shape) == 1 and not 0 <= int(num_seqs.reshape(())) <= context_lens.shape[0]:
        raise ValueError(
            f"num_seqs must be in [0, {context_lens.shape[0]}], the number of context_lens; got "
            f"{int(num_seqs.reshape(()))}."
        )


def _require_ends(distribution: Any, context_lens: Any) -> None:
    """Check the values of ``distribution`` where they are known. `_update` checks its shape and dtype."""
    if isinstance(distribution, jax.core.Tracer | jax.ShapeDtypeStruct):
        return
    if distribution.shape != (3,) or distribution.dtype.kind not in "iu" or len(context_lens.shape) != 1:
        return
    decode_end, prefill_end, total = np.asarray(distribution).tolist()
    if not 0 <= decode_end <= prefill_end <= total <= context_lens.shape[0]:
        raise ValueError(
            "distribution must be [decode_end, prefill_end, total], ends of ranges of sequences, which do not decrease "
            f"and are at most context_lens' {context_lens.shape[0]}; got {[decode_end, prefill_end, total]}. [0, 0, n] "
            "will do for n live sequences of any kind."
        )


def _sinks(softmax_aux: Any) -> Any:
    if softmax_aux is None or hasattr(softmax_aux, "shape"):
        return softmax_aux
    return np.asarray(softmax_aux, np.float32)
