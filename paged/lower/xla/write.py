"""Writing a step's keys and values into their slots, in place where the pages are donated."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from paged.spec import PageLayout, Pages

from ..jax_version import HAS_BIT_UPDATES_IN_PLACE
from ..program import Sequences
from .bits import as_bits, from_bits


class Slots(NamedTuple):
    """Where each row of a step goes: page and slot, in range, and whether it goes anywhere."""

    page: Int[Array, " tokens"]
    slot: Int[Array, " tokens"]
    is_mapped: Bool[Array, " tokens"]


def write(
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads value_dim"],
    pages: Pages,
    seqs: Sequences,
) -> Pages:
    """The pages with each row's key and value at its position.

    Dropped are rows of no sequence, rows before the first position or past the table, and rows whose page is a hole.
    """
    rows, count = token_rows(k, v, pages), len(pages.arrays)
    slots = _slots(seqs, k.shape[0], pages)
    axes = pages.layout.page_axis, pages.layout.offset_axis
    arrays: Any = _put(axes, rows[:count], pages.arrays, slots)
    return Pages(tuple(arrays), *write_scales(rows[count:], pages, seqs), layout=pages.layout)


def write_scales(rows: tuple[Array, ...], pages: Pages, seqs: Sequences) -> tuple[Array | None, Array | None]:
    """The pages' scales, with those of each row [tokens, kv_heads] at its position where tokens have their own."""
    scales, names = (pages.k_scale, pages.v_scale), pages.layout.scale_axes
    if names is None or "offset" not in names:
        return scales
    axes = names.index("page"), names.index("offset")
    k_scale, v_scale = _put(axes, rows, scales, _slots(seqs, rows[0].shape[0], pages))  # pyright: ignore
    return k_scale, v_scale


def token_rows(k: Array, v: Array, pages: Pages) -> tuple[Array, ...]:
    """Each token's part of every array of the pages, as it is stored; then its scales, if it has its own."""
    k, k_row_scale = _stored(k, pages.layout, pages.k_scale)
    v, v_row_scale = _stored(v, pages.layout, pages.v_scale)
    rows = pages.layout.stack(k, v)
    return rows if k_row_scale is None or v_row_scale is None else (*rows, k_row_scale, v_row_scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _put(axes: tuple[int, int], rows: tuple[Array, ...], pools: tuple[Array, ...], slots: Slots) -> tuple[Array, ...]:
    """The pools with ``rows`` [tokens, ...] in their slots; ``axes`` are the pools' page and slot axes.

    New rows get the gradient of their slots, and what they overwrite gets none.
    """
    one_by_one = functools.partial(_put_one_by_one, axes)
    at_once = functools.partial(_put_at_once, axes)
    return jax.lax.platform_dependent(rows, pools, slots, cpu=one_by_one, default=at_once)


def _put_one_by_one(axes: tuple[int, int], rows: Any, pools: Any, slots: Slots) -> tuple[Array, ...]:
    """For CPU, where a scatter may convert or copy the whole pool: a loop over the rows that go somewhere."""
    dtypes = [pool.dtype for pool in pools]
    order = jnp.argsort(~slots.is_mapped, stable=True)
    if not HAS_BIT_UPDATES_IN_PLACE:
        rows, pools = (tuple(as_bits(x) for x in arrays) for arrays in (rows, pools))

    def put_row(i: Array, pools: tuple[Array, ...]) -> tuple[Array, ...]:
        token = order[i]

        def put_in(pool: Array, row: Array) -> Array:
            start: list[Any] = [jnp.int32(0)] * pool.ndim
            start[axes[0]], start[axes[1]] = slots.page[token], slots.slot[token]
            row = as_bits(jnp.expand_dims(row[token], axes))
            return from_bits(jax.lax.dynamic_update_slice(as_bits(pool, i), row, start), pool.dtype)

        return tuple(put_in(pool, row) for pool, row in zip(pools, rows, strict=True))

    pools = jax.lax.fori_loop(0, jnp.sum(slots.is_mapped), put_row, tuple(pools))
    return tuple(from_bits(pool, dtype) for pool, dtype in zip(pools, dtypes, strict=True))


def _put_at_once(axes: tuple[int, int], rows: Any, pools: Any, slots: Slots) -> tuple[Array, ...]:
    """One scatter, with rows that go nowhere out of range."""

    def put_in(pool: Array, row: Array) -> Array:
        page = jnp.where(slots.is_mapped, slots.page, pool.shape[axes[0]])
        row = jnp.moveaxis(row, 0, axes[0]) if axes[1] == axes[0] + 1 else row
        return pool.at[_index(axes, page, slots.slot)].set(row, mode="drop")

    return tuple(put_in(pool, row) for pool, row in zip(pools, rows, strict=True))


def _put_forward(axes: tuple[int, int], rows: Any, pools: Any, slots: Slots) -> tuple[Any, Slots]:
    return _put(axes, rows, pools, slots), slots


def _put_backward(axes: tuple[int, int], slots: Slots, cotangent: tuple[Array, ...]) -> Any:
    def of_rows(c: Array) -> Array:
        row = c[_index(axes, slots.page, slots.slot)]
        row = jnp.moveaxis(row, axes[0], 0) if axes[1] == axes[0] + 1 else row
        return jnp.where(slots.is_mapped.reshape(-1, *[1] * (row.ndim - 1)), row, 0)

    rows = tuple(of_rows(c) for c in cotangent)
    return rows, _put_at_once(axes, tuple(jnp.zeros_like(row) for row in rows), cotangent, slots), None


_put.defvjp(_put_forward, _put_backward)


def _index(axes: tuple[int, int], page: Array, slot: Array) -> tuple[Any, ...]:
    """An index of every token's row; it puts tokens first, or at the page axis where the slot's is next to it."""
    index: list[Any] = [slice(None)] * (axes[1] + 1)
    index[axes[0]], index[axes[1]] = page, slot
    return tuple(index)


def _slots(seqs: Sequences, tokens: int, pages: Pages) -> Slots:
    size = pages.layout.page_size
    seq, position, is_live = seqs.rows(tokens)
    has_entry = is_live & (position < seqs.lengths[seq])
    position = jnp.where(has_entry, position, 0)
    page = seqs.tables[seq, position // size]
    is_mapped = has_entry & (page >= 0) & (page < pages.num_pages)
    return Slots(jnp.where(is_mapped, page, 0), position % size, is_mapped)


def _stored(x: Array, layout: PageLayout, scale: Array | None) -> tuple[Array, Array | None]:
    """``x [tokens, kv_heads, dim]`` as the pages store it, and for scales a token its scales [tokens, kv_heads].

    Scales a token and head are computed here, the row's largest magnitude over the dtype's; the others are the
    caller's, and values beyond them saturate.
    """
    if scale is None:
        return x.astype(layout.dtype), None
    is_integer = jnp.issubdtype(layout.dtype, jnp.integer)
    largest = float(jnp.iinfo(layout.dtype).max if is_integer else jnp.finfo(layout.dtype).max)
    x, row_scale = x.astype(jnp.float32), None
    if layout.scales == "token":
        row_scale = jnp.max(jnp.abs(x), axis=-1) / largest
        scale = row_scale = jnp.where(row_scale == 0, 1.0, row_scale)  # a row of zeros is exact at any scale
    scaled = jnp.clip(x / (scale if scale.ndim == 0 else scale[..., None]), -largest, largest)
    return (jnp.round(scaled) if is_integer else scaled).astype(layout.dtype), row_scale
