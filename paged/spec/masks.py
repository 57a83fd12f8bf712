"""The masks that there are: all, none, the past, a window, a prefix, a chunk, and a predicate of a user's own."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .coverage import PARTIAL, Coverage
from .functions import function_name, require_elementwise, require_hashable_function, required_arguments
from .given import Value, is_at_most, require_value
from .mask import Mask
from .numbers import require_size


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

    - `width`: tokens that a query sees of the past, its own included. At least 1. Or a `Value` that the batch brings.

    **Raises:** ``TypeError`` unless ``width`` is a Python int or such a value; ``ValueError`` below 1 and above
    ``2**31 - 1``.

    >>> [j for j in range(9) if (Causal() & Window(3))(6, j)]
    [4, 5, 6]
    """

    is_opaque, rank = False, 1
    least: ClassVar = {"width": 1}

    width: int | Value

    def __post_init__(self):
        if isinstance(self.width, Value):
            require_value("Window", "width", self.width, "int32")
            return
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
        return isinstance(other, Window) and is_at_most(self.width, other.width)

    def __str__(self):
        return f"p - j < {self.width}"


@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """``j < size``: every query sees the first ``size`` tokens. Combine it with a causal mask by ``|``.

    Prefix language models and blocks of image tokens attend this way.

    **Arguments:**

    - `size`: tokens at the beginning of a sequence. At least 1. Or a `Value` that the batch brings, which may be 0.

    **Raises:** ``TypeError`` unless ``size`` is a Python int or such a value; ``ValueError`` below 1 and above
    ``2**31 - 1``.

    >>> [j for j in range(9) if (Causal() | Prefix(3))(1, j)]
    [0, 1, 2]
    """

    is_opaque, rank = False, 3
    least: ClassVar = {"size": 0}

    size: int | Value

    def __post_init__(self):
        if isinstance(self.size, Value):
            require_value("Prefix", "size", self.size, "int32")
            return
        require_size("Prefix", "size", self.size)
        if self.size < 1:
            raise ValueError(f"Prefix({self.size}) has no tokens: the smallest is Prefix(1). For none, leave it out.")

    def __call__(self, p, j):
        return (j < self.size) & (p == p)  # the second term only gives the result its shape

    def coverage(self, p0, p1, j0, j1):
        return Coverage(some=j0 < self.size, full=j1 <= self.size)

    def implies(self, other):
        return isinstance(other, Prefix) and is_at_most(self.size, other.size)

    def __str__(self):
        return f"j < {self.size}"


@dataclasses.dataclass(frozen=True)
class Chunk(Mask):
    """``j // size == p // size``: a query sees the tokens of its own chunk. Llama 4's local layers attend this way.

    **Arguments:**

    - `size`: tokens per chunk. At least 1. The first chunk begins at position 0. Or a `Value` that the batch brings.

    **Raises:** ``TypeError`` unless ``size`` is a Python int or such a value; ``ValueError`` below 1 and above
    ``2**31 - 1``.

    >>> [j for j in range(9) if (Causal() & Chunk(4))(6, j)]
    [4, 5, 6]
    """

    is_opaque, rank = False, 2
    least: ClassVar = {"size": 1}

    size: int | Value

    def __post_init__(self):
        if isinstance(self.size, Value):
            require_value("Chunk", "size", self.size, "int32")
            return
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
            return is_at_most(self.size, other.width)
        if not isinstance(other, Chunk) or isinstance(self.size, Value) or isinstance(other.size, Value):
            return self == other
        return other.size % self.size == 0

    def __str__(self):
        return f"j // {self.size} == p // {self.size}"


@dataclasses.dataclass(frozen=True)
class Where(Mask):
    """A user's own predicate. Its coverage is always *partial*, so on its own it lets no lowering skip a page.

    Combine it with built-in masks, and their pages are skipped: ``Causal() & Window(128) & Where(fn)``.

    **Arguments:**

    - `fn`: ``fn(p, j) -> bool``, or ``fn(p, j, h) -> bool`` where it differs by query head ``h``; then one argument
      more for each of ``values``. It receives integer arrays that broadcast against each other, works on them
      elementwise (``&``, and not ``and``), and returns a bool array. It may close over arrays, traced ones included.
      Two masks are equal when they have the same function object. Keep that object: a new lambda in every call makes a
      new spec, which JAX traces again.
    - `values`: what the batch brings for the function, each a `Value`. One with a size arrives as a tuple.

    **Raises:** ``TypeError`` unless ``fn`` is a callable with a hash, and when its result is not boolean.

    >>> even = Where(lambda p, j: j % 2 == 0)
    >>> [j for j in range(9) if (Causal() & even)(6, j)]
    [0, 2, 4, 6]
    >>> str(Where(lambda p, j, start: j >= start, values=(Value("start"),)))
    '<lambda>(p, j, start)'
    """

    fn: Callable[..., Any]
    values: tuple[Value, ...] = ()

    _head: ClassVar[Any] = None  # of an instance, once it is given

    def __post_init__(self):
        require_hashable_function("Where", self.fn, "fn(p, j) -> bool")
        if not isinstance(self.values, tuple) or not all(isinstance(value, Value) for value in self.values):
            raise TypeError(f'Where needs values as a tuple, such as (Value("start"),); got {self.values!r}.')

    @property
    def has_heads(self) -> bool:
        return required_arguments(self.fn) == 3 + len(self.values)

    def given(self, given):
        new = super().given(given)
        if self.has_heads and given.head is not None:
            new = copy.copy(new)
            object.__setattr__(new, "_head", given.head)
        return new

    def __call__(self, p, j):
        arguments = (p, j)
        if any(isinstance(value, Value) for value in self.values):
            raise TypeError(f"{self} needs what a batch brings: mask.given(Given(numbers={{...}}))(p, j).")
        if self.has_heads:
            if self._head is None:
                raise TypeError(f"{self} differs by query head, and none is given: mask.given(Given(head=h))(p, j).")
            arguments = (p, j, self._head)
        shape = jnp.broadcast_shapes(*map(jnp.shape, arguments), *map(jnp.shape, jax.tree.leaves(self.values)))
        value = jnp.asarray(self.fn(*arguments, *self.values))
        if value.dtype != bool:
            raise TypeError(f"Where needs {self} to return booleans; it returned {value.dtype}.")
        require_elementwise("Where", self, value.shape, shape)
        return jnp.broadcast_to(value, shape)

    def coverage(self, p0, p1, j0, j1):
        return PARTIAL

    def __str__(self):
        names = ["p", "j", *["h"] * self.has_heads, *map(str, self.values)]
        return f"{function_name(self.fn)}({', '.join(names)})"
