"""Integers of a kernel's scalar core, known to lie in a range, whose sums end at the least and the greatest int32.

An edge of a comparison is found by moving terms to the other side. Where that would wrap, the edge is past every page,
and a number that stops at the end of int32 says so.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

LEAST, MOST = -(2**31), 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Integer:
    """``base + offset``, where ``base`` is an int32 scalar in ``[low, high]``, or None for 0.

    Constants are collected in ``offset``, so that several additions are one operation.
    """

    base: Any
    low: int
    high: int
    offset: int = 0

    @classmethod
    def known(cls, x: int) -> Self:
        """A number that is known when traced."""
        return cls(None, 0, 0, x)

    def __add__(self, other: "Integer") -> "Integer":
        if other.base is None or self.base is None:
            own = other if self.base is None else self
            return dataclasses.replace(own, offset=self.offset + other.offset)
        return self - -other

    def __neg__(self) -> "Integer":
        if self.base is None:
            return Integer.known(-self.offset)
        # The least int32 has no negative.
        low = max(self.low, -MOST)
        base = self.base if low == self.low else jnp.maximum(self.base, low)
        return Integer(-base, -self.high, -low, -self.offset)

    def __sub__(self, other: "Integer") -> "Integer":
        if other.base is None or self.base is None:
            return self + -other
        low, high, base = self.low - other.high, self.high - other.low, self.base - other.base
        if low < LEAST or high > MOST:
            # It wrapped if the operands differ in sign and the result has not the first one's.
            has_wrapped = ((self.base ^ other.base) & (self.base ^ base)) < 0
            base = jnp.where(has_wrapped, jnp.where(self.base < 0, LEAST, MOST), base)
        return Integer(base, max(low, LEAST), min(high, MOST), self.offset - other.offset)

    def value(self) -> Any:
        """The number as an int32, or a Python int if it is known when traced."""
        return self._plain().base if self.base is not None else min(max(self.offset, LEAST), MOST)

    def _plain(self) -> "Integer":
        """The same number without an offset."""
        plain = self
        while plain.offset:
            step = min(max(plain.offset, -MOST), MOST)
            # Only where the sum could pass the end: usually the range is known to be narrower.
            base, low, high = plain.base, max(plain.low, LEAST - step), min(plain.high, MOST - step)
            base = base if low == plain.low else jnp.maximum(base, low)
            base = base if high == plain.high else jnp.minimum(base, high)
            plain = Integer(base + step, max(low, plain.low) + step, min(high, plain.high) + step, plain.offset - step)
        return plain

    def times(self, factor: int) -> "Integer":
        """The product with a positive constant."""
        if self.base is None:
            return Integer.known(self.offset * factor)
        plain = self._plain()
        low, high = max(plain.low, -(MOST // factor)), min(plain.high, MOST // factor)
        base = plain.base if low == plain.low else jnp.maximum(plain.base, low)
        base = base if high == plain.high else jnp.minimum(base, high)
        return Integer(base * factor, low * factor, high * factor)

    def divided(self, divisor: int) -> "Integer":
        """The quotient by a positive constant, rounded down."""
        if self.base is None:
            return Integer.known(self.offset // divisor)
        plain = self._plain()
        return Integer(floor_div(plain.base, divisor, plain.low), plain.low // divisor, plain.high // divisor)


def floor_div(x: Any, divisor: int, low: int = LEAST) -> Any:
    """``x // divisor`` of an int32 scalar that is at least ``low``, by a positive constant: a shift where that does."""
    if divisor & (divisor - 1) == 0:
        return jax.lax.shift_right_arithmetic(x, jnp.int32(divisor.bit_length() - 1))
    quotient = jax.lax.div(x, jnp.int32(divisor))
    return quotient if low >= 0 else jnp.where(x - quotient * divisor < 0, quotient - 1, quotient)
