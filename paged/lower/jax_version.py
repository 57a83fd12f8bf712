"""Differences between the supported versions of JAX, as facts with names. Measured on CPU, x86-64."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, ManualAxisType, Mesh, NamedSharding, PartitionSpec

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

# Whether XLA multiplies one short row fast with a transposed matrix that is a part of a larger array, in one pass, and
# does not copy the matrix first. A decode step of one row of SmolLM2-135M takes 0.7 times as long as with copies in JAX
# 0.10, and 3.8 times as long in JAX 0.12 (measured).
MULTIPLIES_WHILE_READING = _VERSION < (0, 11)

# Whether Pallas has what the kernel for GPUs is written with. Its interface changed in JAX 0.11.
HAS_GPU_KERNELS = _VERSION >= (0, 11)


class _Late:
    """A module that is imported when something of it is asked for."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)


# Before JAX 0.11 it needs the package absl, which JAX does not bring: who asks for no GPU kernel need not have that.
plgpu: Any = _Late("jax.experimental.pallas.mosaic_gpu")


def abstract_device(device_kind: str, num_cores: int | None, platform: str) -> Any:
    """A device that need not be there. JAX 0.10.0 does not ask for the platform."""
    is_asked = "platform" in inspect.signature(jax.sharding.AbstractDevice).parameters
    more = {"platform": platform} if is_asked else {}
    return jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=num_cores, **more)


def gpu_interpreter(interpret: Any) -> Any:
    """Settings of Pallas's interpreter of GPU kernels, or False; True stands for the default settings.

    Raises ``ValueError`` before JAX 0.12, whose interpreter is the first one that is public, and ``TypeError`` for
    anything else.
    """
    if isinstance(interpret, (bool, np.bool_)) and not interpret:
        return False
    settings = getattr(plgpu, "InterpretGPUParams", None)
    if settings is None:
        raise ValueError(f"interpret={interpret!r} needs JAX 0.12 or later for GPU kernels; this is {jax.__version__}.")
    if isinstance(interpret, (bool, np.bool_)):
        return settings()
    if not isinstance(interpret, settings):
        raise TypeError(
            "interpret must be True, False or a jax.experimental.pallas.mosaic_gpu.InterpretGPUParams; got "
            f"{interpret!r}."
        )
    return interpret


def on_devices(
    run: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any, axes: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """``run`` on every device, with that device's shares of the arguments.

    Arguments that do not lie as ``in_specs`` say are moved first, where the mesh has explicit axes.
    JAX does not check over which axes results vary: loops and kernels would have to declare it for every first value.

    **Arguments:**

    - `axes`: the axes of the mesh over which ``run`` is called on shares; JAX divides its work over the others. None
      named: all but those of a ``jax.shard_map`` around this call.
    """
    around = manual_axes()
    names = set(axes or mesh.axis_names) - around
    if not names:
        return run
    # ``jax.make_mesh`` makes explicit axes, for which ``jax.shard_map`` refuses arrays that lie otherwise.
    here: Any = jax.sharding.get_abstract_mesh() if around else mesh
    how: dict[str, Any] = {"in_specs": in_specs, "out_specs": out_specs, "axis_names": names, "check_vma": False}
    sharded = jax.shard_map(run, mesh=here, **how)
    if AxisType.Explicit not in here.axis_types:
        return sharded

    def moved(*args: Any) -> Any:
        return sharded(*(_moved(arg, here, spec) for arg, spec in zip(args, in_specs, strict=True)))

    return moved


def manual_axes() -> set[Any]:
    """The mesh axes of a ``jax.shard_map`` around this call, over which each device traces its own shares."""
    return set(jax.sharding.get_abstract_mesh().manual_axes)


def _moved(tree: Any, mesh: Any, specs: Any) -> Any:
    def move(spec: PartitionSpec, part: Any) -> Any:
        return jax.tree.map(lambda x: jax.sharding.reshard(x, NamedSharding(mesh, spec)), part)

    return jax.tree.map(move, specs, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))


