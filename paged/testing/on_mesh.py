"""An attention on a mesh of devices, called with whole arrays as `Attend` is."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from paged.lower import Axes, ShardedAttend, lower
from paged.spec import AttentionSpec, AttentionState, PageLayout, Pages, RaggedBatch


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """A sharded attention that puts whole arrays where its mesh wants them, and gives whole pages back."""

    attend: ShardedAttend

    @classmethod
    def lower(cls, spec: AttentionSpec, layout: PageLayout, mesh: Mesh, axes: Axes, target: str = "xla") -> "OnMesh":
        """The attention of a spec over a layout, on a mesh that divides KV heads, contexts or both."""
        return cls(lower(spec, layout, target, mesh=mesh, axes=axes))

    def __call__(self, q: jax.Array, pages: Pages, batch: RaggedBatch, *sinks: jax.Array) -> jax.Array:
        """The output over the pages as they are."""
        return self.state(q, pages, batch, *sinks).out

    def state(self, q: jax.Array, pages: Pages, batch: RaggedBatch, *sinks: jax.Array) -> AttentionState:
        """The output and its log-sum-exp."""
        at = self.attend.shardings
        where = (at.q, at.pages, at.batch, *(at.sinks for _ in sinks))
        given = jax.device_put((q, self._pool(pages), _within(batch, pages), *sinks), where)
        return self.attend.state(*given)

    def update(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pages: Pages, batch: RaggedBatch, *sinks: jax.Array
    ) -> tuple[jax.Array, Pages]:
        """The output, and the pages with the new keys and values."""
        at = self.attend.shardings
        where = (at.q, at.k, at.v, at.pages, at.batch, *(at.sinks for _ in sinks))
        given = jax.device_put((q, k, v, self._pool(pages), _within(batch, pages), *sinks), where)
        out, after = self.attend.update(*given)
        return out, _first_pages(after, pages.num_pages)

    def _pool(self, pages: Pages) -> Pages:
        return widened(self.attend.adopt(pages), self.attend.shares.context)


def _within(batch: RaggedBatch, pages: Pages) -> RaggedBatch:
    """The batch with entries past the pool as holes: a wider pool has pages there."""
    tables = jnp.where(batch.block_tables < pages.num_pages, batch.block_tables, -1)
    return eqx.tree_at(lambda batch: batch.block_tables, batch, tables)


def widened(pages: Pages, devices: int) -> Pages:
    """A pool with pages of poison added at its end, so that devices can share it evenly."""
    more = -pages.num_pages % devices

    def widen(x: Any, axis: int) -> Any:
        widths = [(0, more if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, widths, constant_values=-128 if x.dtype == jnp.int8 else jnp.nan)

    return _each_array(pages, widen)


def _first_pages(pages: Pages, count: int) -> Pages:
    return _each_array(pages, lambda x, axis: jax.lax.slice_in_dim(x, 0, count, axis=axis))


def _each_array(pages: Pages, change: Any) -> Pages:
    layout, k_scale, v_scale = pages.layout, pages.k_scale, pages.v_scale
    if layout.scales == "token":
        k_scale, v_scale = change(k_scale, 0), change(v_scale, 0)
    return Pages(tuple(change(x, layout.page_axis) for x in pages.arrays), k_scale, v_scale, layout)
