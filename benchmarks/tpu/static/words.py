"""Arithmetic of the scalar core: words of 32 bits, and pointers that stand for memory whose address is not known.

A pointer is a number so large that no word is mistaken for one: its symbol (an operand of the kernel or an allocation)
and an offset. Kernels add to pointers and shift them between units; `located` takes a pointer apart again.
"""

from typing import NamedTuple

_POINTER = 1 << 60
_SYMBOL_BITS = 40  # of a pointer's offset
_IS_POINTER = 1 << 58  # the smallest pointer, also after a shift to the right by two
_MASK = 0xFFFFFFFF


class Location(NamedTuple):
    """Where a pointer points: a symbol, an offset in the unit of the pointer, and how far that unit is shifted."""

    symbol: int
    offset: int
    shift: int


def pointer(symbol: int, offset: int = 0) -> int:
    """The pointer to a symbol's memory."""
    return _POINTER + (symbol << _SYMBOL_BITS) + offset


def located(address: int) -> Location:
    """Take a pointer apart."""
    shift = max(0, address.bit_length() - _POINTER.bit_length())
    symbol = ((address >> shift) - _POINTER) >> _SYMBOL_BITS
    return Location(symbol, address - (pointer(symbol) << shift), shift)


def wrap(x: int) -> int:
    """``x`` as a signed word of 32 bits; a pointer is left as it is."""
    if -0x80000000 <= x <= 0x7FFFFFFF or x >= _IS_POINTER:
        return x
    return ((x + 0x80000000) & _MASK) - 0x80000000


def unsigned(x: int) -> int:
    """A word read as unsigned; a pointer is left as it is."""
    return x if x >= _IS_POINTER else x & _MASK


def shift_left(a: int, b: int) -> int:
    """``a << b``, zeros shifted in."""
    return a << b if a >= _IS_POINTER else wrap((a & _MASK) << (b & 31))


def shift_left_ones(a: int, b: int) -> int:
    """``a << b``, ones shifted in. Kernels make masks of the first ``b`` sublanes with it."""
    return wrap(((a & _MASK) << (b & 31)) | ((1 << (b & 31)) - 1))


def shift_right(a: int, b: int) -> int:
    """``a >> b``, zeros shifted in."""
    return a >> b if a >= _IS_POINTER else wrap((a & _MASK) >> (b & 31))


def shift_right_sign(a: int, b: int) -> int:
    """``a >> b``, the sign shifted in."""
    return a >> b if a >= _IS_POINTER else a >> (b & 31)


def both(a: int, b: int) -> int:
    """``a & b``. A pointer is left as it is: its masks are alignments, which every symbol has."""
    return max(a, b) if a >= _IS_POINTER or b >= _IS_POINTER else wrap(a & b & _MASK)


def quotient_and_remainder(a: int, b: int) -> tuple[int, int]:
    """Quotient and remainder of unsigned words; ``(-1, a)`` where ``b`` is 0."""
    a, b = unsigned(a), unsigned(b)
    return (wrap(a // b), wrap(a % b)) if b else (-1, wrap(a))
