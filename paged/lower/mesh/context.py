"""One device's part of a context: its own pages, and the merge of the states of all devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from paged.spec import AttentionState, Pages, RaggedBatch, merge_stacked

from ..program import Sequences, first_pages
from .axes import Names


def with_own_pages(batch: RaggedBatch, num_pages: int, axes: Names) -> RaggedBatch:
    """The batch for a device that owns ``num_pages`` consecutive pages: page ids are made local.

    Ids of other devices' pages fall outside of the device's pool, and so they are holes: their tokens are invisible,
    and writes to them are dropped. Positions do not change.
    """
    first = jax.lax.axis_index(axes) * num_pages
    copy_from = None if batch.copy_from is None else batch.copy_from - first
    return dataclasses.replace(batch, block_tables=batch.block_tables - first, copy_from=copy_from)


def copy_over(pages: Pages, copy_from: Array, seqs: Sequences, axes: Names) -> Pages:
    """The pages of this device after a step's copies, whose sources may lie on other devices.

    Page ids are local, as `with_own_pages` makes them. Each copy is one collective of one page, in which every device
    takes part. A step without copies has none.
    """
    layout, num_pages, names = pages.layout, pages.num_pages, pages.layout.scale_axes or ()
    # What every device knows alike: else some would wait for a collective that others do not begin.
    anywhere = copy_from + jax.lax.axis_index(axes) * num_pages
    is_copied = (anywhere >= 0) & (anywhere < num_pages * jax.lax.axis_size(axes)) & (seqs.counts > 0)
    rank, targets = jnp.cumsum(is_copied, dtype=jnp.int32), first_pages(seqs, layout.page_size)
    scales = (pages.k_scale, pages.v_scale) if "page" in names else ()
    axis = [layout.page_axis] * len(pages.arrays) + [names.index("page") for _ in scales]

    def copy_one(i: Array, pools: tuple[Array, ...]) -> tuple[Array, ...]:
        seq = jax.lax.argmax(rank > i, 0, jnp.int32)
        source, target = copy_from[seq], targets[seq]
        has_source, has_target = ((x >= 0) & (x < num_pages) for x in (source, target))
        source, target = jnp.where(has_source, source, 0), jnp.where(has_target, target, 0)

        def copy_in(pool: Array, axis: int) -> Array:
            bits = _as_integers(jax.lax.dynamic_slice_in_dim(pool, source, 1, axis))
            # Bits of a page and zeros of the others: their sum is the page, NaN or not.
            bits = jax.lax.psum(jnp.where(has_source, bits, 0), axes)
            kept = jax.lax.dynamic_slice_in_dim(pool, target, 1, axis)
            page = jnp.where(has_target, jax.lax.bitcast_convert_type(bits, pool.dtype), kept)
            return jax.lax.dynamic_update_slice_in_dim(pool, page, target, axis)

        return tuple(map(copy_in, pools, axis))

    pools = jax.lax.fori_loop(0, rank[-1], copy_one, (*pages.arrays, *scales))
    arrays, scales = pools[: len(pages.arrays)], pools[len(pages.arrays) :]
    return Pages(arrays, *(scales or (pages.k_scale, pages.v_scale)), layout=layout)


def _as_integers(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


def merge_over(state: AttentionState, axes: Names) -> AttentionState:
    """The state over the pages of all devices, from the float32 state of each: one collective."""
    packed = jnp.concatenate([state.out, state.lse[..., None]], axis=-1)
    gathered = jax.lax.all_gather(packed, axes)
    return merge_stacked(AttentionState(gathered[..., :-1], gathered[..., -1]))


def spread(ids: Array | np.ndarray, num_pages: int, devices: int) -> Array:
    """Page ids renamed so that consecutive ids lie on the devices in turn; see `ShardedAttend.deal`."""
    is_page = (ids >= 0) & (ids < num_pages)
    return jnp.where(is_page, ids % devices * (num_pages // devices) + ids // devices, ids)
