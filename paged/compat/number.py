"""Checks of numbers and flags, which must be known when JAX traces. Errors name the argument."""

import math
import operator
from typing import Any

import jax
import jax.core
import numpy as np


def flag(name: str, value: Any) -> bool:
    """A Python or NumPy bool."""
    if value is True or value is False:
        return value
    if not isinstance(value, np.bool_):
        raise TypeError(f"{name} must be True or False; got {value!r}.")
    return bool(value)


def integer(name: str, value: Any, least: int) -> int:
    """A Python or NumPy integer, at least ``least``."""
    if isinstance(value, jax.core.Tracer):
        raise _traced(name)
    try:
        index = operator.index(value)
    except TypeError:
        index = None
    if index is None or isinstance(value, bool):
        raise TypeError(f"{name} must be a Python int; got {value!r}.")
    if index < least:
        raise ValueError(f"{name} must be at least {least}; got {index}.")
    return index


def number(name: str, value: Any) -> float:
    """A Python or NumPy number."""
    if isinstance(value, jax.core.Tracer):
        raise _traced(name)
    if isinstance(value, str | bool) or not hasattr(value, "__float__") or getattr(value, "size", 1) != 1:
        raise TypeError(f"{name} must be a number; got {value!r}.")
    return float(value)


def positive(name: str, value: Any) -> float:
    """A Python or NumPy number, positive and finite."""
    got = number(name, value)
    if not 0 < got < math.inf:
        raise ValueError(f"{name} must be positive and finite; got {got}.")
    return got


def block_sizes(name: str, sizes: Any) -> tuple[int, ...]:
    """Four sizes of blocks: of queries and of keys, for copies and for computing."""
    if not isinstance(sizes, tuple | list) or len(sizes) != 4:
        raise TypeError(f"{name} must be four sizes of blocks, (bq, bkv, bq_compute, bkv_compute); got {sizes!r}.")
    return tuple(integer(name, size, 1) for size in sizes)


def _traced(name: str) -> TypeError:
    return TypeError(
        f"{name} must be known when JAX traces, and is traced itself: write 1 / math.sqrt(128) for "
        "1 / jnp.sqrt(128), or name it in static_argnames."
    )
