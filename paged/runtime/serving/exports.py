"""How `jax.export` stores what the serve loop carries, so that `serve_many` can be written down and read back."""

import json
from typing import Any

import equinox as eqx
import jax
from jax import export

from paged.spec import register_module

from .._prefix_chains import Chains
from ..grouped_pool import GroupedPool
from ..pool import PagePool
from ..prefix_cache import PrefixCache
from ..sampling import Sampler, Samplers
from ..stacked_state import StackedState
from .figures import StepFigures
from .record import StepEvents
from .requests import Requests, Sizes
from .state import Counts, Queue, ServeState
from .told import DrawnLogProbs, PromptLogProbs


def _write_keys(keys: Any) -> bytes:
    if not all(isinstance(key, str) for key in keys):
        raise ValueError(
            "eqx.nn.State cannot be written down before eqx.nn.make_with_state has named its entries: export with the "
            "state that it returned."
        )
    return json.dumps(keys).encode()


export.register_pytree_node_serialization(
    eqx.nn.State,
    serialized_name="equinox.nn.State",
    serialize_auxdata=_write_keys,
    deserialize_auxdata=lambda data: tuple(json.loads(bytes(data))),
    from_children=lambda aux_data, children: eqx.nn.State.tree_unflatten(aux_data, children),
)


def _register_all() -> None:
    pool = PagePool.init(1, num_slots=1, pages_per_seq=1, page_size=1)
    requests = Requests.init(Sizes(1, 1))
    queue = Queue.init(requests, pool)
    for example in (queue, requests, Counts.zero(), ServeState(queue, eqx.nn.State(())), Samplers.of([Sampler()])):
        register_module(example)
    register_module(StepEvents.none(1))
    register_module(DrawnLogProbs.none(1, 1, 1))
    register_module(PromptLogProbs.none(1))
    register_module(StepFigures.zero(queue))
    register_module(GroupedPool([pool], [[]]), "masks")
    register_module(PrefixCache.init(pool), "masks")
    register_module(Chains.init(1))
    register_module(StackedState(None, 1), "num_layers", "parts")


# Shapes alone: nothing is computed when the package is imported.
jax.eval_shape(_register_all)
