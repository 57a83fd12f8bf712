"""Writing a step's keys and values to their places in the pages; in place where the pages are donated."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paged.spec import PageLayout, Pages

from ..jax_version import HAS_BIT_UPDATES_IN_PLACE, vary_alike
from .cpu import as_bits, from_bits
from .linear import Linear, linear
from .places import Places


def write(
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads value_dim"],
    pages: Pages,
    places: Places,
) -> Pages:
    """The pages with each row's key and value, and its scales if it has its own, in its place."""
    rows, count = token_rows(k, v, pages), len(pages.arrays)
    axes = pages.layout.page_axis, pages.layout.offset_axis
    arrays: Any = _put(axes, *vary_alike(rows[:count], pages.arrays, places))
    return Pages(tuple(arrays), *write_scales(rows[count:], pages, places), layout=pages.layout)


def write_scales(rows: tuple[Array, ...], pages: Pages, places: Places) -> tuple[Array | None, Array | None]:
    """The pages' scales; per-token scales with those of each row, ``rows [tokens, kv_heads]``, in its place."""
    scales, names = (pages.k_scale, pages.v_scale), pages.layout.scale_axes
    if names is None or "offset" not in names:
        return scales
    axes = names.index("page"), names.index("offset")
    k_scale, v_scale = _put(axes, *vary_alike(rows, scales, places))  # pyright: ignore
    return k_scale, v_scale


def token_rows(k: Array, v: Array, pages: Pages) -> tuple[Array, ...]:
    """Each row as the pages store it: its part of every array, then its key's and value's scales if it has its own."""
    (k, v), scales = stored_rows(k, v, pages)
    return (*pages.layout.stack(k, v), *scales)


def stored_at(
    pages: Pages, page: Int[Array, " tokens"], offset: Int[Array, " tokens"]
) -> tuple[Array, Array, tuple[Array, ...]]:
    """The keys and values at some places, as the pages store them; and their scales if each has its own, else none."""
    layout = pages.layout

    def rows(pool: Array, axes: tuple[int, int]) -> Array:
        if pool.dtype.itemsize > 1:
            return jnp.moveaxis(pool[_index(axes, page, offset)], _token_axis(axes), 0)
        # Whole pages first: for a gather by page and offset at once, a TPU lays out a whole pool of bytes anew.
        pages = jnp.moveaxis(jnp.take(pool, page, axis=axes[0], mode="clip"), axes[0], 0)
        at = axes[1] + (axes[1] < axes[0])
        index = jnp.expand_dims(offset, tuple(range(1, pages.ndim)))
        return jnp.take_along_axis(pages, index, axis=at).squeeze(at)

    k, v = layout.unstack(tuple(rows(pool, (layout.page_axis, layout.offset_axis)) for pool in pages.arrays))
    scales, names = (pages.k_scale, pages.v_scale), layout.scale_axes
    if names is None or "offset" not in names:
        return k, v, ()
    return (
        k,
        v,
        tuple(rows(scale, (names.index("page"), names.index("offset"))) for scale in scales if scale is not None),
    )


def stored_rows(k: Array, v: Array, pages: Pages) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    """Keys and values as the pages store them; and each row's scales if it has its own, else none."""
    k, k_row_scale = _stored(k, pages.layout, pages.k_scale)
    v, v_row_scale = _stored(v, pages.layout, pages.v_scale)
    return (k, v), () if k_row_scale is None or v_row_scale is None else (k_row_scale, v_row_scale)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _put(axes: tuple[int, int], rows: tuple[Array, ...], pools: tuple[Array, ...], places: Places) -> tuple[Array, ...]:
    """The pools with ``rows [tokens, ...]`` in their places; ``axes`` are the pools' axes of pages and of offsets.

    The gradient of a place goes to the row that was written there, and none to what was there before.
    """
    one_by_one = functools.partial(_put_one_by_one, axes)
    at_once = functools.partial(_put_at_once, axes)
    return jax.lax.platform_dependent(rows, pools, places, cpu=one_by_one, default=at_once)


