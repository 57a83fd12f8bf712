"""Attention on many devices: each runs a lowered attention on its share of the arrays, under `jax.shard_map`."""

from .axes import Axes as Axes
from .axes import mesh_axes as mesh_axes
from .axes import require_mesh as require_mesh
from .door import lower_on_mesh as lower_on_mesh
from .sharded import ShardedAttend as ShardedAttend
from .specs import ArraySpecs as ArraySpecs
from .specs import entries_of as entries_of
