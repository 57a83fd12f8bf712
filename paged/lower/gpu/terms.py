"""The program's terms on a tile of a Hopper kernel, which lies as the matrix unit leaves it.

Registers hold a tile ``[keys, rows]`` in a layout of their own, and know no tile of one row or one column. So whatever
a term computes is either one number or a whole tile, and to broadcast or to reshape is to do nothing. All that a term
computes is elementwise, so it does not matter that `kernel_terms` was traced for tiles ``[rows, keys]``.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# What the compiler has rules for, of what a kernel may compute.
ELEMENTWISE = """
abs add and atan2 clamp convert_element_type cos div eq erf exp exp2 ge gt integer_pow le log logistic lt max min mul ne
neg not or rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sqrt square sub tanh
xor broadcast_in_dim squeeze reshape copy stop_gradient
"""
_MOVES = ("broadcast_in_dim", "squeeze", "reshape", "copy", "stop_gradient")


def compute(eqn: Any, values: list[Any]) -> list[Any]:
    """An operation of a trace, on numbers and tiles."""
    if eqn.primitive.name in _MOVES:
        return values[:1]
    shapes = {np.shape(x) for x in values if np.shape(x)}
    if shapes:
        (shape,) = shapes
        dtypes = [v.aval.dtype for v in eqn.invars]
        values = [spread(x, shape, dtype) for x, dtype in zip(values, dtypes, strict=True)]
    if eqn.primitive.name == "tanh":
        return [_tanh(values[0])]
    return [eqn.primitive.bind(*values, **eqn.params)]


def _tanh(x: Any) -> Any:
    """It saturates: at infinities it is 1 and -1.

    Its error is absolute, one rounding of 1, as that of a score is. CUDA's own is exact near 0 too, and takes three
    times as many instructions (counted in compiled code).
    """
    return 1.0 - 2.0 / (jnp.exp2(x * (2 * math.log2(math.e))) + 1.0)


def spread(x: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """A number as a tile; a tile as it is."""
    if np.shape(x) == shape:
        return x
    if jnp.issubdtype(dtype, jnp.bool_):  # the compiler broadcasts numbers, not masks
        return spread(jnp.asarray(x).astype(jnp.int32), shape, jnp.int32) != 0
    return jax.lax.broadcast(jnp.asarray(x, dtype), shape)
