"""What differs between the versions of JAX that are supported, as facts with names. Measured on CPU, x86-64."""

import jax
import jax.numpy as jnp

_VERSION = jax.__version_info__

# XLA:CPU computes with these floats by converting them, and to gather from a pool or to update a slot of it converts
# the *whole pool*, there and back. As bits they are moved alone.
CONVERTED_WHOLE = tuple(
    jnp.dtype(name)
    for name, is_converted in {
        "bfloat16": _VERSION < (0, 11),
        "float8_e4m3fn": True,
        "float8_e5m2": True,
    }.items()
    if is_converted
)

# A view as bits, an update and the view back, inside a loop, are one update in place; later versions copy the pool at
# each turn, so that the views must be outside of the loop, where they copy it once.
HAS_BIT_UPDATES_IN_PLACE = _VERSION < (0, 12)