def varying_axes(x: Any) -> frozenset[Any]:
    """The mesh axes over which an array varies, in a caller's ``jax.shard_map`` that checks it; none elsewhere."""
    return jax.typeof(x).manual_axis_type.varying


def shape_like(x: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """What to trace with for an array of this shape and dtype that varies as ``x`` does."""
    # A `jax.ShapeDtypeStruct` can say that it varies, but ``jax.make_jaxpr`` does not accept it.
    return vary_alike(x, jnp.zeros(shape, dtype))[1] if varying_axes(x) else jax.ShapeDtypeStruct(shape, dtype)


def result_like(x: Any, result: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a kernel's result, which varies as ``x`` does."""
    axes = varying_axes(x)
    if not axes:
        return result
    return jax.ShapeDtypeStruct(result.shape, result.dtype, manual_axis_type=ManualAxisType(varying=axes))


def vary_alike(*trees: Any) -> Any:
    """The arrays, each varying over every mesh axis that one of them varies over. One tree, or a tuple of several.

    In a caller's ``jax.shard_map`` that checks how values vary, a loop must get its first values with the type that
    its steps give them. So operands are made alike before a loop, and its first values like the operands. The
    transpose, a sum over the mesh axes, comes with the cast. Elsewhere no array varies, and this changes nothing.
    """
    leaves, structure = jax.tree.flatten(trees)
    varying = [varying_axes(x) for x in leaves]
    axes = frozenset().union(*varying)
    if axes:
        missing = [tuple(sorted(axes - own, key=str)) for own in varying]
        leaves = [jax.lax.pcast(x, names, to="varying") for x, names in zip(leaves, missing, strict=True)]
    alike = jax.tree.unflatten(structure, leaves)
    return alike if len(trees) > 1 else alike[0]


def on_whole_arrays(run: Callable[..., Any], **arrays: Any) -> Any:
    """``run(*arrays)``, on every device alike where a mesh has explicit axes; elsewhere the plain call.

    On explicit axes JAX refuses a loop that mixes arrays on the mesh with arrays that are not. So ``run`` is traced as
    if the axes were automatic. Raises ``ValueError`` for an array that the mesh divides: automatic axes would move it
    from device to device in silence.
    """
    mesh = _explicit_mesh(arrays)
    if mesh is None:
        return run(*arrays.values())
    for name, tree in arrays.items():
        spec = next((spec for spec in map(_spec, jax.tree.leaves(tree)) if any(spec)), None)
        if spec is not None:
            raise ValueError(
                f"{name} lies by {spec} on a mesh with explicit axes, {mesh.axis_names}, and this attention is of one "
                'device. Pass mesh= and axes=, such as axes=paged.Axes(kv_heads="model"), to paged.lower or to the '
                "function of paged.compat: then each device runs its share. Or make the mesh with "
                "axis_types=(jax.sharding.AxisType.Auto,) * n, and JAX divides the work."
            )
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.sharding.auto_axes(run, out_sharding=whole)(*arrays.values())


def whole_rows(logits: Any, *keys: Any) -> tuple[Any, ...]:
    """Logits with each row whole on its devices, and keys divided as the rows are, where a mesh has explicit axes.

    A row is ranked as a whole. Elsewhere JAX divides the work, and the arrays are returned as they are.
    """
    sharding = jax.typeof(logits).sharding
    if not any(sharding.spec):
        return logits, *keys
    rows = tuple(sharding.spec)[:-1]
    move = lambda x, *spec: jax.sharding.reshard(x, sharding.update(spec=PartitionSpec(*spec)))
    return move(logits, *rows, None), *(move(key, *rows) for key in keys)


def _explicit_mesh(tree: Any) -> Any:
    """The mesh with explicit axes on which an array lies, or else that of ``jax.set_mesh``; or None."""
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree)] + [jax.sharding.get_abstract_mesh()]
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def _spec(x: Any) -> PartitionSpec:
    return jax.typeof(x).sharding.spec
