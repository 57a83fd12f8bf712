"""Three-valued answers: does a rectangle of positions hold no, some or only visible pairs?"""

from typing import Any, NamedTuple

BoolLike = Any  # a Python bool, a NumPy bool, or a boolean array: the algebra is the same for all


class Coverage(NamedTuple):
    """What is known of the pairs ``(p, j)`` in a rectangle, as two certainties.

    * ``some`` False: certainly *empty*, no pair is visible.
    * ``full`` True: certainly *full*, every pair is visible.
    * otherwise *partial*: anything may be the case, so the mask must be evaluated.

    These are the truth values of Kleene's strong three-valued logic (S. C. Kleene, *Introduction to
    Metamathematics*, 1952, section 64) coded as a pair of bounds, so that ``& | ~`` work the same on Python
    bools at trace time and on arrays of rectangles at run time.

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
    # `~True` is -2 for a Python bool, and True for nobody.
    return not value if isinstance(value, bool) else ~value
