"""Entry points over a cache of two arrays ``[kv_heads, pages, page_size, head_dim]``: decode, and one prompt."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from paged.lower import Axes, Call
from paged.spec import PageLayout, Pages, RaggedBatch

from . import arrays
from .arrays import AnyArray, QuantisedPages
from .caches import SPLIT_ORDERS, order_of, pages_of_single_heads, split_layout, split_pages
from .devices import Devices
from .explaining import answer_if_asked
from .hints import Hints, lowered, lowered_on
from .names import WORDS, knows
from .static import MASK_VALUE, Options


@knows(WORDS["page_attention"])
def page_attention(
    query: Float[Array, "*seqs q_heads head_dim"],
    key_cache: Shaped[Array, "kv_heads pages page_size head_dim"] | QuantisedPages,
    value_cache: Shaped[Array, "kv_heads pages page_size value_dim"] | QuantisedPages,
    context_lens: Int[AnyArray, " seqs"] | Sequence[Any],
    block_tables: Int[AnyArray, "seqs max_blocks"] | Sequence[Any],
    attn_scale: float | None = None,
    max_context_len: int | None = None,
    num_splits: int = 0,
    *,
    mask_value: float | None = MASK_VALUE,
    attn_logits_soft_cap: float | None = None,
    pages_per_compute_block: int | None = None,
    megacore_mode: str | None = None,
    inline_seq_dim: bool = True,
    sliding_window: int | tuple[int, int] | None = None,
    cache_order: str | None = None,
    target: str = "auto",
    interpret: Any = False,
    mesh: Mesh | None = None,
    axes: Axes | None = None,
    in_specs: Any = None,
    out_specs: Any = None,
) -> Float[Array, "*seqs q_heads value_dim"]:
    """Decode: attention of one query row per sequence over the pages of that sequence.

    **Arguments:**

    - `query`: one row per sequence, or ``[batch, 1, q_heads, head_dim]``.
    - `key_cache`, `value_cache`: the pages; or quantised pages, objects with int8 ``weight`` and float ``scales``
      ``[..., 1]``, as JAX's ``QuantizedTensor``: keys are ``weight * scales / 127.5``.
    - `context_lens`: how many tokens each sequence has, the query's own included.
    - `block_tables`: token ``j`` of sequence ``s`` lies in page ``block_tables[s, j // page_size]``. Entries that no
      visible token needs may hold anything.
    - `attn_scale`: scale of scores. None: ``1 / sqrt(head_dim)``.
    - `max_context_len`: a promise that no sequence is longer. Table entries beyond it are not read. A longer sequence
      breaks the promise, and is cut.
    - `num_splits`, `pages_per_compute_block`, `megacore_mode`, `inline_seq_dim`: hints about the kernel on TPUs. The
      nearest schedule runs, and `explain` says which. Any schedule gives the same attention; 0 and None leave it to
      `paged`. Kernels always use both cores of a chip that has two.
    - `mask_value`: not needed. Values that could change a result are refused.
    - `attn_logits_soft_cap`: scores become ``cap * tanh(score / cap)``, before the mask. None: no cap.
    - `sliding_window`: how many tokens a query sees, its own included; or a pair of how many to its left and right.
      None: all.
    - `cache_order`: ``"heads_first"``, as above, or ``"pages_first"``, ``[pages, kv_heads, page_size, head_dim]``,
      which is not copied either. None is for the first; where the shapes fit both it raises.
    - `target`, `interpret`: see `paged.lower`.
    - `mesh`, `axes`, `in_specs`, `out_specs`: many devices, see `paged.compat`.

    **Returns:** the output in the query's shape and dtype, 0 for a sequence of length 0.

    Raises ``ValueError`` or ``TypeError``, when traced, naming the argument.

    >>> cache = jnp.ones((2, 8, 4, 16))
    >>> out = page_attention(jnp.ones((2, 4, 16)), cache, cache, [5, 0], [[3, 1], [-1, -1]], sliding_window=3)
    >>> out.shape, out[:, 0, 0].tolist()
    ((2, 4, 16), [1.0, 0.0])
    """
    named = {"query": query, "key_cache": key_cache, "value_cache": value_cache}
    named |= {"context_lens": context_lens, "block_tables": block_tables}
    options = Options.of(
        target,
        interpret,
        ("attn_scale", attn_scale),
        ("attn_logits_soft_cap", attn_logits_soft_cap),
        sliding_window,
        mask_value,
        Hints.of_decode(num_splits, pages_per_compute_block, megacore_mode, inline_seq_dim),
        max_context_len,
        devices=Devices.of(mesh, axes, in_specs, out_specs, **named),
        cache_order=order_of(cache_order, SPLIT_ORDERS),
    )
    return _decode(options, *arrays.as_arrays(**named))


@knows(WORDS["prefill_page_attention"])
def prefill_page_attention(
    query: Float[Array, "*chunk q_heads head_dim"],
    key_cache: Shaped[Array, "kv_heads pages page_size head_dim"] | QuantisedPages,
    value_cache: Shaped[Array, "kv_heads pages page_size value_dim"] | QuantisedPages,
    context_len: Int[AnyArray, "..."] | Sequence[Any] | int,
    page_indices: Int[AnyArray, " num_pages"] | Sequence[Any],
    *,
    softmax_scale: float | None = None,
    mask_value: float | None = MASK_VALUE,
    attn_logits_soft_cap: float | None = None,
    sliding_window: int | tuple[int, int] | None = None,
    cache_order: str | None = None,
    target: str = "auto",
    interpret: Any = False,
    mesh: Mesh | None = None,
    axes: Axes | None = None,
    in_specs: Any = None,
    out_specs: Any = None,
) -> Float[Array, "*chunk q_heads value_dim"]:
    """Prefill: causal attention of one sequence's chunk, the last rows of its tokens, over the pages of that sequence.

    The pages hold the chunk's own keys and values already. Row ``i`` of a chunk of ``n`` rows has the position
    ``context_len - n + i``.

    **Arguments:**

    - `query`: the chunk's rows, or ``[1, chunk, q_heads, head_dim]``.
    - `key_cache`, `value_cache`: the pages; or quantised pages, objects with int8 ``weight`` and float ``scales``
      ``[..., 1]``, as JAX's ``QuantizedTensor``: keys are ``weight * scales / 127.5``.
    - `context_len`: how many tokens the sequence has, the chunk's own included.
    - `page_indices`: token ``j`` lies in page ``page_indices[j // page_size]``. Entries that no visible token needs may
      hold anything.
    - `softmax_scale`: scale of scores. None: ``1 / sqrt(head_dim)``.
    - `mask_value`: not needed. Values that could change a result are refused.
    - `attn_logits_soft_cap`: scores become ``cap * tanh(score / cap)``, before the mask. None: no cap.
    - `sliding_window`, `cache_order`: see `page_attention`.
    - `target`, `interpret`: see `paged.lower`.
    - `mesh`, `axes`, `in_specs`, `out_specs`: many devices, see `paged.compat`.

    **Returns:** the output in the query's shape and dtype, 0 in rows that see no key.

    Raises ``ValueError`` or ``TypeError``, when traced, naming the argument.

    >>> cache = jnp.ones((2, 8, 4, 16))
    >>> prefill_page_attention(jnp.ones((3, 4, 16)), cache, cache, jnp.array([6]), jnp.array([3, 1])).shape
    (3, 4, 16)
    """
    scale, soft_cap = ("softmax_scale", softmax_scale), ("attn_logits_soft_cap", attn_logits_soft_cap)
    named = {"query": query, "key_cache": key_cache, "value_cache": value_cache}
    named |= {"context_len": context_len, "page_indices": page_indices}
    devices = Devices.of(mesh, axes, in_specs, out_specs, **named)
    order = order_of(cache_order, SPLIT_ORDERS)
    options = Options.of(
        target, interpret, scale, soft_cap, sliding_window, mask_value, devices=devices, cache_order=order
    )
    return _prefill(options, *arrays.as_arrays(**named))


@functools.partial(jax.jit, static_argnums=0)
def _decode(
    options: Options, query: Any, key_cache: Any, value_cache: Any, context_lens: Any, block_tables: Any
) -> Array:
    q = arrays.rows_of("query", query, seq=1)
    arrays.require_shape("context_lens", context_lens, (q.shape[0],), "[seqs], one per row of query,")
    arrays.require_integers("context_lens", context_lens)
    arrays.require_shape("block_tables", block_tables, (q.shape[0], "max_blocks"), "[seqs, max_blocks]")
    arrays.require_integers("block_tables", block_tables)
    layout, is_pages_first = split_layout(options, q, key_cache, value_cache)
    if options.max_context_len is not None:
        entries = -(-options.max_context_len // layout.page_size)
        block_tables = block_tables[:, :entries]
        context_lens = jnp.minimum(context_lens, options.max_context_len)
    caches = key_cache, value_cache
    if is_pages_first:
        return _attend_by_heads(options, query, q, caches, layout, context_lens, block_tables, 1)
    pages, batch = split_pages(layout, *caches), RaggedBatch.decode(context_lens, block_tables)
    return _as_query(_attend(options, q, pages, batch), query)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(
    options: Options, query: Any, key_cache: Any, value_cache: Any, context_len: Any, page_indices: Any
) -> Array:
    if query.ndim == 4:
        arrays.require_shape("query", query, (1, "chunk", "heads", "head_dim"), "[1, chunk, heads, head_dim]")
    q = arrays.rows_of("query", query)
    if context_len.shape != ():
        arrays.require_shape("context_len", context_len, (1,), "one sequence's, [1]")
    arrays.require_integers("context_len", context_len)
    arrays.require_shape("page_indices", page_indices, ("num_pages",), "one sequence's, [num_pages]")
    arrays.require_integers("page_indices", page_indices)
    layout, is_pages_first = split_layout(options, q, key_cache, value_cache)
    caches, rows = (key_cache, value_cache), q.shape[0]
    if is_pages_first:
        length, table = context_len.reshape(1), page_indices[None]
        return _attend_by_heads(options, query, q, caches, layout, length, table, rows)
    pages, batch = split_pages(layout, *caches), RaggedBatch.prefill(context_len, page_indices, rows)
    return _as_query(_attend(options, q, pages, batch), query)


def _attend_by_heads(
    options: Options,
    query: Any,
    q: Any,
    caches: tuple[Any, Any],
    layout: PageLayout,
    lengths: Any,
    tables: Any,
    rows: int,
) -> Array:
    """Attention over caches in ``"pages_first"`` order, in place: each KV head of a sequence is a sequence of its own.

    Every sequence has ``rows`` query rows. Its page ``t`` of KV head ``h`` is page ``t * kv_heads + h`` of the pool
    that `pages_of_single_heads` makes of the caches.
    """
    if options.devices is not None:
        raise ValueError(
            'cache_order="pages_first" cannot be divided among devices: jnp.swapaxes(cache, 0, 1) makes it '
            '"heads_first", which can.'
        )
    heads, (slots, width) = layout.num_kv_heads, tables.shape
    group = q.shape[1] // heads
    pages = pages_of_single_heads(layout, *caches)
    is_page = (tables >= 0) & (tables < pages.num_pages // heads)
    own = jnp.where(is_page, tables, -1)[:, None] * heads + jnp.arange(heads, dtype=tables.dtype)[None, :, None]
    own = jnp.where(is_page[:, None], own, -1).reshape(slots * heads, width)
    batch = RaggedBatch.decode(jnp.repeat(lengths, heads), own, query_rows=rows)
    q = jnp.swapaxes(q.reshape(slots, rows, heads, group, q.shape[-1]), 1, 2)
    out = _attend(options, q.reshape(slots * heads * rows, group, q.shape[-1]), pages, batch)
    out = jnp.swapaxes(out.reshape(slots, heads, rows, group, out.shape[-1]), 1, 2)
    return _as_query(out.reshape(slots * rows, heads * group, out.shape[-1]), query)


def _attend(options: Options, q: Any, pages: Pages, batch: RaggedBatch) -> Array:
    spec = options.spec(q.shape[1], q.shape[2], pages.layout)
    how = (options.target, options.interpret, options.hints, spec, pages.layout, Call.of(q, pages, batch))
    if options.devices is None:
        attend = lowered(*how)
        answer_if_asked(attend, q, pages, batch)
        return attend(q, pages, batch)
    attend = lowered_on(options.devices, *how)
    pages = attend.adopt(pages)
    answer_if_asked(attend, q, pages, batch)
    return attend(q, pages, batch)


def _as_query(out: Array, query: Any) -> Array:
    """The output in the shape of the caller's query."""
    return out if query.ndim == 3 else out.reshape(*query.shape[:-1], out.shape[-1])
