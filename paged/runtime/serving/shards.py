"""`Shards`: the loop on a mesh that shares out sequences. Each shard serves requests of its own, by itself."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from paged.lower import ArraySpecs, Axes, ShardedAttend, mesh_axes, on_devices
from paged.spec import Pages

from .._masks import caches_of
from .._new_pools import has_more_than_pages
from .state import Queue, ServeState

Own = TypeVar("Own", Queue, ServeState)


@dataclasses.dataclass(frozen=True)
class Shards:
    """The shards of sequences of a mesh. Each has requests, slots, pages and a prefix cache of its own.

    The arrays of the shards' queues are one array each, with a leading axis of shards. Their pages follow one another.
    The row of a request among all shards is ``shard * requests + row``, where ``requests`` are the rows of one shard.

    * ``mesh``, ``axes``: the devices, and the axes of the mesh that count the shards.
    """

    mesh: Mesh
    axes: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many shards there are."""
        return math.prod(self.mesh.shape[name] for name in self.axes)

    def specs(self, own: Own) -> Own:
        """A `PartitionSpec` for each array of a state or a queue of all shards."""
        if isinstance(own, Queue):
            return jax.tree.map(lambda _: P(self.axes), own)
        states = jax.tree.map(self._spec_in_state, (own.model_state, own.draft_state), is_leaf=_is_pages)
        return ServeState(self.specs(own.queue), *states)

    def _spec_in_state(self, x: Any) -> Any:
        return ArraySpecs.of(Axes(sequences=self.axes), x.layout).pages if _is_pages(x) else P()

    def run(self, step: Callable[[Any, Own], tuple[Own, Any]], whole: Any, own: Own) -> tuple[Own, Any]:
        """Run a step in every shard, on the devices of that shard alone.

        **Arguments:**

        - `step`: ``own, told = step(whole, own)``, in which ``own`` is what one shard has.
        - `whole`: what every shard gets as it is; what is no array in it is static.
        - `own`: the state or the queue of all shards.

        **Returns:** the new state or queue of all shards, and what was told, with a leading axis of shards.
        """
        arrays, facts = eqx.partition(whole, eqx.is_array)

        def in_shard(arrays: Any, own: Own) -> tuple[Own, Any]:
            own, told = step(eqx.combine(arrays, facts), _on_queue(lambda x: x[0], own))
            return _on_queue(lambda x: x[None], own), jax.tree.map(lambda x: x[None], told)

        specs = self.specs(own)
        return on_devices(in_shard, self.mesh, (P(), specs), (specs, P(self.axes)), self.axes)(arrays, own)

    def stacked(self, queue: Queue) -> Queue:
        """The queue of all shards, each of which has this one."""
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.count, *x.shape)), queue)

    def share(self, name: str, number: int) -> int:
        """What one shard has of a number. ``ValueError`` unless each has as many."""
        if number % self.count:
            raise ValueError(
                f"{name} is of all {self.count} shards of sequences together, which have as many each: make it a "
                f"multiple of {self.count}; got {number}."
            )
        return number // self.count


def shards_of(model: Any) -> Shards | None:
    """The shards among which a model's attention shares out sequences; None where it does not.

    ``ValueError`` where its attentions do so in several ways.
    """
    found = {
        Shards(attend.mesh, mesh_axes(attend.axes.sequences)): None
        for attend in shared_attentions(model)
        if attend.axes.sequences is not None
    }
    if len(found) > 1:
        raise ValueError(
            f"All attentions of a model must share out sequences alike; got the axes {[own.axes for own in found]} of "
            f"{[dict(own.mesh.shape) for own in found]}."
        )
    return next(iter(found), None)


def shards_of_all(served: Sequence[tuple[Any, eqx.nn.State]]) -> Shards | None:
    """The shards of the models that a loop runs, the first of which is the served one, each with its state.

    ``ValueError`` where a draft model shares out sequences in another way, and for a state that is not only pages.
    """
    of_each = [shards_of(model) for model, _ in served]
    shards = of_each[0]
    if any(own not in (None, shards) for own in of_each):
        raise ValueError(
            "A ModelDraft whose attention shares out sequences must do so as the model that it drafts for: give both "
            f"one mesh and one Axes(sequences=...). That one has {of_each[0]}, and the draft model {of_each[1]}."
        )
    if shards is not None and any(has_more_than_pages(state) for _, state in served):
        raise ValueError(
            "Axes(sequences=...) gives each shard pages of its own, and the model's state holds other arrays, of which "
            "nothing says how the shards share them."
        )
    return shards


def shared_attentions(model: Any) -> list[ShardedAttend]:
    """The attentions of a model that several devices share."""
    return [cache.attend for cache in caches_of(model) if isinstance(cache.attend, ShardedAttend)]


def in_each(
    shards: Shards | None, step: Callable[[Any, Own], tuple[Own, Any]], whole: Any, own: Own
) -> tuple[Own, Any]:
    """``step(whole, own)``, in every shard where there are any: see `Shards.run`."""
    return step(whole, own) if shards is None else shards.run(step, whole, own)


def total(shards: Shards | None, told: Any) -> Any:
    """What all shards have told together: the sum of each number."""
    return told if shards is None else jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), told)


def own_rows(shards: Shards | None, rows: Int[Array, " some"], requests: int) -> Int[Array, " some"]:
    """Rows among all shards as rows of this shard's table; a row past it for those of others."""
    if shards is None:
        return rows
    own = rows - jax.lax.axis_index(shards.axes) * requests
    return jnp.where((own >= 0) & (own < requests), own, requests)


def _on_queue(change: Callable[[Array], Array], own: Own) -> Own:
    if isinstance(own, Queue):
        return jax.tree.map(change, own)
    return dataclasses.replace(own, queue=jax.tree.map(change, own.queue))


def _is_pages(x: Any) -> bool:
    return isinstance(x, Pages)
