"""Masks: which key positions ``j`` a query at position ``p`` sees. Masks combine by ``&``, ``|`` and ``~``."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from .coverage import PARTIAL, Coverage
from .functions import function_name, require_elementwise, require_hashable_function
from .numbers import require_size

Position = Any  # an int, or an integer array; shapes broadcast


class Mask(abc.ABC):
    """A predicate over absolute positions. A mask is hashable, holds no arrays, and combines by ``&``, ``|`` and ``~``.

    A new mask is one frozen dataclass with `__call__` and `coverage`. Every lowering then evaluates the mask, and skips
    the pages that the mask hides. With `implies`, programs that use the mask become simpler; ``__str__`` is how they
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
class Everything(Mask):
    """Every key is visible. ``mask & Everything()`` is ``mask``."""

    is_opaque = False

    def __call__(self, p, j):
        return jnp.ones(jnp.broadcast_shapes(jnp.shape(p), jnp.shape(j)), bool)

    def coverage(self, p0, p1, j0, j1):
        return Coverage(True, True)

    def __str__(self):
        return "everything"


@dataclasses.dataclass(frozen=True)
class Nothing(Mask):
    """No key is visible. ``mask | Nothing()`` is ``mask``."""

    is_opaque = False

    def __call__(self, p, j):
        return jnp.zeros(jnp.broadcast_shapes(jnp.shape(p), jnp.shape(j)), bool)

    def coverage(self, p0, p1, j0, j1):
        return Coverage(False, False)

    def __str__(self):
        return "nothing"


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """``j <= p``: a query sees its own position and the past.

    >>> [j for j in range(4) if Causal()(1, j)]
    [0, 1]
    """

    is_opaque, rank = False, 0

    def __call__(self, p, j):
        return j <= p

    def coverage(self, p0, p1, j0, j1):
        return Coverage(some=j0 <= p1 - 1, full=j1 - 1 <= p0)

    def __str__(self):
        return "j <= p"


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """``p - j < width``: a query sees the last ``width`` tokens, its own included, and the future.

    A window bounds the past only; ``Causal`` bounds the future. Mistral, Gemma, gpt-oss and most paged kernels count
    this way. Others count the tokens to the left of the query, ``p - j <= left``, which is ``Window(left + 1)``.

    **Arguments:**

    - `width`: tokens that a query sees of the past, its own included. At least 1.

    **Raises:** ``TypeError`` unless ``width`` is a Python int; ``ValueError`` below 1 and above ``2**31 - 1``.

    >>> [j for j in range(9) if (Causal() & Window(3))(6, j)]
    [4, 5, 6]
    """

    is_opaque, rank = False, 1

    width: int

    def __post_init__(self):
        require_size("Window", "width", self.width)
        if self.width < 1:
            raise ValueError(
                f"Window({self.width}) would hide every position from itself: a window counts the query's own "
                "position, so the smallest is Window(1). For no window, leave it out."
            )

    def __call__(self, p, j):
        return p - j < self.width

    def coverage(self, p0, p1, j0, j1):
        return Coverage(some=p0 - (j1 - 1) < self.width, full=(p1 - 1) - j0 < self.width)

    def implies(self, other):
        return isinstance(other, Window) and self.width <= other.width

    def __str__(self):
        return f"p - j < {self.width}"


@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """``j < size``: every query sees the first ``size`` tokens. Combine it with a causal mask by ``|``.

    Prefix language models and blocks of image tokens attend this way.

    **Arguments:**

    - `size`: tokens at the beginning of a sequence. At least 1.

    **Raises:** ``TypeError`` unless ``size`` is a Python int; ``ValueError`` below 1 and above ``2**31 - 1``.

    >>> [j for j in range(9) if (Causal() | Prefix(3))(1, j)]
    [0, 1, 2]
    """

    is_opaque, rank = False, 3

    size: int

    def __post_init__(self):
        require_size("Prefix", "size", self.size)
        if self.size < 1:
            raise ValueError(f"Prefix({self.size}) has no tokens: the smallest is Prefix(1). For none, leave it out.")

    def __call__(self, p, j):
        return (j < self.size) & (p == p)  # the second term only gives the result its shape

    def coverage(self, p0, p1, j0, j1):
        return Coverage(some=j0 < self.size, full=j1 <= self.size)

    def implies(self, other):
        return isinstance(other, Prefix) and self.size <= other.size

    def __str__(self):
        return f"j < {self.size}"


