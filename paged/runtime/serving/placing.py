"""Where the arrays of the serve loop lie, for a model whose attention several devices share."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from paged.lower import ShardedAttend
from paged.spec import Pages

from .._masks import caches_of
from .state import Queue, ServeState


def require_one_pool(model: Any) -> None:
    """Raise ``ValueError`` where a mesh shares out sequences: each shard then has slots and pages of its own."""
    if any(attend.axes.sequences is not None for attend in _shared(model)):
        raise ValueError(
            "The serve loop has one pool for all devices: Axes(sequences=...) gives each shard a pool of its own. Make "
            "an engine for each shard instead, with a model on its devices."
        )


def _shared(model: Any) -> list[ShardedAttend]:
    """The attentions of a model that several devices share."""
    return [cache.attend for cache in caches_of(model) if isinstance(cache.attend, ShardedAttend)]


def _mesh_of(model: Any) -> Mesh | None:
    return next((attend.placement[0] for attend in _shared(model)), None)


def whole(model: Any, queue: Queue) -> Queue:
    """The queue of a step, whole on every device that shares the model's attention."""
    mesh = _mesh_of(model)
    return queue if mesh is None else jax.lax.with_sharding_constraint(queue, NamedSharding(mesh, P()))


def placed(model: Any, state: ServeState) -> ServeState:
    """The state where the loop leaves it: pages as the attentions share them, everything else whole on every device.

    What lies on several devices already stays where it is.
    """
    mesh = _mesh_of(model)
    if mesh is None:
        return state
    of_pages = {attend.layout: attend.shardings.pages for attend in _shared(model)}
    everywhere = NamedSharding(mesh, P())

    def put(x: Any) -> Any:
        if any(len(leaf.sharding.device_set) > 1 for leaf in jax.tree.leaves(x)):
            return x
        # Scales of a tensor or a head have no axis of pages: of several layers at once they lie in another way.
        is_shared = isinstance(x, Pages) and x.layout in of_pages and x.layout.scales in (None, "token")
        return jax.device_put(x, of_pages[x.layout] if is_shared else everywhere)

    return jax.tree.map(put, state, is_leaf=lambda x: isinstance(x, Pages))