def _put_one_by_one(axes: tuple[int, int], rows: Any, pools: Any, places: Places) -> tuple[Array, ...]:
    """A loop over the rows that are written. On CPU a scatter may convert or copy the whole pool: see `cpu`."""
    dtypes = [pool.dtype for pool in pools]
    if not HAS_BIT_UPDATES_IN_PLACE:
        rows, pools = (tuple(as_bits(x) for x in arrays) for arrays in (rows, pools))

    def put_row(i: Array, pools: tuple[Array, ...]) -> tuple[Array, ...]:
        token = places.order[i]

        def put_in(pool: Array, row: Array) -> Array:
            start: list[Any] = [jnp.int32(0)] * pool.ndim
            start[axes[0]], start[axes[1]] = places.page[token], places.offset[token]
            row = as_bits(jnp.expand_dims(row[token], axes))
            return from_bits(jax.lax.dynamic_update_slice(as_bits(pool, i), row, start), pool.dtype)

        return tuple(put_in(pool, row) for pool, row in zip(pools, rows, strict=True))

    pools = jax.lax.fori_loop(0, places.count, put_row, tuple(pools))
    return tuple(from_bits(pool, dtype) for pool, dtype in zip(pools, dtypes, strict=True))


def _put_at_once(axes: tuple[int, int], rows: Any, pools: Any, places: Places) -> tuple[Array, ...]:
    """One scatter. Rows that are not written are sent past the last page, and dropped."""

    def put_in(pool: Array, row: Array) -> Array:
        page = jnp.where(places.is_written, places.page, pool.shape[axes[0]])
        row = jnp.moveaxis(row, 0, _token_axis(axes))
        return pool.at[_index(axes, page, places.offset)].set(row, mode="drop")

    return tuple(put_in(pool, row) for pool, row in zip(pools, rows, strict=True))


def _put_jvp(axes: tuple[int, int], primals: Any, tangents: Any) -> Any:
    """A write is linear in rows and pools; integers do not move."""
    (rows, pools, places), (row_moves, pool_moves, _) = primals, tangents
    new = _put(axes, rows, pools, places)
    if not jnp.issubdtype(rows[0].dtype, jnp.inexact):
        return new, pool_moves
    rule = Linear(lambda places, x: _put(axes, *x, places), functools.partial(_put_transpose, axes))
    return new, linear(rule, places, (row_moves, pool_moves))


def _put_transpose(axes: tuple[int, int], places: Places, cotangent: tuple[Array, ...]) -> Any:
    def of_rows(c: Array) -> Array:
        row = jnp.moveaxis(c[_index(axes, places.page, places.offset)], _token_axis(axes), 0)
        return jnp.where(places.is_written.reshape(-1, *[1] * (row.ndim - 1)), row, 0)

    rows = tuple(of_rows(c) for c in cotangent)
    return rows, _put_at_once(axes, tuple(jnp.zeros_like(row) for row in rows), cotangent, places)


_put.defjvp(_put_jvp)


def _index(axes: tuple[int, int], page: Array, offset: Array) -> tuple[Any, ...]:
    """The index of every token's part of a pool."""
    index: list[Any] = [slice(None)] * (axes[1] + 1)
    index[axes[0]], index[axes[1]] = page, offset
    return tuple(index)


def _token_axis(axes: tuple[int, int]) -> int:
    """The axis of tokens in what `_index` selects. NumPy puts it where adjacent index arrays are, and else first."""
    return axes[0] if axes[1] == axes[0] + 1 else 0


def _stored(x: Array, layout: PageLayout, scale: Array | None) -> tuple[Array, Array | None]:
    """``x [tokens, kv_heads, dim]`` as the pages store it, and per-token scales ``[tokens, kv_heads]`` or None.

    A per-token scale is computed here: the row's largest magnitude over the largest number of the dtype. Other scales
    are the caller's, and values beyond them saturate.
    """
    if scale is None:
        return x.astype(layout.dtype), None
    is_integer = jnp.issubdtype(layout.dtype, jnp.integer)
    largest = float(jnp.iinfo(layout.dtype).max if is_integer else jnp.finfo(layout.dtype).max)
    x, row_scale = x.astype(jnp.float32), None
    if layout.scales == "token":
        row_scale = jnp.max(jnp.abs(x), axis=-1) / largest
        scale = row_scale = jnp.where(row_scale == 0, 1.0, row_scale)  # a row of zeros is exact at any scale
    if scale.ndim > 0:
        scale = jnp.expand_dims(scale, (-1,) if scale.ndim == 2 else (0, -1))  # as x: [tokens, kv_heads, dim]
    scaled = jnp.clip(x / scale, -largest, largest)
    return (jnp.round(scaled) if is_integer else scaled).astype(layout.dtype), row_scale
