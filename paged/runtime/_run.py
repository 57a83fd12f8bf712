"""A run of like layers: one layer of stacked arrays, whose state is a `StackedState`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from paged.lower import ShardedAttend

from ._apart import LARGE, Apart, is_apart
from ._masks import caches_of
from ._step_plans import StepPlans
from .stacked_state import StackedState, pools_of, with_pools, without_pools


def made_together(makers: Sequence[Callable[[Any], Any]], keys: Sequence[Any]) -> Any:
    """The run of the layers ``makers[i](keys[i])``, which are alike. One layer's pages are made besides the pool."""
    distinct = list(dict.fromkeys(makers))
    parts, order = [], []
    for make in distinct:
        places = [i for i, other in enumerate(makers) if other is make]
        parts.append(eqx.filter_vmap(_without_pages(make))(jnp.stack([keys[i] for i in places])))
        order += places
    run = parts[0]
    if len(parts) > 1:
        arrays = [eqx.filter(_without_states(part), eqx.is_array) for part in parts]
        back = np.argsort(order)
        run = eqx.combine(jax.tree.map(lambda *xs: jnp.concatenate(xs)[back], *arrays), run)
    parts = parts_of(run)
    return _map_states(lambda index: eqx.nn.StateIndex(with_pools(index.init, len(keys), parts)), run)


def _without_pages(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda key: _map_states(lambda index: eqx.nn.StateIndex(without_pools(index.init)), make(key))


def stacked(layers: Sequence[Any]) -> Any:
    """The run of these layers, which are alike."""
    parts = parts_of(layers[0])
    values = iter([StackedState.of(inits, parts) for inits in zip(*map(_initial_states, layers), strict=True)])
    run = _map_states(lambda index: eqx.nn.StateIndex(next(values)), layers[0])
    return _with_arrays(run, layers)


def replaced(run: Any, numbered: Sequence[tuple[int, Any]]) -> Any:
    """The run with the arrays of these layers, which are numbered for the error text."""
    want = _kind(run, leading=1)
    for number, layer in numbered:
        if _kind(layer) != want:
            raise ValueError(
                f"layers[{number}] must be like the one that unstack gives, in structure, shapes and dtypes; got a "
                f"{type(layer).__name__} that differs. LayerStack.of makes a stack of other layers."
            )
    return _with_arrays(run, [layer for _, layer in numbered])


def apart(run: Any) -> Any:
    """The run with its large arrays `Apart`, layer by layer."""
    is_large = lambda x: eqx.is_array(x) and x.nbytes >= LARGE * x.shape[0]
    return jax.tree.map(lambda x: Apart.of(x) if is_large(x) else x, run, is_leaf=_is_index)


def together(run: Any) -> Any:
    """The run with all its arrays stacked."""
    return jax.tree.map(lambda x: x.stacked if is_apart(x) else x, run, is_leaf=is_apart)


def layer_of(run: Any, place: int) -> Any:
    """One layer of the run, with the indices of the run's state."""
    is_leaf = lambda x: _is_index(x) or is_apart(x)
    return jax.tree.map(lambda x: x[place] if eqx.is_array(x) or is_apart(x) else x, run, is_leaf=is_leaf)


def kinds_of(layers: Iterable[Any]) -> list[int]:
    """A number for each layer, one for all that are alike."""
    kinds: list[Any] = []
    numbers = []
    for layer in layers:
        kind = kind_of(layer)
        if kind not in kinds:
            kinds.append(kind)
        numbers.append(kinds.index(kind))
    return numbers


def kind_of(layer: Any) -> Any:
    """What is equal in like layers: everything but the values of arrays, in the initial state too."""
    return _kind(layer), _abstract(_initial_states(layer))


def parts_of(layer: Any, *, is_here: bool = False) -> tuple[int, int]:
    """Among how many shards of sequences, and devices of a context, the pages of a layer's attentions are divided.

    With ``is_here``: as a call finds them, which may be inside of a ``jax.shard_map`` over the shards of sequences.
    ``ValueError`` where they differ: one block table serves all of them.
    """
    attends = [cache.attend for cache in caches_of(layer)]
    if is_here:
        attends = [attend.here if isinstance(attend, ShardedAttend) else attend for attend in attends]
    shares = [attend.shares if isinstance(attend, ShardedAttend) else None for attend in attends]
    parts = {(1, 1) if own is None else (own.sequences, own.context) for own in shares} or {(1, 1)}
    if len(parts) > 1:
        raise ValueError(
            "The attentions of one layer must divide their pages among devices in one way; got (sequences, context) = "
            f"{sorted(parts)}."
        )
    return next(iter(parts))


def serve_one(layer: Any, place: Any, x: Any, plans: StepPlans, state: eqx.nn.State) -> tuple[Any, eqx.nn.State]:
    """``layer(x, step, state)`` at a place in its run, with the state of the run."""
    pools = pools_of(state)
    if pools:
        held = next(x for x in jax.tree.leaves(state, is_leaf=_is_stacked) if _is_stacked(x))
        plans = plans.for_layer(place, pools[0].num_pages, held.num_layers, *parts_of(layer, is_here=True))
    seen = jax.tree.map(lambda x: x.view(place), state, is_leaf=_is_stacked)
    given = jax.tree.map(lambda x: x, seen)  # the layer's own, because a state that is set cannot be read again
    with plans.shared():
        x, new = layer(x, plans.step, given)
    put = jax.tree.map(lambda x, seen, new: x.put(place, seen, new), state, seen, new, is_leaf=_is_stacked)
    return x, put


def _with_arrays(run: Any, layers: Sequence[Any]) -> Any:
    arrays = [eqx.filter(_without_states(layer), eqx.is_array) for layer in layers]
    return eqx.combine(jax.tree.map(lambda *xs: jnp.stack(xs), *arrays), run)


def _kind(layer: Any, leading: int = 0) -> Any:
    return _abstract(_without_states(layer), leading)


def _abstract(tree: Any, leading: int = 0) -> Any:
    """A tree to be compared: its structure, and its leaves with shapes and dtypes in place of arrays."""
    leaves, structure = jax.tree.flatten(tree)
    is_array = lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)
    return [(x.shape[leading:], x.dtype) if is_array(x) else x for x in leaves], structure


def _initial_states(layer: Any) -> list[Any]:
    values = [x.init for x in jax.tree.leaves(layer, is_leaf=_is_index) if _is_index(x)]
    if not all(map(jax.tree.leaves, values)):
        raise ValueError(
            "The layers have no initial state any more. Call LayerStack.of where they are made, inside of what "
            "eqx.nn.make_with_state is given. To change the parameters of a stack, use with_layers."
        )
    return values


def _without_states(layer: Any) -> Any:
    return _map_states(lambda index: None, layer)


def _map_states(change: Callable[[eqx.nn.StateIndex], Any], layer: Any) -> Any:
    return jax.tree.map(lambda x: change(x) if _is_index(x) else x, layer, is_leaf=_is_index)


def _is_index(x: Any) -> bool:
    return isinstance(x, eqx.nn.StateIndex)


def _is_stacked(x: Any) -> bool:
    return isinstance(x, StackedState)
