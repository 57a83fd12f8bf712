"""One device's part of a context: its own pages, and the merge of the states of all devices."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from paged.spec import AttentionState, RaggedBatch, merge_stacked

from .axes import Names


def with_own_pages(batch: RaggedBatch, num_pages: int, axes: Names) -> RaggedBatch:
    """The batch for a device that owns ``num_pages`` consecutive pages: page ids are made local.

    Ids of other devices' pages fall outside of the device's pool, and so they are holes: their tokens are invisible,
    and writes to them are dropped. Positions do not change.
    """
    tables = batch.block_tables - jax.lax.axis_index(axes) * num_pages
    return eqx.tree_at(lambda b: b.block_tables, batch, tables)


def merge_over(state: AttentionState, axes: Names) -> AttentionState:
    """The state over the pages of all devices, from the float32 state of each: one collective."""
    packed = jnp.concatenate([state.out, state.lse[..., None]], axis=-1)
    gathered = jax.lax.all_gather(packed, axes)
    return merge_stacked(AttentionState(gathered[..., :-1], gathered[..., -1]))


def spread(ids: Array | np.ndarray, num_pages: int, devices: int) -> Array:
    """Page ids renamed so that consecutive ids lie on the devices in turn; see `ShardedAttend.deal`."""
    is_page = (ids >= 0) & (ids < num_pages)
    return jnp.where(is_page, ids % devices * (num_pages // devices) + ids // devices, ids)
