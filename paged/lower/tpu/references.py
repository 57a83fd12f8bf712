"""What a kernel works on, by name: trees of references in place of long argument lists, and copies between them."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..jax_version import result_like, vary_alike
from .chips import Chip

# A reference to memory, inside a kernel. Pallas has no public type for it.
Ref = Any


@dataclasses.dataclass(frozen=True)
class Copies:
    """Asynchronous copies that are started together and awaited together.

    ``each(act)`` makes the copies one after the other and calls ``act`` on each. To await a copy it is made again: a
    semaphore only counts bytes, so `wait` must see the same references and conditions as `start` did.
    """

    each: Callable[[Callable[[Any], None]], None]

    def start(self) -> None:
        """Start every copy."""
        self.each(lambda copy: copy.start())

    def wait(self) -> None:
        """Wait until every copy has arrived."""
        self.each(lambda copy: copy.wait())


def call_kernel(
    kernel: Callable[[Any, Any, Any, Any], None],
    *,
    name: str,
    chip: Chip,
    interpret: Any,
    grid: Iterable[int],
    scalars: Any,
    inputs: Any,
    memory: Any,
    outputs: Any,
    scratch: Any,
    in_place: Callable[[Any], Any] | None = None,
) -> Any:
    """Run ``kernel(scalars, inputs, outputs, scratch)`` over a grid and return the arrays of ``outputs``.

    Every argument of the kernel is the tree that was given here, such as a NamedTuple, with a reference in place of
    each array or shape. So a kernel reads its references by name, and their order is written down nowhere else.

    **Arguments:**

    - ``name``: what the kernel is called in compiled code.
    - ``chip``, ``interpret``: the memory that the kernel may use, and what Pallas is told about interpreting.
    - ``grid``: the number of cores, and the number of steps of each core if there are several.
    - ``scalars``: integers that scalar memory holds before the kernel starts.
    - ``inputs``: arrays. ``memory`` is the same tree of memory spaces, or has one for several arrays.
    - ``outputs``: shapes and dtypes of the results, which are in HBM.
    - ``scratch``: memory and semaphores to work with.
    - ``in_place``: selects, from ``inputs`` and from ``outputs`` alike, the arrays that are written in place.

    **Returns:** the results, as the tree ``outputs``.
    """
    grid = tuple(grid)
    # In a caller's `jax.shard_map`, a kernel's operands and results vary over the same mesh axes.
    scalars, inputs = vary_alike(scalars, inputs)
    like = jax.tree.leaves(scalars)[0]
    outputs = jax.tree.map(lambda result: result_like(like, result), outputs)
    spaces = jax.tree.broadcast(memory, inputs)
    (results,) = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=(jax.tree.map(lambda space: pl.BlockSpec(memory_space=space), spaces),),
            out_specs=(jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.HBM), outputs),),
            scratch_shapes=(scratch,),
        ),
        out_shape=(outputs,),
        input_output_aliases=_aliases(scalars, inputs, outputs, in_place) if in_place else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")[: len(grid)],
            disable_bounds_checks=True,
            vmem_limit_bytes=chip.vmem_bytes,
        ),
        interpret=interpret,
        name=name,
    )(scalars, inputs)
    return results


def _aliases(scalars: Any, inputs: Any, outputs: Any, in_place: Callable[[Any], Any]) -> dict[int, int]:
    """Pallas counts arrays in the order of their trees: number them, and pair those that are selected."""
    from_inputs = jax.tree.leaves(in_place(_numbered(inputs, len(jax.tree.leaves(scalars)))))
    return dict(zip(from_inputs, jax.tree.leaves(in_place(_numbered(outputs, 0))), strict=True))


def _numbered(tree: Any, first: int) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, range(first, first + len(leaves)))
