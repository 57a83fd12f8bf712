"""Checks of numbers that a declaration is made of."""

from typing import Any


def require_int(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is a Python int. A bool is none, and neither is a NumPy number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a Python int; got {value!r}.")


def require_positive_int(name: str, value: Any, least: int = 1) -> None:
    """Raise ``TypeError`` unless ``value`` is a Python int, and ``ValueError`` unless it is at least ``least``."""
    require_int(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}.")
