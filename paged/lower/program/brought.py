"""What a batch brings for its sequences, in the forms in which lowerings carry it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged.spec import Value

# Rows that one word of ancestors has a bit for.
WORD = 32


class QueryRows(NamedTuple):
    """Some query rows of one sequence, as coverage sees them; or of many, with a leading axis everywhere.

    * ``p0``, ``p1``: the half-open range of their positions.
    * ``length``: the number of keys of the sequence that exist.
    * ``numbers``: the sequence's numbers, by name.
    * ``own``: the place of the first token of the step, if the batch brings positions or ancestors: of the step's own
      tokens coverage knows nothing then. Else None.
    """

    p0: Any
    p1: Any
    length: Any
    numbers: Mapping[str, Any] = {}
    own: Any = None


class OwnRows(NamedTuple):
    """What a batch brings for its query rows.

    * ``positions`` i32[tokens]: the position of each row, as masks and scores see it.
    * ``ancestors`` i32[tokens, words]: the bits of each row's ancestors; None where no term asks.
    """

    positions: Int[Array, " tokens"]
    ancestors: Int[Array, "tokens words"] | None


def by_name(values: Sequence[Value], numbers: Iterable[Any]) -> dict[str, Any]:
    """Numbers by the names of their values, from all numbers in order; those of a value with a size as a tuple."""
    left = iter(numbers)
    return {v.name: next(left) if v.size is None else tuple(next(left) for _ in range(v.size)) for v in values}


def in_order(values: Sequence[Value], numbers: Mapping[str, Any]) -> tuple[Any, ...]:
    """The reverse of `by_name`."""
    return tuple(x for v in values for x in ((numbers[v.name],) if v.size is None else numbers[v.name]))


def dtypes_of(values: Sequence[Value]) -> tuple[Any, ...]:
    """The dtype of each number, in order."""
    return tuple(jnp.dtype(v.dtype) for v in values for _ in range(v.size or 1))


def is_ancestor(words: Sequence[Any], row: Any, key: Any) -> Any:
    """Whether a key is before the step's own tokens, or the row's own, or one of its ancestors'.

    **Arguments:**

    - `words`: the words of the row's ancestors; they broadcast against the others.
    - `row`, `key`: the number of the step's own row that the row is, and that the key is: negative before these.
    """
    word = words[0]
    for i, other in enumerate(words[1:], 1):
        word = jnp.where(key >= i * WORD, other, word)
    # Of a key that is no row of the step, no bit is asked.
    bit = jax.lax.shift_right_logical(*jnp.broadcast_arrays(word, jnp.bitwise_and(key, WORD - 1))) & 1
    return (key < 0) | (key == row) | ((bit == 1) & (key < WORD * len(words)))
