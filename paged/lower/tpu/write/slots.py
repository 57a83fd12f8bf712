"""Which tokens and granules every sequence writes, as numbers that the scalar core reads."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ...program import Sequences
from .granules import GRANULE


class Slots(NamedTuple):
    """What each sequence writes, for scalar memory.

    * ``first``, ``end``: the positions from the first that is written to the one after the last.
    * ``row``: the new row of the first.
    * ``tables``: block tables, one after the other. Where `Places.is_window` is set, each begins with the entry of the
      first position.
    """

    first: Int[Array, " seqs"]
    end: Int[Array, " seqs"]
    row: Int[Array, " seqs"]
    tables: Int[Array, " entries"]

    @classmethod
    def of(cls, seqs: Sequences) -> "Slots":
        """The sequences' slots, with whole block tables."""
        first = first_position(seqs)
        end = jnp.where(seqs.counts > 0, seqs.lengths, first)
        return cls(first, end, seqs.starts + first - seqs.positions, seqs.tables.reshape(-1))


def first_position(seqs: Sequences) -> Int[Array, " seqs"]:
    """The first position that is written; ``lengths``, which ends what is written, where none is."""
    return jnp.clip(seqs.positions, 0, seqs.lengths)


def edges(first: Any, end: Any) -> tuple[tuple[Any, Any, Any, Any], ...]:
    """The granules of which a sequence writes some tokens: at most its first and its last one.

    Each is ``(exists, position, begin, end)``: the position of its first token, and its tokens that are written.
    """
    head, tail = first - _in_granule(first), end - _in_granule(end)
    return (
        ((_in_granule(first) > 0) & (first < end), head, _in_granule(first), jnp.minimum(end - head, GRANULE)),
        # Where rows begin and end in one granule, that granule is the head, and there is no tail.
        ((_in_granule(end) > 0) & (first < end) & (tail >= first), tail, 0, _in_granule(end)),
    )


def inner(first: Any, end: Any) -> tuple[Any, Any]:
    """The granules of which a sequence writes every token: the position of the first one, and how many follow it."""
    position = first + _in_granule(-first)
    return position, jnp.maximum(quotient(end, GRANULE) - quotient(position, GRANULE), 0)


@dataclasses.dataclass(frozen=True)
class Places:
    """Where positions lie in pages, of ``slots`` sequences with ``width`` entries of a block table each.

    * ``is_window``: whether block tables begin with the entry of the first position.
    """

    slots: int
    width: int
    page_size: int
    num_pages: int
    is_window: bool

    def base(self, first: Any) -> Any:
        """The entry that the table of a sequence begins with, which writes from position ``first`` on."""
        return quotient(first, self.page_size) if self.is_window else 0

    def find(self, scalars: Slots, seq: Any, position: Any, base: Any) -> tuple[Any, Any]:
        """The page of a sequence's position, which may be none of the pool's, and the offset in it."""
        entry = quotient(position, self.page_size)
        at = seq * self.width + jnp.clip(entry - base, 0, self.width - 1)
        return scalars.tables[at], position - entry * self.page_size

    def has(self, page: Any) -> Any:
        """Whether it is one of the pool's pages."""
        return (page >= 0) & (page < self.num_pages)


def quotient(x: Any, divisor: int) -> Any:
    """``x // divisor`` of a number that is not negative: a shift where that does."""
    if divisor & (divisor - 1) == 0:
        return jax.lax.shift_right_logical(x, jnp.int32(divisor.bit_length() - 1))
    return jax.lax.div(x, jnp.int32(divisor))


def _in_granule(position: Any) -> Any:
    return position & (GRANULE - 1)
