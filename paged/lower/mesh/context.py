"""One device's share of a context: its own pages, and the states of all devices made one."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from paged.spec import AttentionState, RaggedBatch, merge_stacked

from .axes import Names


def with_own_pages(batch: RaggedBatch, num_pages: int, names: Names) -> RaggedBatch:
    """The batch as a device sees it that has ``num_pages`` of the pages, counted from its first. Those of others are
    outside its pool, and so holes: their tokens are invisible, and keep their positions; writes to them are dropped."""
    tables = batch.block_tables - jax.lax.axis_index(names) * num_pages
    return eqx.tree_at(lambda b: b.block_tables, batch, tables)


def merge_over(state: AttentionState, names: Names) -> AttentionState:
    """The state over the pages of all devices, from each device's, float32: one collective."""
    packed = jnp.concatenate([state.out, state.lse[..., None]], axis=-1)
    every = jax.lax.all_gather(packed, names)
    return merge_stacked(AttentionState(every[..., :-1], every[..., -1]))


def dealt(ids: Array, num_pages: int, devices: int) -> Array:
    """See `ShardedAttend.deal`."""
    is_page = (ids >= 0) & (ids < num_pages)
    return jnp.where(is_page, ids % devices * (num_pages // devices) + ids // devices, ids)
