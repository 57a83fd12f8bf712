"""Copying pages inside of a pool, in place: no pass over the pool.

It is a loop over the pages that are copied, or on a GPU two operations, since its host waits for every turn of a loop.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from paged.spec import Pages

from ..jax_version import CONVERTED_WHOLE, HAS_BIT_UPDATES_IN_PLACE, vary_alike
from ..program import PageCopies
from .cpu import as_bits, from_bits
from .linear import Linear, linear


def copy_pages(pages: Pages, copies: PageCopies) -> Pages:
    """The pages with some of them copied to others, with their per-token scales."""
    pools, copies = vary_alike(pages.arrays, copies)
    arrays: Any = _copy(pages.layout.page_axis, pools, copies)
    return Pages(arrays, *copy_scales(pages, copies), layout=pages.layout)


def copy_scales(pages: Pages, copies: PageCopies) -> tuple[Array | None, Array | None]:
    """The pages' scales; per-token scales with those of each copied page copied too."""
    scales, names = (pages.k_scale, pages.v_scale), pages.layout.scale_axes
    if names is None or "page" not in names:
        return scales
    scales, copies = vary_alike(scales, copies)
    k_scale, v_scale = _copy(names.index("page"), scales, copies)
    return k_scale, v_scale


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _copy(axis: int, pools: tuple[Array, ...], copies: PageCopies) -> tuple[Array, ...]:
    """The pools with pages copied. The gradient of a target goes to its source, and none to what was there before."""
    # On CPU a page may be moved as integers: see `cpu`.
    has_bits = any(pool.dtype in CONVERTED_WHOLE for pool in pools)
    in_turn, at_once = functools.partial(_copy_in_turn, axis, has_bits), functools.partial(_copy_at_once, axis)
    plain = functools.partial(_copy_in_turn, axis, False)
    return jax.lax.platform_dependent(pools, copies, cpu=in_turn, cuda=at_once, rocm=at_once, default=plain)


def _copy_in_turn(axis: int, has_bits: bool, pools: tuple[Array, ...], copies: PageCopies) -> tuple[Array, ...]:
    dtypes, rank = [pool.dtype for pool in pools], copies.rank
    is_outside = has_bits and not HAS_BIT_UPDATES_IN_PLACE
    pools = tuple(as_bits(pool) for pool in pools) if is_outside else tuple(pools)
    view = as_bits if has_bits else lambda pool, _: pool

    def copy_one(i: Array, pools: tuple[Array, ...]) -> tuple[Array, ...]:
        source, target = copies.at(rank, i)

        def copy_in(pool: Array) -> Array:
            # A loop of one turn, out of which XLA does not take the page: it would read the pool inside of the update,
            # and so copy the whole pool first.
            read = lambda j, _: jax.lax.dynamic_slice_in_dim(view(pool, j), source, 1, axis)
            shape = jax.eval_shape(read, i, None)
            _, empty = vary_alike(pool, jnp.zeros(shape.shape, shape.dtype))
            page = jax.lax.fori_loop(0, jnp.minimum(rank[-1], 1), read, empty)
            return from_bits(jax.lax.dynamic_update_slice_in_dim(view(pool, i), page, target, axis), pool.dtype)

        return tuple(copy_in(pool) for pool in pools)

    pools = jax.lax.fori_loop(0, rank[-1], copy_one, pools)
    return tuple(from_bits(pool, dtype) for pool, dtype in zip(pools, dtypes, strict=True))


def _copy_at_once(axis: int, pools: tuple[Array, ...], copies: PageCopies) -> tuple[Array, ...]:
    """One gather and one scatter. A sequence that copies nothing reads page 0, and its target is past the last page."""
    is_copied = copies.target >= 0
    source = jnp.where(is_copied, copies.source, 0)

    def copy_in(pool: Array) -> Array:
        target = jnp.where(is_copied, copies.target, pool.shape[axis])
        copied = jnp.take(pool, source, axis=axis, mode="clip")
        return pool.at[(slice(None),) * axis + (target,)].set(copied, mode="drop")

    return tuple(copy_in(pool) for pool in pools)


def _copy_jvp(axis: int, primals: Any, tangents: Any) -> Any:
    """A copy is linear in the pools; integers do not move."""
    (pools, copies), (moves, _) = primals, tangents
    new = _copy(axis, pools, copies)
    if not jnp.issubdtype(pools[0].dtype, jnp.inexact):
        return new, moves
    rule = Linear(lambda copies, x: _copy(axis, x, copies), functools.partial(_copy_transpose, axis))
    return new, linear(rule, copies, moves)


def _copy_transpose(axis: int, copies: PageCopies, cotangent: tuple[Array, ...]) -> tuple[Array, ...]:
    rank = copies.rank
    last = rank[-1] - 1

    def give_back(i: Array, pools: tuple[Array, ...]) -> tuple[Array, ...]:
        source, target = copies.at(rank, last - i)

        def in_pool(pool: Array) -> Array:
            at = lambda pool, page: jax.lax.dynamic_slice_in_dim(pool, page, 1, axis)
            put = lambda pool, x, page: jax.lax.dynamic_update_slice_in_dim(pool, x, page, axis)
            moved = at(pool, target)
            pool = put(pool, jnp.zeros_like(moved), target)
            return put(pool, at(pool, source) + moved, source)

        return tuple(in_pool(pool) for pool in pools)

    return jax.lax.fori_loop(0, rank[-1], give_back, tuple(cotangent))


_copy.defjvp(_copy_jvp)
