"""Three-valued answers: are no pairs, some pairs or all pairs of a rectangle of positions visible?"""

from typing import Any, NamedTuple

BoolLike = Any  # a Python bool, a NumPy bool, or a bool array


class Coverage(NamedTuple):
    """What is certain about the pairs ``(p, j)`` of a rectangle of positions.

    **Arguments:**

    - `some`: False where the rectangle is certainly *empty*: no pair is visible.
    - `full`: True where the rectangle is certainly *full*: every pair is visible. Then ``some`` is True too.

    Otherwise the rectangle is *partial*: nothing is certain, so the mask must be evaluated. Both fields are Python
    bools for one rectangle, or bool arrays for many.

    These are the truth values of Kleene's strong three-valued logic (S. C. Kleene, *Introduction to Metamathematics*,
    1952, section 64), written as a lower and an upper bound. So ``&``, ``|`` and ``~`` are the same operations for
    Python bools when JAX traces and for arrays when the program runs.

    >>> Coverage(some=True, full=False) & Coverage(some=True, full=True)
    Coverage(some=True, full=False)
    >>> str(~Coverage(some=False, full=False))
    'full'
    """

    some: BoolLike
    full: BoolLike

    def __and__(self, other: "Coverage") -> "Coverage":
        return Coverage(self.some & other.some, self.full & other.full)

    def __or__(self, other: "Coverage") -> "Coverage":
        return Coverage(self.some | other.some, self.full | other.full)

    def __invert__(self) -> "Coverage":
        return Coverage(_not(self.full), _not(self.some))

    def __str__(self) -> str:
        return "empty" if not self.some else "full" if self.full else "partial"


PARTIAL = Coverage(some=True, full=False)


def _not(value: BoolLike) -> BoolLike:
    # A Python bool needs `not`: `~True` is the integer -2, which counts as true.
    return not value if isinstance(value, bool) else ~value
