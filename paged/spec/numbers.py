"""Checks of numbers and flags that a declaration is made of."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# What a caller may write where a declaration has a flag, or a real number.
Flag = bool | np.bool_
Real = float | int | np.floating | np.integer

SMALLEST_INT32, LARGEST_INT32 = -(2**31), 2**31 - 1
LARGEST_FLOAT32, SMALLEST_FLOAT32 = (float(x) for x in (np.finfo(np.float32).max, np.finfo(np.float32).tiny))


def require_int(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is a Python int. A bool is none, and neither is a NumPy number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a Python int; got {value!r}.")


def require_positive_int(name: str, value: Any, least: int = 1) -> None:
    """Raise ``TypeError`` unless ``value`` is a Python int, and ``ValueError`` unless it is at least ``least``."""
    require_int(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}.")


def require_size(owner: str, name: str, value: Any) -> None:
    """Raise ``TypeError`` unless a mask's number is a Python int, and ``ValueError`` where no position reaches it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}'s {name} must be a Python int, known when the program is built; got {value!r}.")
    if value > LARGEST_INT32:
        raise ValueError(
            f"{owner}'s {name} must be at most 2**31 - 1, because positions are int32; got {value}. A mask as large as "
            "that hides nothing: leave it out."
        )


def as_bool(name: str, value: Any) -> bool:
    """``value`` as a Python bool. Raises ``TypeError`` unless it is one, or a NumPy bool.

    >>> as_bool("causal", np.False_)
    False
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False; got {value!r}.")
    return bool(value)


def as_float(name: str, value: Any, remedy: str = "") -> float:
    """``value`` as a Python float. NumPy's real numbers count; a bool and a JAX array do not.

    Raises ``TypeError`` for what is no such number, and ``ValueError`` for NaN, an infinity, and a number that is
    infinite in float32. ``remedy`` ends the message, after a space.

    >>> as_float("scale", np.float32(0.5))
    0.5
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{name} must be a number that is known when the spec is built, such as 0.5; got {value!r}.{remedy}"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= LARGEST_FLOAT32:
        raise ValueError(f"{name} must be finite in float32, in which scores are computed; got {value}.{remedy}")
    return number


def is_integer(value: Any) -> bool:
    """Whether an array holds integers, of any width; Python's, too large for any, count as well."""
    if value.dtype == object:  # Python integers that no integer of NumPy holds
        return all(isinstance(x, int) and not isinstance(x, bool) for x in value.flat)
    return bool(jnp.issubdtype(value.dtype, jnp.integer))


def within_int32(value: Any) -> Any:
    """``value`` with every number outside of int32 replaced by the nearest one inside: a cast would wrap."""
    if isinstance(value, jax.Array):
        if jnp.iinfo(value.dtype).max > LARGEST_INT32:
            value = jnp.minimum(value, jnp.asarray(LARGEST_INT32, value.dtype))
        if jnp.iinfo(value.dtype).min < SMALLEST_INT32:
            value = jnp.maximum(value, jnp.asarray(SMALLEST_INT32, value.dtype))
        return value
    with np.errstate(over="ignore"):
        cast = value.astype(np.int32) if value.dtype != object else None
    if cast is not None and (cast.dtype == value.dtype or (cast == value).all()):
        return cast
    return np.clip(value, SMALLEST_INT32, LARGEST_INT32).astype(np.int32)
