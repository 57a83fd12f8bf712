"""Differences between the supported versions of JAX, as facts with names. Measured on CPU, x86-64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_VERSION = jax.__version_info__

# XLA:CPU computes with these floats by converting them. To gather from a pool, or to update one token of it, it
# converts the *whole pool*, there and back. As bits, only what is gathered or updated is moved.
CONVERTED_WHOLE = tuple(
    jnp.dtype(name)
    for name, is_converted in {
        "bfloat16": _VERSION < (0, 11),
        "float8_e4m3fn": True,
        "float8_e5m2": True,
    }.items()
    if is_converted
)

# Whether, inside a loop, a view as bits, an update and the view back become one update in place. Later versions copy
# the pool in every iteration: there the views must be outside of the loop, where they copy the pool once.
HAS_BIT_UPDATES_IN_PLACE = _VERSION < (0, 12)


def on_devices(run: Callable[..., Any], mesh: Mesh, in_specs: tuple[Any, ...], out_specs: Any) -> Callable[..., Any]:
    """``run`` on every device, with that device's shares of the arguments.

    Arguments that do not lie as ``in_specs`` say are moved first, where the mesh has explicit axes.
    JAX does not check over which axes results vary: loops and kernels would have to declare it for every first value.
    """
    # ``jax.make_mesh`` makes explicit axes, for which ``jax.shard_map`` refuses arrays that lie otherwise.
    sharded = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    if AxisType.Explicit not in mesh.axis_types:
        return sharded

    def moved(*args: Any) -> Any:
        return sharded(*(_moved(arg, mesh, spec) for arg, spec in zip(args, in_specs, strict=True)))

    return moved


def _moved(tree: Any, mesh: Mesh, specs: Any) -> Any:
    def move(spec: PartitionSpec, part: Any) -> Any:
        return jax.tree.map(lambda x: jax.sharding.reshard(x, NamedSharding(mesh, spec)), part)

    return jax.tree.map(move, specs, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))
