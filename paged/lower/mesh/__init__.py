"""Attention over many devices: one lowered attention on each, under `jax.shard_map`."""

from .axes import Axes as Axes
from .sharded import ShardedAttend as ShardedAttend
from .sharded import on_mesh as on_mesh
from .specs import ArraySpecs as ArraySpecs
