"""`Spans` and `Segments`: pieces of a sequence whose tokens see each other, or see nothing of the other pieces."""

import dataclasses
from typing import Any

from .coverage import Coverage
from .given import Value, require_value
from .mask import Mask
from .numbers import require_int


@dataclasses.dataclass(frozen=True)
class Spans(Mask):
    """``start <= p < end`` and ``start <= j < end`` for one of several spans: the tokens of a span see each other.

    The tokens of an image see each other and the past in Gemma 3 (arXiv:2503.19786) and in PaliGemma
    (arXiv:2407.07726): ``Causal() | Spans(...)``. Spans may overlap. A span that ends where it starts, or before, is
    empty.

    **Arguments:**

    - `starts`, `ends`: as many of each: a tuple of Python ints, or a `Value` with that size, so that every sequence has
      spans of its own. Fill up with empty spans.

    **Raises:** ``TypeError`` for anything else, ``ValueError`` where there are not as many of each.

    >>> image = Causal() | Spans((1,), (4,))
    >>> [[j for j in range(6) if image(p, j)] for p in range(5)]
    [[0], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    """

    is_opaque, rank = False, 3

    starts: tuple[int, ...] | Value
    ends: tuple[int, ...] | Value

    def __post_init__(self):
        sizes = [_require_numbers("Spans", name, getattr(self, name)) for name in ("starts", "ends")]
        if sizes[0] != sizes[1]:
            raise ValueError(f"Spans needs as many starts as ends; got {sizes[0]} and {sizes[1]}.")

    def __call__(self, p, j):
        return _any([(start <= p) & (p < end) & (start <= j) & (j < end) for start, end in self._spans])

    def coverage(self, p0, p1, j0, j1):
        spans = self._spans
        some = [(start < end) & (p0 < end) & (start < p1) & (j0 < end) & (start < j1) for start, end in spans]
        full = [(start <= p0) & (p1 <= end) & (start <= j0) & (j1 <= end) for start, end in spans]
        return Coverage(_any(some), _any(full))

    @property
    def _spans(self) -> list[tuple[Any, Any]]:
        starts, ends = self.starts, self.ends
        if isinstance(starts, Value) or isinstance(ends, Value):
            raise TypeError(f"{self} needs what a batch brings: mask.given(Given(numbers={{...}}))(p, j).")
        return list(zip(starts, ends, strict=True))

    def __str__(self):
        return f"p and j in one of [{self.starts}, {self.ends})"


@dataclasses.dataclass(frozen=True)
class Segments(Mask):
    """``j`` and ``p`` belong to the same segment: documents that are packed into one sequence do not see each other.

    **Arguments:**

    - `starts`: where each segment but the first starts, in any order: a tuple of Python ints, or a `Value` with a size,
      so that every sequence has segments of its own. Fill up with the length of the sequence, or more.

    **Raises:** ``TypeError`` for anything else.

    >>> [j for j in range(9) if (Causal() & Segments((2, 5)))(6, j)]
    [5, 6]
    """

    is_opaque, rank = False, 2

    starts: tuple[int, ...] | Value

    def __post_init__(self):
        _require_numbers("Segments", "starts", self.starts)

    def __call__(self, p, j):
        return self._segment(p) == self._segment(j)

    def coverage(self, p0, p1, j0, j1):
        first_p, last_p = self._segment(p0), self._segment(p1 - 1)
        first_j, last_j = self._segment(j0), self._segment(j1 - 1)
        one_segment = (first_p == last_p) & (first_p <= first_j) & (last_j <= first_p)
        return Coverage(some=(first_j <= last_p) & (first_p <= last_j), full=one_segment)

    def _segment(self, position: Any) -> Any:
        """The number of the segment of a position: how many segments have started up to there."""
        number = 0 * position
        for start in self.starts:  # pyright: ignore
            number = number + _one_if(position >= start)
        return number

    def __str__(self):
        return f"one segment of {self.starts}"


def _require_numbers(owner: str, name: str, numbers: Any) -> int:
    """How many numbers a field holds. ``TypeError`` unless it is a tuple of Python ints, or a `Value` with a size."""
    if isinstance(numbers, Value):
        require_value(owner, name, numbers, "int32", has_size=True)
        return numbers.size or 0
    if not isinstance(numbers, tuple) or not numbers:
        raise TypeError(f"{owner}'s {name} must be a tuple of ints, or a Value with a size; got {numbers!r}.")
    for number in numbers:
        require_int(f"Each of {owner}'s {name}", number)
    return len(numbers)


def _one_if(condition: Any) -> Any:
    return int(condition) if isinstance(condition, bool) else condition.astype("int32")


def _any(conditions: list[Any]) -> Any:
    value = conditions[0]
    for condition in conditions[1:]:
        value = value | condition
    return value
