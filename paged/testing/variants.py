"""The numbers and heads that a mask or score operation is tried with, where it names what a batch brings."""

import dataclasses
from typing import Any

import numpy as np

from paged.spec import Given, Mask, Value, minima_of, terms_in, values_of

_INTS = (4, 1, 9, 2**31 - 1)
_FLOATS = (0.5, 30.0, 1e4)
_MOST_HEADS = 128


def numbers_for(term: Any) -> list[dict[str, Any]]:
    """A few numbers for all values of a term, by name: the least, others, and large ones. Once none, if it has none.

    Of a value without a least number, 0 and negative numbers are among them.
    """
    least, values = least_of(term), values_of(term)
    # Each value begins elsewhere in the list, so that starts are not the ends.
    places = [(value, 2 * i) for i, value in enumerate(values)]
    return [
        {value.name: _number(value, least.get(value.name), first + k) for value, first in places}
        for k in range(6 if values else 1)
    ]


def least_of(term: Any) -> dict[str, float]:
    """The least number of each value that has one: where several terms name it, the smallest of theirs."""
    found: dict[str, float] = {}
    for name, least, _ in minima_of(term):
        found[name] = min(least, found.get(name, least))
    return found


def _number(value: Value, least: float | None, k: int) -> Any:
    choices = _INTS if value.dtype == "int32" else _FLOATS
    choices = (*choices, least) if least is not None else (*choices, 0, -3)
    cast = int if value.dtype == "int32" else float
    drawn = [cast(choices[(k + 2 * i) % len(choices)]) for i in range(value.size or 1)]
    return tuple(drawn) if value.size else drawn[0]


def heads_of(mask: Mask) -> int | None:
    """A number of query heads that a mask which differs by head is for, two of each kind if possible; else None."""
    if not any(term.has_heads for term in terms_in(mask)):
        return None
    fitting = [n for n in range(2, _MOST_HEADS + 1) if _fits(mask, n)]
    if not fitting:
        raise ValueError(f"{mask} differs by head, and is for no number of query heads from 2 to {_MOST_HEADS}.")
    return 2 * fitting[0] if 2 * fitting[0] in fitting else fitting[0]


def _fits(mask: Mask, num_q_heads: int) -> bool:
    try:
        mask.bind(num_q_heads)
    except ValueError:
        return False
    return True


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """A mask with numbers and a query head: a mask of positions alone. Without names, the mask as it is.

    ``head`` is None for a mask that does not differ by head. A `Tree` is asked about tokens before the step's own.
    """

    mask: Mask
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    head: int | None = None

    @property
    def given(self) -> Given:
        """What is given to the mask."""
        return Given(self.numbers, None if self.head is None else np.int32(self.head), True)

    @property
    def of_positions(self) -> Any:
        """The mask with what is given."""
        return self.mask.given(self.given)

    def of(self, mask: Mask) -> "Variant":
        """Another mask with the same numbers and head."""
        return dataclasses.replace(self, mask=mask)

    def __str__(self) -> str:
        said = [f"{name}={number}" for name, number in self.numbers.items()]
        said += [] if self.head is None else [f"head {self.head}"]
        return f"{self.mask}, where {', '.join(said)}," if said else str(self.mask)


def variants(mask: Mask) -> list[Variant]:
    """A mask with each of `numbers_for`, every head among them."""
    heads = heads_of(mask)
    mask = mask if heads is None else mask.bind(heads)
    numbers = numbers_for(mask)
    count = max(len(numbers), heads or 1)
    return [Variant(mask, numbers[k % len(numbers)], None if heads is None else k % heads) for k in range(count)]
