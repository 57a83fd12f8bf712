"""`Mask`: which key positions ``j`` a query at position ``p`` sees; and how masks combine by ``&``, ``|`` and ``~``."""

import abc
import dataclasses
from typing import Any

import jax.numpy as jnp

from .coverage import Coverage
from .given import Term

Position = Any  # an int, or an integer array; shapes broadcast


class Mask(Term, abc.ABC):
    """A predicate over absolute positions. A mask is hashable, holds no arrays, and combines by ``&``, ``|`` and ``~``.

    A new mask is one frozen dataclass with `__call__` and `coverage`. Every lowering then evaluates the mask, and skips
    the pages that the mask hides. A field may hold a `Value`, a number that the batch
    brings. With `implies`, programs that use the mask become simpler; ``__str__`` is how they
    print it. `docs/extending.md` walks through an example.

    >>> local = Causal() & (Window(4) | Prefix(1))
    >>> [j for j in range(9) if local(8, j)]
    [0, 5, 6, 7, 8]
    >>> str(local.coverage(p0=100, p1=110, j0=16, j1=32))
    'empty'
    """

    # Whether the mask may close over arrays. Lowerings carry such arrays to where the mask is evaluated.
    is_opaque: bool = True
    # The place of the mask among others in a normal form: by rank, and by text among masks of one rank.
    rank: int = 4

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "is_opaque" not in vars(cls):  # A subclass of a built-in mask may compute anything.
            cls.is_opaque = True

    @abc.abstractmethod
    def __call__(self, p: Position, j: Position) -> Any:
        """Whether the query at position ``p`` sees the key at position ``j``.

        **Arguments:**

        - `p`, `j`: integers, or integer arrays that broadcast against each other. Positions may be negative.

        **Returns:** a bool, or a bool array of the broadcast shape.
        """

    @abc.abstractmethod
    def coverage(self, p0: Position, p1: Position, j0: Position, j1: Position) -> Coverage:
        """What is certain about the pairs of the rectangle ``[p0, p1) x [j0, j1)``.

        **Arguments:**

        - `p0`, `p1`: the query positions ``p0 .. p1 - 1``, of which there is at least one.
        - `j0`, `j1`: the key positions ``j0 .. j1 - 1``, of which there is at least one. All four are integers, or
          integer arrays that broadcast, for many rectangles at once.

        **Returns:** a `Coverage`. *Empty* and *full* must never be wrong, because lowerings then skip the keys or the
        mask. *Partial* is always allowed.
        """

    def implies(self, other: "Mask") -> bool:
        """Whether every pair that is visible in this mask is certainly visible in ``other``.

        True must never be wrong. False is always allowed. Programs use the answer to drop terms: in ``a & b``, ``b`` is
        dropped when ``a`` implies ``b``.

        >>> Window(4).implies(Window(8)), Window(8).implies(Window(4))
        (True, False)
        """
        return self == other

    def bind(self, num_q_heads: int) -> "Mask":
        """This mask for a spec of so many query heads; a mask that differs by head needs their number.

        **Raises:** ``ValueError`` where the mask is made for another number of heads.
        """
        del num_q_heads
        return self

    def __and__(self, other: "Mask") -> "Mask":
        return And((self, other)) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return Or((self, other)) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> "Mask":
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError(_NO_TRUTH_VALUE)


_NO_TRUTH_VALUE = """A mask has no truth value, so `and`, `or`, `not` and chained comparisons do not work on it.
    wrong: Causal() and Window(128)
    right: Causal() & Window(128)        also: |  ~"""


@dataclasses.dataclass(frozen=True)
class And(Mask):
    """``a & b``: visible where every one of ``terms`` is visible."""

    terms: tuple[Mask, ...]

    def __post_init__(self):
        _require_terms("And", self.terms)

    @property
    def is_opaque(self) -> bool:
        return any(term.is_opaque for term in self.terms)

    def bind(self, num_q_heads):
        return And(tuple(term.bind(num_q_heads) for term in self.terms))

    def __call__(self, p, j):
        value = self.terms[0](p, j)
        for term in self.terms[1:]:
            value = value & term(p, j)
        return value

    def coverage(self, p0, p1, j0, j1):
        value = self.terms[0].coverage(p0, p1, j0, j1)
        for term in self.terms[1:]:
            value = value & term.coverage(p0, p1, j0, j1)
        return value

    def __str__(self):
        return " & ".join(f"({term})" for term in self.terms)


@dataclasses.dataclass(frozen=True)
class Or(Mask):
    """``a | b``: visible where at least one of ``terms`` is visible."""

    terms: tuple[Mask, ...]

    def __post_init__(self):
        _require_terms("Or", self.terms)

    @property
    def is_opaque(self) -> bool:
        return any(term.is_opaque for term in self.terms)

    def bind(self, num_q_heads):
        return Or(tuple(term.bind(num_q_heads) for term in self.terms))

    def __call__(self, p, j):
        value = self.terms[0](p, j)
        for term in self.terms[1:]:
            value = value | term(p, j)
        return value

    def coverage(self, p0, p1, j0, j1):
        value = self.terms[0].coverage(p0, p1, j0, j1)
        for term in self.terms[1:]:
            value = value | term.coverage(p0, p1, j0, j1)
        return value

    def __str__(self):
        return " | ".join(f"({term})" for term in self.terms)


@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """``~a``: visible where ``term`` is not visible."""

    term: Mask

    def __post_init__(self):
        _require_terms("Not", (self.term,))

    @property
    def is_opaque(self) -> bool:
        return self.term.is_opaque

    @property
    def rank(self) -> int:
        return self.term.rank

    def bind(self, num_q_heads):
        return Not(self.term.bind(num_q_heads))

    def __call__(self, p, j):
        return jnp.logical_not(self.term(p, j))

    def coverage(self, p0, p1, j0, j1):
        return ~self.term.coverage(p0, p1, j0, j1)

    def __str__(self):
        return f"~({self.term})"


def _require_terms(owner: str, terms: Any) -> None:
    if not isinstance(terms, tuple) or not terms or not all(isinstance(term, Mask) for term in terms):
        raise TypeError(f"{owner} is made of masks, such as Causal() & Window(128); got {terms!r}.")
