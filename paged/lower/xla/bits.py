"""Narrow floats as the bits they are, for moving them without XLA:CPU converting the whole pool to float32.

XLA:CPU computes with 16-bit floats by converting to float32, and does so for a gather, a slice or an update of a pool
as well: the *whole pool* is converted, and the conversion hoisted out of the loop. Moving unsigned integers, through a
view that is tied to the loop's counter so that the view stays in the loop too, avoids it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

_BITS = {1: jnp.uint8, 2: jnp.uint16}


def as_bits(x: Array, step: Any = None) -> Array:
    """``x`` as unsigned integers where its dtype is a float narrower than float32, else ``x``.

    In a loop, ``step`` is the loop's counter.
    """
    if x.dtype.itemsize not in _BITS or jnp.issubdtype(x.dtype, jnp.integer):
        return x
    if step is not None:
        x, _ = jax.lax.optimization_barrier((x, step))
    return jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize])


def from_bits(bits: Array, dtype: Any) -> Array:
    """The inverse of `as_bits`."""
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)
