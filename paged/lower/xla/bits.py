"""Narrow floats as the bits they are, for moving them without XLA:CPU converting the whole pool."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..jax_version import CONVERTED_WHOLE

_BITS = {1: jnp.uint8, 2: jnp.uint16}


def as_bits(x: Array, step: Any = None) -> Array:
    """``x`` as unsigned integers, if its dtype is one that this version of JAX converts in order to move.

    In a loop, ``step`` is the loop's counter: a view that is tied to it stays in the loop, and is not made of the
    whole pool before.
    """
    if x.dtype not in CONVERTED_WHOLE:
        return x
    if step is not None:
        x, _ = jax.lax.optimization_barrier((x, step))
    return jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize])


def from_bits(bits: Array, dtype: Any) -> Array:
    """The inverse of `as_bits`."""
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)
