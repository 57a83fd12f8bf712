"""`Value` and `Given`: numbers that a spec names and a batch brings, and how a term takes them."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from .numbers import require_positive_int

_DTYPES = ("int32", "float32")


@dataclasses.dataclass(frozen=True)
class Value:
    """The name of a number that the batch brings for each sequence, in place of a number of a mask or a score.

    ``Prefix(Value("prefix"))`` is the mask that is ``Prefix(n)`` for a sequence whose batch has
    ``values={"prefix": ...}`` with ``n`` in its slot. Pages are skipped as for a static number, and a new number traces
    nothing anew.

    **Arguments:**

    - `name`: the key in `RaggedBatch`'s ``values``.
    - `size`: how many numbers each sequence has under this name: None for one, in an array [seqs]; ``k`` for an array
      [seqs, k], as the starts of ``k`` spans.
    - `dtype`: "int32" for numbers of masks, or "float32" for those of score operations.

    **Raises:** ``TypeError`` or ``ValueError`` for another kind of name, size or dtype.

    >>> local = Causal() & Window(Value("window"))
    >>> print(local)
    (j <= p) & (p - j < window)
    """

    name: str
    size: int | None = None
    dtype: str = "int32"

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise TypeError(f'A Value\'s name must be a word, such as "prefix"; got {self.name!r}.')
        if self.size is not None:
            require_positive_int("A Value's size", self.size)
        if self.dtype not in _DTYPES:
            raise ValueError(f"A Value's dtype must be one of {_DTYPES}; got {self.dtype!r}.")

    def __str__(self) -> str:
        return self.name

    def __format__(self, spec: str) -> str:
        """Its name, where a number would be formatted."""
        del spec
        return self.name


class Given(NamedTuple):
    """What a term may ask of a pair of a query and a key, besides their positions.

    Every number, and every array, broadcasts against the positions of the pairs.

    * ``numbers``: for each `Value`, by its name, its number, or a tuple of ``size`` numbers.
    * ``head``: the query heads; None where no term asks.
    * ``is_ancestor``: whether the key is before the step's own tokens, or the row's own, or that of one of its
      ancestors; None where no term asks.
    """

    numbers: Mapping[str, Any] = {}
    head: Any = None
    is_ancestor: Any = None


NOTHING_GIVEN = Given()


class Term:
    """What masks and score operations have in common: fields, of which some may name what a batch brings.

    ``least`` gives, for fields that hold a whole number, the least that it may be. A smaller one of a batch counts as
    the least; `paged.check` finds it.
    """

    least: ClassVar[Mapping[str, float]] = {}
    # Whether the term itself differs by query head, or asks which rows are a row's ancestors.
    has_heads: bool = False
    has_ancestors: bool = False

    def given(self, given: Given) -> "Term":
        """This term with everything that it names in place of the names.

        It then computes with what the batch brings, traced numbers included: it has no hash any more. A term of yours
        needs no method of its own: fields that hold a `Value` are replaced, and terms inside of it likewise.
        """
        changes = {name: _given(field, given) for name, field in fields_of(self) if _is_asking(field)}
        if not changes:
            return self
        new = copy.copy(self)
        for name, field in changes.items():
            if name in self.least:
                field = jax.tree.map(lambda x, least=self.least[name]: _at_least(x, least), field)
            object.__setattr__(new, name, field)
        return new


def _at_least(number: Any, least: Any) -> Any:
    """The larger number; a Python number stays one."""
    return max(number, least) if isinstance(number, int | float) else jnp.maximum(number, least)


def is_at_most(a: Any, b: Any) -> bool:
    """Whether one number is certainly at most another one, whatever a batch brings for those that are values."""
    return a == b if isinstance(a, Value) or isinstance(b, Value) else a <= b


def fields_of(term: Any) -> list[tuple[str, Any]]:
    """The fields of a term, by name: those of a dataclass, or else its attributes."""
    if dataclasses.is_dataclass(term):
        return [(field.name, getattr(term, field.name)) for field in dataclasses.fields(term)]
    return list(getattr(term, "__dict__", {}).items())


def terms_in(term: Any) -> Iterator[Term]:
    """A term and all terms inside of it."""
    if isinstance(term, tuple):
        for inner in term:
            yield from terms_in(inner)
    elif isinstance(term, Term):
        yield term
        for _, field in fields_of(term):
            yield from terms_in(field)


class Minimum(NamedTuple):
    """The least number that a batch may bring under a name, for a term of a mask or of the scores."""

    name: str
    least: float
    term: str


def minima_of(*terms: Any) -> tuple[Minimum, ...]:
    """What the numbers that terms, or tuples of terms, name must not be less than."""
    return tuple(dict.fromkeys(minimum for _, minimum in _named_in(terms) if minimum is not None))


def values_of(*terms: Any) -> tuple[Value, ...]:
    """The values that terms name, each once, by name. ``ValueError`` where one name has two sizes or dtypes."""
    found: dict[str, Value] = {}
    for value, _ in _named_in(terms):
        if found.setdefault(value.name, value) != value:
            raise ValueError(
                f"One name is one array of the batch: {found[value.name]!r} and {value!r} differ in size or dtype."
            )
    return tuple(found[name] for name in sorted(found))


def require_value(owner: str, name: str, value: Value, dtype: str, has_size: bool = False) -> None:
    """Raise ``TypeError`` unless a `Value` can be this field of ``owner``."""
    if value.dtype != dtype:
        raise TypeError(f'{owner}\'s {name} needs Value({value.name!r}, dtype="{dtype}"); got {value!r}.')
    if (value.size is not None) != has_size:
        wanted = "a size, one number for each" if has_size else "no size: it is one number"
        raise TypeError(f"{owner}'s {name} needs a Value with {wanted}; got {value!r}.")


def _named_in(term: Any) -> Iterator[tuple[Value, Minimum | None]]:
    """The values that a term, or a tuple of terms, names; with the least number that each may be, if there is one."""
    for inner in terms_in(term):
        for name, field in fields_of(inner):
            for value in field if isinstance(field, tuple) else (field,):
                if isinstance(value, Value):
                    least = inner.least.get(name)
                    yield value, None if least is None else Minimum(value.name, least, str(inner))


def _is_asking(field: Any) -> bool:
    if isinstance(field, tuple):
        return any(map(_is_asking, field))
    return isinstance(field, Value | Term)


def _given(field: Any, given: Given) -> Any:
    if isinstance(field, tuple):
        return tuple(_given(inner, given) for inner in field)
    if isinstance(field, Value):
        return given.numbers[field.name]
    return field.given(given) if isinstance(field, Term) else field
