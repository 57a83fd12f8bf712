"""A user's function as a term of a spec: what it must be, and how it prints."""

import functools
import inspect
from collections.abc import Callable
from typing import Any


def function_name(fn: Callable[..., Any]) -> str:
    """The name of a user's function in a printed program: its own, or that of its class."""
    return getattr(fn, "__name__", None) or type(fn).__name__


@functools.lru_cache(maxsize=1024)
def required_arguments(fn: Callable[..., Any]) -> int | None:
    """How many positional arguments a function needs; None where its signature does not say."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in kinds and parameter.default is parameter.empty for parameter in parameters)


def require_hashable_function(owner: str, fn: Any, signature: str) -> None:
    """Raise ``TypeError`` unless ``fn`` is a callable with a hash: specs are compared and cached by their terms.

    ``owner`` is the class that needs the function and ``signature`` what it must look like; both are for the message.
    """
    if not callable(fn):
        raise TypeError(f"{owner} needs a function {signature}; got {fn!r}.")
    try:
        hash(fn)
    except TypeError:
        raise TypeError(
            f"{owner} needs a hashable function, because specs are compared and cached by their terms; "
            f"{type(fn).__name__} has no hash (a Module that holds arrays, perhaps). "
            f"Wrap it once: `fn = lambda *args: module(*args)`, and keep that function."
        ) from None


def require_elementwise(owner: str, term: Any, got: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless a result of shape ``got`` broadcasts to ``shape``, that of the pairs it is for."""
    tail = shape[len(shape) - len(got) :]
    if len(got) > len(shape) or any(a not in (1, b) for a, b in zip(got, tail, strict=True)):
        raise ValueError(
            f"{owner} needs an elementwise function: its result must broadcast to {shape}, the shape that its "
            f"arguments broadcast to; {term} returned {got}."
        )
