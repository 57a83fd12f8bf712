"""Entry points over a cache of two arrays ``[kv_heads, pages, page_size, head_dim]``: decode, and one prompt."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from paged.lower import Axes, Call
from paged.spec import PageLayout, RaggedBatch

from . import arrays
from .arrays import AnyArray
from .devices import Devices
from .hints import Hints, lowered, lowered_on
from .static import MASK_VALUE, Options

_CACHE = "[kv_heads, pages, page_size, head_dim]"


def page_attention(
    query: Float[Array, "*seqs q_heads head_dim"],
    key_cache: Shaped[Array, "kv_heads pages page_size head_dim"],
    value_cache: Shaped[Array, "kv_heads pages page_size value_dim"],
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
    sliding_window: int | None = None,
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
    - `key_cache`, `value_cache`: the pages.
    - `context_lens`: how many tokens each sequence has, the query's own included.
    - `block_tables`: token ``j`` of sequence ``s`` lies in page ``block_tables[s, j // page_size]``. Entries that no
      visible token needs may hold anything.
    - `attn_scale`: scale of scores. None: ``1 / sqrt(head_dim)``.
    - `max_context_len`: a promise that no sequence is longer. Table entries beyond it are not read. A longer sequence
      breaks the promise, and is cut.
    - `num_splits`, `pages_per_compute_block`, `inline_seq_dim`: the kernel's schedule on TPUs. Any schedule gives the
      same attention; 0 and None leave it to `paged`.
    - `mask_value`: not needed. Values that could change a result are refused.
    - `attn_logits_soft_cap`: scores become ``cap * tanh(score / cap)``, before the mask. None: no cap.
    - `megacore_mode`: ``"batch"`` and None use both cores of a chip that has two. ``"kv_head"`` is refused.
    - `sliding_window`: how many tokens a query sees, its own included. None: all.
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
    )
    return _decode(options, *arrays.as_arrays(**named))


def prefill_page_attention(
    query: Float[Array, "*chunk q_heads head_dim"],
    key_cache: Shaped[Array, "kv_heads pages page_size head_dim"],
    value_cache: Shaped[Array, "kv_heads pages page_size value_dim"],
    context_len: Int[AnyArray, "..."] | Sequence[Any] | int,
    page_indices: Int[AnyArray, " num_pages"] | Sequence[Any],
    /,
    *,
    softmax_scale: float | None = None,
    mask_value: float | None = MASK_VALUE,
    attn_logits_soft_cap: float | None = None,
    sliding_window: int | None = None,
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
    - `key_cache`, `value_cache`: the pages.
    - `context_len`: how many tokens the sequence has, the chunk's own included.
    - `page_indices`: token ``j`` lies in page ``page_indices[j // page_size]``. Entries that no visible token needs may
      hold anything.
    - `softmax_scale`: scale of scores. None: ``1 / sqrt(head_dim)``.
    - `mask_value`: not needed. Values that could change a result are refused.
    - `attn_logits_soft_cap`: scores become ``cap * tanh(score / cap)``, before the mask. None: no cap.
    - `sliding_window`: how many tokens a query sees, its own included. None: all.
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
    options = Options.of(target, interpret, scale, soft_cap, sliding_window, mask_value, devices=devices)
    return _prefill(options, *arrays.as_arrays(**named))


@functools.partial(jax.jit, static_argnums=0)
def _decode(
    options: Options, query: Array, key_cache: Array, value_cache: Array, context_lens: Array, block_tables: Array
) -> Array:
    q = arrays.rows_of("query", query, seq=1)
    arrays.require_shape("context_lens", context_lens, (q.shape[0],), "[seqs], one per row of query,")
    arrays.require_integers("context_lens", context_lens)
    arrays.require_shape("block_tables", block_tables, (q.shape[0], "max_blocks"), "[seqs, max_blocks]")
    arrays.require_integers("block_tables", block_tables)
    layout = _layout(q, key_cache, value_cache)
    if options.max_context_len is not None:
        entries = -(-options.max_context_len // layout.page_size)
        block_tables = block_tables[:, :entries]
        context_lens = jnp.minimum(context_lens, options.max_context_len)
    return _attend(options, query, q, (key_cache, value_cache), layout, RaggedBatch.decode(context_lens, block_tables))


@functools.partial(jax.jit, static_argnums=0)
def _prefill(
    options: Options, query: Array, key_cache: Array, value_cache: Array, context_len: Array, page_indices: Array
) -> Array:
    if query.ndim == 4:
        arrays.require_shape("query", query, (1, "chunk", "heads", "head_dim"), "[1, chunk, heads, head_dim]")
    q = arrays.rows_of("query", query)
    if context_len.shape != ():
        arrays.require_shape("context_len", context_len, (1,), "one sequence's, [1]")
    arrays.require_integers("context_len", context_len)
    arrays.require_shape("page_indices", page_indices, ("num_pages",), "one sequence's, [num_pages]")
    arrays.require_integers("page_indices", page_indices)
    layout = _layout(q, key_cache, value_cache)
    batch = RaggedBatch.prefill(context_len, page_indices, q.shape[0])
    return _attend(options, query, q, (key_cache, value_cache), layout, batch)


def _layout(q: Array, key_cache: Array, value_cache: Array) -> PageLayout:
    dims = ("kv_heads", "pages", "page_size")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        arrays.require_pages(name, cache)
        last = q.shape[-1] if name == "key_cache" else "value_dim"
        arrays.require_shape(name, cache, (*dims, last), _CACHE)
    arrays.require_shape("value_cache", value_cache, (*key_cache.shape[:3], "value_dim"), f"{_CACHE} as key_cache")
    if value_cache.dtype != key_cache.dtype:
        raise TypeError(
            f"value_cache must be of key_cache's dtype, {key_cache.dtype.name}; got {value_cache.dtype.name}."
        )
    kv_heads, _, page_size, head_dim = key_cache.shape
    arrays.require_heads("query", q.shape[1], "key_cache", kv_heads, _CACHE)
    return PageLayout(
        page_size=page_size,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_cache.shape[-1],
        dtype=key_cache.dtype,
        order="split",
    )


def _attend(
    options: Options, query: Array, q: Array, caches: tuple[Array, Array], layout: PageLayout, batch: RaggedBatch
) -> Array:
    spec, pages = options.spec(q.shape[1], q.shape[2], layout), layout.wrap(*caches)
    how = (options.target, options.interpret, options.hints, spec, layout, Call.of(q, pages, batch))
    if options.devices is None:
        out = lowered(*how)(q, pages, batch)
    else:
        attend = lowered_on(options.devices, *how)
        out = attend(q, attend.adopt(pages), batch)
    return out if query.ndim == 3 else out.reshape(*query.shape[:-1], layout.value_dim)