@dataclasses.dataclass(frozen=True)
class Chunk(Mask):
    """``j // size == p // size``: a query sees the tokens of its own chunk. Llama 4's local layers attend this way.

    **Arguments:**

    - `size`: tokens per chunk. At least 1. The first chunk begins at position 0.

    **Raises:** ``TypeError`` unless ``size`` is a Python int; ``ValueError`` below 1 and above ``2**31 - 1``.

    >>> [j for j in range(9) if (Causal() & Chunk(4))(6, j)]
    [4, 5, 6]
    """

    is_opaque, rank = False, 2

    size: int

    def __post_init__(self):
        require_size("Chunk", "size", self.size)
        if self.size < 1:
            raise ValueError(f"Chunk({self.size}) has no tokens: the smallest chunk is Chunk(1).")

    def __call__(self, p, j):
        return j // self.size == p // self.size

    def coverage(self, p0, p1, j0, j1):
        first_p, last_p = p0 // self.size, (p1 - 1) // self.size
        first_j, last_j = j0 // self.size, (j1 - 1) // self.size
        # Bounds of the first and the last key: so it is known to hold on one run of pages.
        one_chunk = (first_p == last_p) & (first_p <= first_j) & (last_j <= first_p)
        return Coverage(some=(first_j <= last_p) & (first_p <= last_j), full=one_chunk)

    def implies(self, other):
        if isinstance(other, Window):
            return self.size <= other.width
        return isinstance(other, Chunk) and other.size % self.size == 0

    def __str__(self):
        return f"j // {self.size} == p // {self.size}"


@dataclasses.dataclass(frozen=True)
class Where(Mask):
    """A user's own predicate. Its coverage is always *partial*, so on its own it lets no lowering skip a page.

    Combine it with built-in masks, and their pages are skipped: ``Causal() & Window(128) & Where(fn)``.

    **Arguments:**

    - `fn`: ``fn(p, j) -> bool``. It receives integer arrays that broadcast against each other, works on them
      elementwise (``&``, and not ``and``), and returns a bool array. It may close over arrays, traced ones included.
      Two masks are equal when they have the same function object. Keep that object: a new lambda in every call makes a
      new spec, which JAX traces again.

    **Raises:** ``TypeError`` unless ``fn`` is a callable with a hash, and when its result is not boolean.

    >>> even = Where(lambda p, j: j % 2 == 0)
    >>> [j for j in range(9) if (Causal() & even)(6, j)]
    [0, 2, 4, 6]
    """

    fn: Callable[[Any, Any], Any]

    def __post_init__(self):
        require_hashable_function("Where", self.fn, "fn(p, j) -> bool")

    def __call__(self, p, j):
        shape = jnp.broadcast_shapes(jnp.shape(p), jnp.shape(j))
        value = jnp.asarray(self.fn(p, j))
        if value.dtype != bool:
            raise TypeError(f"Where needs fn(p, j) to return booleans; {self} returned {value.dtype}.")
        require_elementwise("Where", self, value.shape, shape)
        return jnp.broadcast_to(value, shape)

    def coverage(self, p0, p1, j0, j1):
        return PARTIAL

    def __str__(self):
        return f"{function_name(self.fn)}(p, j)"


@dataclasses.dataclass(frozen=True)
class And(Mask):
    """``a & b``: visible where every one of ``terms`` is visible."""

    terms: tuple[Mask, ...]

    def __post_init__(self):
        _require_terms("And", self.terms)

    @property
    def is_opaque(self) -> bool:
        return any(term.is_opaque for term in self.terms)

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

    def __call__(self, p, j):
        return jnp.logical_not(self.term(p, j))

    def coverage(self, p0, p1, j0, j1):
        return ~self.term.coverage(p0, p1, j0, j1)

    def __str__(self):
        return f"~({self.term})"


def _require_terms(owner: str, terms: Any) -> None:
    if not isinstance(terms, tuple) or not terms or not all(isinstance(term, Mask) for term in terms):
        raise TypeError(f"{owner} is made of masks, such as Causal() & Window(128); got {terms!r}.")
