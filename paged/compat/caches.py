"""The layout of a caller's cache: which order its bytes are in, told by shapes, by what is declared, or not at all.

An order is never guessed. Where two orders fit a shape, the caller says which one by ``cache_order``.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from paged.spec import FLOAT_DTYPES, QUANTISED_DTYPES, PageLayout, Pages

from .arrays import Quantised, require_shape
from .static import Options

SPLIT_ORDERS = (None, "heads_first", "pages_first")
RAGGED_ORDERS = (None, "interleaved", "joined")
HEADS_FIRST = "[kv_heads, pages, page_size, head_dim]"
_PAGES_FIRST = "[pages, kv_heads, page_size, head_dim]"
_INTERLEAVED = (
    "[pages, page_size, 2 * kv_heads, head_dim], or packed [pages, page_size, 2 * kv_heads / pack, pack, head_dim]"
)
_LANES = 128
_PACKS = (1, 2, 4)  # heads in one 32-bit word: of 32, 16 and 8 bits
# JAX's quantised pages hold 127.5 * key / scale.
_MOST_INT8 = 127.5


def order_of(cache_order: Any, known: tuple[Any, ...]) -> Any:
    """The declared order of a cache, one of ``known``."""
    if cache_order is not None and cache_order not in known:
        raise ValueError(f"cache_order must be one of {known}; got {cache_order!r}.")
    return cache_order


def split_layout(options: Options, q: Any, key_cache: Any, value_cache: Any) -> tuple[PageLayout, bool]:
    """The layout of two caches, ``"heads_first"``, and whether it is ``"pages_first"`` instead."""
    quantised = [isinstance(cache, Quantised) for cache in (key_cache, value_cache)]
    if quantised[0] != quantised[1]:
        raise TypeError("key_cache and value_cache must both be quantised, or neither.")
    keys, values = (cache.weight if isinstance(cache, Quantised) else cache for cache in (key_cache, value_cache))
    for name, cache in (("key_cache", keys), ("value_cache", values)):
        _require_dtype(name, cache, quantised[0])
        last = q.shape[-1] if name == "key_cache" else "value_dim"
        require_shape(name, cache, ("kv_heads", "pages", "page_size", last), HEADS_FIRST)
    require_shape("value_cache", values, (*keys.shape[:3], "value_dim"), f"{HEADS_FIRST} as key_cache")
    if values.dtype != keys.dtype:
        raise TypeError(f"value_cache must be of key_cache's dtype, {keys.dtype.name}; got {values.dtype.name}.")
    is_pages_first = _is_pages_first(options.cache_order, q.shape[1], keys.shape)
    kv_heads, _, page_size, head_dim = keys.shape
    layout = PageLayout(
        page_size=page_size,
        num_kv_heads=keys.shape[1] if is_pages_first else kv_heads,
        head_dim=head_dim,
        value_dim=values.shape[-1],
        dtype=keys.dtype,
        order="split",
        scales="token" if quantised[0] else None,
    )
    return layout, is_pages_first


def _is_pages_first(declared: str | None, heads: int, shape: tuple[int, ...]) -> bool:
    # A symbolic number, of an export, divides nothing for certain.
    by_heads, by_pages = (isinstance(n, int) and heads % n == 0 for n in shape[:2])
    fits = {"heads_first": by_heads, "pages_first": by_pages}
    if declared is not None and not fits[declared]:
        kv_heads, order = (shape[0], HEADS_FIRST) if declared == "heads_first" else (shape[1], _PAGES_FIRST)
        raise ValueError(
            f"query has {heads} heads, which must be a multiple of the {kv_heads} KV heads of key_cache, {order} by "
            f'cache_order="{declared}".'
        )
    if declared is None and fits["heads_first"] and fits["pages_first"] and shape[0] != 1:
        raise ValueError(
            f"key_cache {tuple(shape)} is {HEADS_FIRST} or {_PAGES_FIRST}: both fit query's {heads} heads. Say "
            'cache_order="heads_first" or cache_order="pages_first".'
        )
    if declared is None and not fits["heads_first"]:
        others = f' It fits {_PAGES_FIRST}: for that, say cache_order="pages_first".' if fits["pages_first"] else ""
        raise ValueError(
            f"query has {heads} heads, which must be a multiple of the {shape[0]} KV heads of key_cache; key_cache is "
            f"{HEADS_FIRST}, and no other order is guessed.{others}"
        )
    return declared == "pages_first"


def split_pages(layout: PageLayout, key_cache: Any, value_cache: Any) -> Pages:
    """The pages of two caches in ``"heads_first"`` order, not copied. Scales of quantised pages are copied."""
    if not isinstance(key_cache, Quantised):
        return layout.wrap(key_cache, value_cache)
    scales = [_token_scales(*named) for named in (("key_cache", key_cache), ("value_cache", value_cache))]
    scales = [jnp.swapaxes(scale, 0, 1) for scale in scales]
    return layout.wrap(key_cache.weight, value_cache.weight, k_scale=scales[0], v_scale=scales[1])


def pages_of_single_heads(layout: PageLayout, key_cache: Any, value_cache: Any) -> Pages:
    """Caches in ``"pages_first"`` order as a pool of pages that hold one head each; nothing is copied but scales.

    Page ``t`` of KV head ``h`` is page ``t * kv_heads + h`` of that pool.
    """
    one = layout.replace(num_kv_heads=1)
    if not isinstance(key_cache, Quantised):
        return one.wrap(*(x.reshape(1, -1, *x.shape[2:]) for x in (key_cache, value_cache)))
    scales = [_token_scales(*named) for named in (("key_cache", key_cache), ("value_cache", value_cache))]
    scales = [scale.reshape(-1, 1, layout.page_size) for scale in scales]
    arrays = [cache.weight.reshape(1, -1, *cache.weight.shape[2:]) for cache in (key_cache, value_cache)]
    return one.wrap(*arrays, k_scale=scales[0], v_scale=scales[1])


def _token_scales(name: str, cache: Quantised) -> Array:
    """The scales by which numbers are multiplied, [..., page_size], of a cache whose scales are largest numbers."""
    require_shape(f"{name}.scales", cache.scales, (*cache.weight.shape[:-1], 1), "one scale for each row of its weight")
    if cache.scales.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}.scales must be float16, bfloat16 or float32; got {cache.scales.dtype.name}.")
    return cache.scales[..., 0].astype(jnp.float32) * np.float32(1.0 / _MOST_INT8)


def _require_dtype(name: str, cache: Any, is_quantised: bool) -> None:
    """``TypeError`` unless the cache is of floats, or of int8 where its scales are beside it."""
    if is_quantised and cache.dtype != jnp.int8:
        raise TypeError(f"{name}.weight must be int8; got {cache.dtype.name}.")
    if not is_quantised and cache.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float16, bfloat16 or float32; got {cache.dtype.name}. Quantised pages need their scales: "
            "pass an object with weight, int8, and scales, as JAX's QuantizedTensor; or adopt them by "
            "paged.PageLayout(..., scales=...).wrap(..., k_scale=, v_scale=), and attend by paged.lower."
        )


def ragged_layout(options: Options, name: str, cache: Any, q: Any, kv_heads: int | None = None) -> PageLayout:
    """The layout of one cache, as ``"interleaved"`` pages. ``kv_heads`` is the number that the call's keys have.

    The order ``"joined"``, with key and value of a head side by side in one row, is the same bytes with rows of half
    the width: the key of head ``h`` is then head ``2 * h``, and its value the next.
    """
    scales = _scales_of(options, name, cache)
    if cache.ndim not in (4, 5) or 0 in cache.shape:
        raise ValueError(f"{name} must be {_INTERLEAVED}; got {tuple(cache.shape)}.")
    head_dim, dim = q.shape[-1], cache.shape[-1]
    heads = cache.size // (cache.shape[0] * cache.shape[1] * dim)
    if options.cache_order is None:
        _require_no_other_order(name, cache)
    if _is_joined(options.cache_order, name, cache, q, heads, kv_heads):
        dim, heads = head_dim, 2 * heads
    if heads % 2 or (kv_heads is not None and heads != 2 * kv_heads):
        need = "an even number of heads" if kv_heads is None else f"2 * {kv_heads} heads, keys' {kv_heads} twice"
        raise ValueError(
            f"{name} must be {_INTERLEAVED}, keys on even heads and values on odd ones, with {need}; got "
            f"{tuple(cache.shape)}, {heads} heads."
        )
    padded = -(-head_dim // _LANES) * _LANES
    if dim not in (head_dim, padded):
        raise ValueError(
            f"{name} must have the queries' head_dim of {head_dim}, or {padded}, that padded with zeros to whole "
            f"lanes; got {tuple(cache.shape)}."
        )
    return PageLayout(
        page_size=cache.shape[1],
        num_kv_heads=heads // 2,
        head_dim=dim,
        dtype=cache.dtype,
        order="interleaved",
        scales=scales,
    )


def _scales_of(options: Options, name: str, cache: Any) -> Any:
    """``"tensor"`` for quantised pages, whose scales the call must have; None for pages of floats."""
    if cache.dtype in FLOAT_DTYPES:
        return None
    more = options.more
    if cache.dtype not in QUANTISED_DTYPES or more is None or more.k_scale is None or more.v_scale is None:
        raise TypeError(
            f"{name} must be float16, bfloat16 or float32; got {cache.dtype.name}. int8 and float8 pages need k_scale "
            "and v_scale, a number for all keys and one for all values (1.0 if there is none). For per-head and "
            "per-token scales, see paged.PageLayout(..., scales=...) and paged.lower."
        )
    return "tensor"


def _require_no_other_order(name: str, cache: Any) -> None:
    """Raise for five dimensions that another order has, and no packed cache of a TPU."""
    if cache.ndim == 5 and (cache.shape[3] not in _PACKS or cache.shape[1] == 2):
        raise ValueError(
            f"{name} {tuple(cache.shape)} does not look like packed pages, [pages, page_size, 2 * kv_heads / pack, "
            "pack, head_dim] with a pack of 1, 2 or 4 heads: [pages, 2, kv_heads, page_size, head_dim] is "
            'paged.PageLayout(order="packed"), for paged.lower. If it is packed, say cache_order="interleaved".'
        )


def _is_joined(declared: str | None, name: str, cache: Any, q: Any, heads: int, kv_heads: int | None) -> bool:
    """Whether keys and values lie side by side in one row. Raises where shapes cannot tell and nothing is declared."""
    q_heads, head_dim = q.shape[1:]
    is_possible = cache.shape[-1] == 2 * head_dim and cache.shape[-1] % _LANES == 0
    if declared == "joined" and not is_possible:
        raise ValueError(
            f'{name} must have rows of 2 * {head_dim}, whole lanes of 128, for cache_order="joined"; got '
            f"{tuple(cache.shape)}."
        )
    if declared is not None or not is_possible:
        return declared == "joined"
    if cache.shape[-1] != _LANES:
        return True  # rows of heads on their own are padded to fewer lanes
    pack = cache.shape[3] if cache.ndim == 5 else 1
    if kv_heads is None:
        fits_joined, fits_interleaved = q_heads % heads == 0, heads % 2 == 0 and q_heads % (heads // 2) == 0
    else:
        # The caches of 64 lanes have their heads padded to whole packs.
        fits_joined, fits_interleaved = heads == -(-kv_heads // pack) * pack, heads == 2 * kv_heads
    if fits_joined and fits_interleaved:
        raise ValueError(
            f"{name} {tuple(cache.shape)} has rows of 128 for a head_dim of 64: keys and values side by side, or each "
            'padded with zeros. Say cache_order="joined" or cache_order="interleaved".'
        )
    return fits_joined


def ragged_pages(options: Options, layout: PageLayout, kv_pages: Any) -> Pages:
    """The pages of one cache, packed or not. A packed cache is the same bytes: under ``jax.jit`` nothing moves."""
    array = kv_pages.reshape(layout.array_shapes(kv_pages.shape[0])[0])
    if not layout.is_quantised or options.more is None:
        return layout.wrap(array)
    k_scale, v_scale = (jnp.asarray(x, jnp.float32) for x in (options.more.k_scale, options.more.v_scale))
    return layout.wrap(array, k_scale=k_scale, v_scale=v_scale)
