"""`one_program`: an operation on arrays that is one compiled program where a user calls it outside of ``jax.jit``."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

Operation = TypeVar("Operation", bound=Callable[..., Any])


def one_program(operation: Operation, *, static: Sequence[str] = ()) -> Operation:
    """``operation`` as one program, compiled once for each shape.

    Without it a call outside of ``jax.jit`` is a program for each operation of it, and a loop in it is compiled again
    with every call: to insert into a prefix cache took 430 ms (measured). Inside of ``jax.jit`` it is a part of the
    caller's program, as if it were written there.

    **Arguments:**

    - `operation`: a function or method of arrays and of pytrees of these.
    - `static`: its arguments that are no arrays.

    **Returns:** a function with the same arguments.
    """
    program = jax.jit(operation, static_argnames=tuple(static), inline=True)

    @functools.wraps(operation)
    def run(*args: Any, **options: Any) -> Any:
        return program(*args, **options)

    return run  # type: ignore[return-value]
