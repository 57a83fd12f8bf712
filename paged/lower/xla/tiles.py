"""Head views of the page orders: pages in, one contiguous float32 tile of keys and of values a head out, and back.

A tile is gathered once and used at once, while it is in cache. Copying page by page into a tile that the loop carries
is slower where keys and values take turns, and halves of a tile into a carried buffer no slower where they don't
(measured: benchmarks/xla_cpu).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paged.spec import PageLayout, Pages

from .bits import as_bits, from_bits

Tile = Float[Array, "kv_heads tokens dim"]


class Buffers(NamedTuple):
    """Where tiles of keys and of values are put, carried from block to block; None where each tile is made anew.

    One buffer serves both where they have one shape, so that the cache need hold only one.
    """

    keys: Tile | None
    values: Tile | None

    @classmethod
    def of(cls, layout: PageLayout, pages: int) -> "Buffers":
        """Buffers for tiles of so many pages."""
        heads_keys = (layout.num_kv_heads, pages * layout.page_size)
        is_shared = layout.head_dim == layout.value_dim
        values = None if is_shared else jnp.zeros((*heads_keys, layout.value_dim), jnp.float32)
        return cls(jnp.zeros((*heads_keys, layout.head_dim), jnp.float32), values)

    def put_keys(self, take: Callable[[int, int], Tile], pages: int) -> tuple[Tile, "Buffers"]:
        """The tile of keys ``take(0, pages)``, in its buffer if there is one."""
        k = _fill(self.keys, take, pages)
        return k, self if self.keys is None else self._replace(keys=k)

    def put_values(self, take: Callable[[int, int], Tile], pages: int) -> tuple[Tile, "Buffers"]:
        """A tile of values, likewise."""
        if self.values is None:
            return self.put_keys(take, pages)
        v = _fill(self.values, take, pages)
        return v, self._replace(values=v)


NO_BUFFERS = Buffers(None, None)


def gather(pages: Pages, ids: Int[Array, " block"], step: Any) -> tuple[Tile, Tile]:
    """Keys and values of the pages ``ids``, in that order, dequantised: ``[kv_heads, block * page_size, dim]``.

    ``ids`` must be in the pool. ``step`` is the counter of the loop that this is called in.
    """
    layout = pages.layout
    pools = tuple(as_bits(pool, step) for pool in pages.arrays)
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
            heads = 2 * jnp.arange(layout.num_kv_heads)[:, None]
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
    heads = jnp.arange(layout.num_kv_heads)[:, None]
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


def _fill(buffer: Tile | None, take: Callable[[int, int], Tile], pages: int) -> Tile:
    """``take(0, pages)``; with a buffer, one half after the other put into it.

    XLA:CPU hands a gather from a large pool to several threads, and to fork and join them at every block costs more
    than it gains. An update in place it leaves to one thread, and an update of the whole would be no update (measured:
    benchmarks/xla_cpu).
    """
    if buffer is None:
        return take(0, pages)
    first, second = take(0, pages // 2), take(pages // 2, pages)
    buffer = jax.lax.dynamic_update_slice_in_dim(buffer, first, 0, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(buffer, second, first.shape[1], axis=1)


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
