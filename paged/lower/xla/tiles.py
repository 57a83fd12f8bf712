"""Tiles of keys and values: pages of any order in, one contiguous float32 tile per KV head out, and back for gradients.

A tile is gathered once and used at once, while it is in the cache.
"""

from typing import Any, assert_never

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged.spec import PageLayout, Pages

from ..program import select_values
from .cpu import Buffers, Tile, as_bits, from_bits


def keys(pages: Pages, ids: Int[Array, " pages_per_block"], counter: Any, buffers: Buffers) -> tuple[Tile, Buffers]:
    """The keys of a page block, and the buffers that now hold them."""
    return buffers.put_keys(lambda first, last: gather(pages, ids[first:last], counter)[0], ids.shape[0])


def values(
    pages: Pages,
    ids: Int[Array, " pages_per_block"],
    counter: Any,
    buffers: Buffers,
    is_visible: Bool[Array, "1 group_rows keys"] | None,
) -> tuple[Tile, Buffers]:
    """The values of a page block, 0 for keys that no row sees, and the buffers that now hold them."""
    size = pages.layout.page_size

    def take(first: int, last: int) -> Tile:
        _, v = gather(pages, ids[first:last], counter)
        return v if is_visible is None else select_values(is_visible[..., first * size : last * size], v)

    return buffers.put_values(take, ids.shape[0])


def gather(pages: Pages, ids: Int[Array, " block"], counter: Any) -> tuple[Tile, Tile]:
    """Keys and values of the pages ``ids``, in that order, dequantised: ``[kv_heads, block * page_size, dim]``.

    ``ids`` must be in the pool. ``counter`` is the counter of the loop that this is called in: see `as_bits`.
    """
    layout = pages.layout
    pools = tuple(as_bits(pool, counter) for pool in pages.arrays)
    match layout.order:
        case "packed":
            # Keys and values of page i are rows 2i and 2i + 1 of one array.
            rows = pools[0].reshape(-1, *pools[0].shape[2:])
            raw = _take(rows, 2 * ids, axis=0), _take(rows, 2 * ids + 1, axis=0)
        case "joined":
            both = _take(pools[0], ids, axis=0)
            raw = both[..., : layout.head_dim], both[..., layout.value_lane : layout.value_lane + layout.value_dim]
        case "split":
            raw = _take(pools[0], ids, axis=1), _take(pools[1], ids, axis=1)
        case "interleaved":
            heads = 2 * jnp.arange(layout.num_kv_heads, dtype=jnp.int32)[:, None]
            pool = pools[0].at[ids, :, heads], pools[0].at[ids, :, heads + 1]
            raw = tuple(half.get(mode="promise_in_bounds") for half in pool)
        case _:
            assert_never(layout.order)
    scales = (pages.k_scale, pages.v_scale)
    k, v = (_dequantise(x, layout, scale, ids) for x, scale in zip(raw, scales, strict=True))
    return k, v


def scatter_add(
    layout: PageLayout, pools: tuple[Array, ...], ids: Int[Array, " block"], k: Tile, v: Tile
) -> tuple[Array, ...]:
    """The transpose of `gather` for float pages: add tiles to pool-shaped float32 accumulators."""
    heads = jnp.arange(layout.num_kv_heads, dtype=jnp.int32)[:, None]
    k, v = (tile.reshape(layout.num_kv_heads, ids.shape[0], layout.page_size, -1) for tile in (k, v))
    pool = pools[0]
    match layout.order:
        case "packed":
            return (pool.at[ids, 0, heads].add(k).at[ids, 1, heads].add(v),)
        case "joined":
            first, last = layout.value_lane, layout.value_lane + layout.value_dim
            return (pool.at[ids, heads, :, : layout.head_dim].add(k).at[ids, heads, :, first:last].add(v),)
        case "split":
            return tuple(pool.at[heads, ids].add(tile) for pool, tile in zip(pools, (k, v), strict=True))
        case "interleaved":
            return (pool.at[ids, :, 2 * heads].add(k).at[ids, :, 2 * heads + 1].add(v),)
        case _:
            assert_never(layout.order)


def _take(pool: Array, ids: Int[Array, " block"], axis: int) -> Array:
    """Entries of ``pool [.., pages, ..]``, with heads first: ``[kv_heads, block, page_size, dim]``, in one pass."""
    numbers = jax.lax.GatherDimensionNumbers((0, 2, 3), collapsed_slice_dims=(axis,), start_index_map=(axis,))
    sizes = tuple(1 if i == axis else size for i, size in enumerate(pool.shape))
    return jax.lax.gather(pool, ids[:, None], numbers, sizes, mode="promise_in_bounds")


def _dequantise(bits: Array, layout: PageLayout, scale: Array | None, ids: Int[Array, " block"]) -> Tile:
    """``[kv_heads, block, page_size, dim]`` of a page's bits to a float32 tile."""
    tile = from_bits(bits, layout.dtype).astype(jnp.float32)
    if scale is not None:
        if scale.ndim == 3:
            tile = tile * jnp.swapaxes(scale[ids], 0, 1)[..., None]
        else:
            tile = tile * scale.reshape(-1, 1, 1, 1)
    return tile.reshape(tile.shape[0], -1, tile.shape[-1])
