"""What a batch brings for a kernel's items, in scalar memory: numbers of their sequences, and of their query rows."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged.spec import Value

from ...program import WORD, OwnRows, Program, Sequences, by_name, dtypes_of, in_order
from ..references import Ref


class Brought(NamedTuple):
    """What a batch brings, a row for each sequence: arrays [seqs, n]. Scalar memory holds them flat, see `flat`.

    * ``ints``, ``floats``: numbers of masks and of score operations, in the order of the program's values.
    * ``positions``: of each query row.
    * ``words``: for each query row the words of its ancestors, as many as its sequence's rows can have bits in.

    What there is none of is None.
    """

    ints: Any = None
    floats: Any = None
    positions: Any = None
    words: Any = None

    @classmethod
    def of(cls, program: Program, seqs: Sequences, rows: int, are_even: bool) -> "Brought":
        """What is brought for sequences of ``rows`` query rows each. If even, the rows follow one another."""
        numbers = cls.of_numbers(program, seqs)
        if seqs.own is None:
            return numbers
        words = seqs.own.ancestors if program.has_ancestors else None
        own = OwnRows(seqs.own.positions, None if words is None else words[:, : -(-rows // WORD)])
        if not are_even:
            row = seqs.starts[:, None] + jnp.arange(rows, dtype=jnp.int32)[None]
            own = jax.tree.map(lambda x: x[jnp.clip(row, 0, x.shape[0] - 1)], own)
        own = jax.tree.map(lambda x: x.reshape(seqs.starts.shape[0], -1), own)
        return numbers._replace(positions=own.positions, words=own.ancestors)

    @classmethod
    def of_numbers(cls, program: Program, seqs: Sequences) -> "Brought":
        """The numbers of sequences alone."""
        numbers, dtypes = in_order(program.values, seqs.numbers), dtypes_of(program.values)

        def of_dtype(dtype: Any) -> Array | None:
            own = [x for x, its in zip(numbers, dtypes, strict=True) if its == dtype]
            return jnp.stack(own, axis=1) if own else None

        return cls(of_dtype(jnp.int32), of_dtype(jnp.float32))

    def flat(self) -> "Brought":
        """One row after the other: scalar memory pads the rows of a matrix."""
        return jax.tree.map(lambda x: x.reshape(-1), self)

    @property
    def per_seq(self) -> int:
        """Numbers of 32 bits for each sequence."""
        return sum(x.shape[1] for x in self if x is not None)


def most_brought(program: Program, rows: int, has_own_rows: bool) -> int:
    """`Brought.per_seq`, or more, of sequences of ``rows`` query rows each."""
    words = -(-rows // WORD) if program.has_ancestors else 0
    return len(dtypes_of(program.values)) + (rows * (1 + words) if has_own_rows else 0)


@dataclasses.dataclass(frozen=True)
class BroughtFor:
    """What is brought for one item: row ``which()`` of ``count`` rows in scalar memory. What is asked for is read."""

    flat: Brought
    which: Callable[[], Any]
    count: int

    def in_order(self, values: tuple[Value, ...]) -> tuple[Any, ...]:
        """The numbers of values, in order."""
        ints, floats = iter(self._row(self.flat.ints)), iter(self._row(self.flat.floats))
        return tuple(next(ints if dtype == jnp.int32 else floats) for dtype in dtypes_of(values))

    def numbers(self, values: tuple[Value, ...]) -> dict[str, Any]:
        """The numbers of values, by name."""
        return by_name(values, self.in_order(values))

    @property
    def has_own_rows(self) -> bool:
        """Whether positions, and perhaps ancestors, of query rows are brought."""
        return self.flat.positions is not None

    def positions(self) -> list[Int[Array, ""]]:
        """The position of each query row."""
        return self._row(self.flat.positions)

    def words(self) -> list[list[Int[Array, ""]]]:
        """The first word of each query row's ancestors, the second word of each, and so on."""
        words = self._row(self.flat.words)
        per_row = len(words) // (self.flat.positions.shape[0] // self.count)
        return [words[i::per_row] for i in range(per_row)]

    def _row(self, ref: Ref | None) -> list[Any]:
        if ref is None:
            return []
        width = ref.shape[0] // self.count
        first = self.which() * width
        return [ref[first + i] for i in range(width)]


def least_and_most(numbers: Iterable[Any]) -> tuple[Any, Any]:
    """The least and the greatest of some scalars."""
    least, *others = numbers
    most = least
    for number in others:
        least, most = jnp.minimum(least, number), jnp.maximum(most, number)
    return least, most
