"""Loops inside a kernel, and arithmetic of indices that may be known when the kernel is traced or only when it runs.

An index that is a Python ``int`` makes a static address. A traced one is computed by the chip's scalar unit.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl

# A Python int, or an i32[] that is traced.
Index = Any


def loop(count: int, act: Callable[[Index], None]) -> None:
    """Call ``act(i)`` for i < count. With count 1 it is called with a Python 0, so that addresses stay static."""
    if count == 1:
        act(0)
    else:
        jax.lax.fori_loop(0, count, lambda i, _: act(i), None)


def unrolled_loop(count: int, most: int, act: Callable[[Index], None]) -> None:
    """Call ``act(i)`` for i < count, at most ``most`` calls in one straight line of code."""
    step = max(n for n in range(1, most + 1) if count % n == 0)

    def run_line(turn: Index) -> None:
        for i in range(step):
            act(turn * step + i)

    loop(count // step, run_line)


def even_divisor(count: int, most: int) -> int:
    """The largest even divisor of ``count`` up to ``most``; ``count`` itself where there is none."""
    return max([n for n in range(2, most + 1, 2) if count % n == 0], default=count)


def div(a: Index, b: int) -> Index:
    """``a // b`` for a >= 0."""
    return a // b if isinstance(a, int) else jax.lax.div(a, b)


def rem(a: Index, b: int) -> Index:
    """``a % b`` for a >= 0."""
    return a % b if isinstance(a, int) else jax.lax.rem(a, b)


def multiple(number: Index, of: int) -> Index:
    """``number * of``, where the compiler is told that the product is a multiple of ``of``."""
    return number * of if isinstance(number, int) else pl.multiple_of(number * of, of)
