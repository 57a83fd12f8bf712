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

from ..program import Program, refused_operations

# What the compiler has rules for, of what a kernel may compute.
ELEMENTWISE = """
abs add and atan2 clamp convert_element_type cos div eq erf exp exp2 ge gt integer_pow le log logistic lt max min mul ne
neg not or rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sqrt square sub tanh
xor broadcast_in_dim squeeze reshape copy stop_gradient
"""
_TRANSCENDENTAL = {"atan2", "cos", "erf", "exp", "exp2", "log", "logistic", "rsqrt", "sin", "sqrt"}
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

    Its error is absolute, about 2^-21, as a score's rounding is. CUDA's own is exact near 0 too, and takes more than
    three times as many instructions (counted in compiled code). So does a quotient; a power of a logarithm takes two.
    """
    power = jnp.exp2(x * (2 * math.log2(math.e)))
    return 1.0 - 2.0 * jnp.exp2(-jnp.log2(power + 1.0))


def has_own_powers(program: Program) -> bool:
    """Whether all powers, logarithms and the like in a kernel are its own, and no user's term has any.

    Then the compiler may take the GPU's instructions as they are: powers below 2^-126 become 0, and have a relative
    error of 2^-22 as before. A sine of large numbers would be wrong.
    """
    return not refused_operations(program, " ".join(set(ELEMENTWISE.split()) - _TRANSCENDENTAL))


def spread(x: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """A number as a tile; a tile as it is."""
    if np.shape(x) == shape:
        return x
    if jnp.issubdtype(dtype, jnp.bool_):  # the compiler broadcasts numbers, not masks
        return spread(jnp.asarray(x).astype(jnp.int32), shape, jnp.int32) != 0
    return jax.lax.broadcast(jnp.asarray(x, dtype), shape)
