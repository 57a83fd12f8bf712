"""Head views of the page orders: pages in, one contiguous float32 tile of keys and of values a head out, and back."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paged.spec import PageLayout, Pages

Tile = Float[Array, "kv_heads tokens dim"]


def gather(pages: Pages, ids: Int[Array, " block"]) -> tuple[Tile, Tile]:
    """Keys and values of the pages ``ids``, in that order, dequantised: ``[kv_heads, block * page_size, dim]``."""
    order, heads = pages.layout.order, jnp.arange(pages.layout.num_kv_heads)[:, None]
    if order == "packed":
        (pool,) = pages.arrays
        k, v = pool[ids, 0, heads], pool[ids, 1, heads]
    elif order == "split":
        k, v = (pool[heads, ids] for pool in pages.arrays)
    else:
        (pool,) = pages.arrays
        k, v = pool[ids, :, 2 * heads], pool[ids, :, 2 * heads + 1]
    return _dequantise(k, pages.k_scale, ids), _dequantise(v, pages.v_scale, ids)


def scatter_add(
    layout: PageLayout, pools: tuple[Array, ...], ids: Int[Array, " block"], k: Tile, v: Tile
) -> tuple[Array, ...]:
    """The transpose of `gather` for float pages: add tiles to pool-shaped accumulators."""
    heads = jnp.arange(layout.num_kv_heads)[:, None]
    k, v = (tile.reshape(layout.num_kv_heads, ids.shape[0], layout.page_size, -1) for tile in (k, v))
    if layout.order == "packed":
        (pool,) = pools
        return (pool.at[ids, 0, heads].add(k, mode="drop").at[ids, 1, heads].add(v, mode="drop"),)
    if layout.order == "split":
        return tuple(pool.at[heads, ids].add(tile, mode="drop") for pool, tile in zip(pools, (k, v), strict=True))
    (pool,) = pools
    return (pool.at[ids, :, 2 * heads].add(k, mode="drop").at[ids, :, 2 * heads + 1].add(v, mode="drop"),)


def _dequantise(raw: Array, scale: Array | None, ids: Int[Array, " block"]) -> Tile:
    """``[kv_heads, block, page_size, dim]`` of any page dtype to a float32 tile."""
    tile = raw.astype(jnp.float32)
    if scale is not None:
        if scale.ndim == 3:
            scale = jnp.swapaxes(scale[ids], 0, 1)[..., None]
        tile = tile * (scale if scale.ndim == 4 else scale.reshape(-1, 1, 1, 1))
    return tile.reshape(tile.shape[0], -1, tile.shape[-1])
