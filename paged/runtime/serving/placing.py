"""Where the arrays of the serve loop lie, for a model whose attention several devices share."""

from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from paged.lower import manual_axes
from paged.spec import Pages

from .shards import shards_of, shared_attentions
from .state import Queue, ServeState


def _mesh_of(model: Any) -> Mesh | None:
    return next((attend.mesh for attend in shared_attentions(model)), None)


def whole(model: Any, queue: Queue) -> Queue:
    """The queue of a step, whole on every device that shares the model's attention, or its shard of sequences."""
    mesh: Any = _mesh_of(model)
    if mesh is None or manual_axes() >= set(mesh.axis_names):
        return queue
    here = jax.sharding.get_abstract_mesh() if manual_axes() else mesh
    return jax.lax.with_sharding_constraint(queue, NamedSharding(here, P()))


def placed(model: Any, state: ServeState) -> ServeState:
    """The state where the loop leaves it: pages as the attentions share them, everything else whole on every device.

    Of shards of sequences each has its own part of the queue. What lies on several devices already stays where it is.
    """
    mesh, shards = _mesh_of(model), shards_of(model)
    if mesh is None:
        return state
    of_pages = {attend.layout: attend.shardings.pages for attend in shared_attentions(model)}
    specs = jax.tree.map(lambda _: P(), state) if shards is None else shards.specs(state)

    def put(x: Any, spec: Any) -> Any:
        if _lies_on_several(x):
            return x
        # Scales of a tensor or a head have no axis of pages: of several layers at once they lie in another way.
        is_shared = isinstance(x, Pages) and x.layout in of_pages and x.layout.scales in (None, "token")
        if is_shared:
            return jax.device_put(x, of_pages[x.layout])
        return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), x, spec)

    return jax.tree.map(put, state, specs, is_leaf=lambda x: isinstance(x, Pages))


def everywhere(model: Any) -> Any:
    """The model, with those of its arrays that lie on one device whole on every one that shares its attention."""
    mesh = _mesh_of(model)
    if mesh is None:
        return model
    put = lambda x: x if not eqx.is_array(x) or _lies_on_several(x) else jax.device_put(x, NamedSharding(mesh, P()))
    return jax.tree.map(put, model)


def _lies_on_several(x: Any) -> bool:
    return any(len(leaf.sharding.device_set) > 1 for leaf in jax.tree.leaves(x) if isinstance(leaf, jax.Array))
