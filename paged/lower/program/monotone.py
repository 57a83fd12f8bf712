"""Comparisons that are monotone in the page: where their edges are, read off a trace.

A traced integer is either the same for all pages, or it never falls (*rises*), or it never rises (*falls*), as the page
number grows. Sums, differences, products with constants, quotients, maxima and minima keep that knowledge. A comparison
of two such integers is then a `Condition`, and so are conjunctions of conditions, and disjunctions of conditions that
change alike.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from .integers import LEAST, MOST, Integer

_NESTED = ("jit", "pjit", "closed_call", "core_call")
# A page number past every table's end.
_PAST_ALL = 2**30
# No position of a query row is less: a batch has far fewer rows per sequence.
LEAST_POSITION = -(2**20)


class Point(NamedTuple):
    """Where a traced number is evaluated.

    * ``j0``: the first key of a page; None where no page is meant.
    * ``p0``, ``p1``, ``length``: as in `Program.coverage`.
    * ``width``: the number of pages that there are, of ``page_size`` tokens each.
    * ``numbers``: what a batch brings.
    """

    j0: Any
    p0: Any
    p1: Any
    length: Any
    width: int
    page_size: int
    numbers: tuple[Any, ...] = ()


Edge = Callable[[Point], Any]
Solve = Callable[[Point, Integer], Any]


class Condition(NamedTuple):
    """True on the pages from ``begin`` on, before ``end``, and if ``always``, each where it is not None.

    ``begin`` and ``end`` give page numbers, which may lie outside of the table; ``always`` gives a Boolean.
    """

    begin: Edge | None = None
    end: Edge | None = None
    always: Edge | None = None

    @property
    def is_constant(self) -> bool:
        """Whether it is the same for all pages."""
        return self.begin is None and self.end is None


class Number(NamedTuple):
    """A traced integer. ``slope`` is 0 if it is the same for all pages, 1 if it rises and -1 if it falls.

    ``at_most(at, bound)`` is the edge of ``number <= bound`` and ``at_least(at, bound)`` that of ``number >= bound``:
    the page where it begins to hold, or the first one where it no longer does. None where only bisection finds it.
    ``literal`` is the number if it is known when traced.
    """

    value: Callable[[Point], Integer]
    slope: int
    at_most: Solve | None = None
    at_least: Solve | None = None
    literal: int | None = None


def conditions_of(closed: Any, page_size: int) -> list[Condition | None]:
    """The results of a trace of ``(j0, p0, p1, length, *numbers)``, each as a condition, or None where it is not known.

    ``j0`` takes the multiples of ``page_size``.
    """
    inputs = [_first_key(page_size), *(_argument(name) for name in ("p0", "p1", "length"))]
    inputs += [_number(i, var.aval.dtype) for i, var in enumerate(closed.jaxpr.invars[len(inputs) :])]
    results = _evaluate(closed.jaxpr, [*map(_constant, closed.consts), *inputs])
    return [x if isinstance(x, Condition) else None for x in results]


def lesser(a: Any, b: Any) -> Any:
    """The lesser of two page numbers, either of which may be known when traced."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def greater(a: Any, b: Any) -> Any:
    """The greater of two page numbers, either of which may be known when traced."""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def _first_key(page_size: int) -> Number:
    def at_most(at: Point, bound: Integer) -> Any:
        return (bound.divided(page_size) + Integer.known(1)).value()

    def at_least(at: Point, bound: Integer) -> Any:
        return (bound + Integer.known(page_size - 1)).divided(page_size).value()

    return Number(lambda at: Integer(at.j0, 0, MOST), 1, at_most, at_least)


def _argument(name: str) -> Number:
    low = 0 if name == "length" else LEAST_POSITION
    return Number(lambda at: Integer(getattr(at, name), low, MOST), 0)


def _number(i: int, dtype: Any) -> Number | None:
    """A number that a batch brings; None for a float, which no coverage compares."""
    if not jnp.issubdtype(dtype, jnp.integer):
        return None
    return Number(lambda at: Integer(at.numbers[i], LEAST, MOST), 0)


def _constant(x: Any) -> Number | Condition | None:
    """A number or a Boolean that is known when traced; None for an array, and for any other dtype."""
    if isinstance(x, jax.Array) or np.shape(x):
        return None
    if np.asarray(x).dtype == bool:
        return Condition(always=lambda at: bool(x))
    if not np.issubdtype(np.asarray(x).dtype, np.integer):
        return None
    return Number(lambda at: Integer.known(int(x)), 0, literal=int(x))


def _evaluate(jaxpr: Any, values: list[Any]) -> list[Any]:
    """The results of a trace as numbers and conditions, and None where neither is known."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), values, strict=True))

    def read(atom: Any) -> Any:
        return _constant(atom.val) if isinstance(atom, jex.Literal) else env.get(atom)

    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        results: list[Any] = [None] * len(eqn.outvars)
        if eqn.primitive.name in _NESTED:
            results = _nested(eqn, operands)
        elif eqn.primitive.name == "convert_element_type":
            results = operands if eqn.invars[0].aval.dtype == eqn.outvars[0].aval.dtype else results
        elif not np.shape(eqn.outvars[0].aval) and all(x is not None for x in operands):
            kinds = tuple(type(x) for x in operands)
            rule = _RULES.get((eqn.primitive.name, *dict.fromkeys(kinds)))
            results = [rule(*operands)] if rule else results
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _nested(eqn: Any, operands: list[Any]) -> list[Any]:
    closed = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if not hasattr(closed, "consts"):
        return [None] * len(eqn.outvars)
    if _is_floor_divide(eqn, closed):
        return [_quotient(*operands)]
    return _evaluate(closed.jaxpr, [*map(_constant, closed.consts), *operands])


def _is_floor_divide(eqn: Any, closed: Any) -> bool:
    """Whether a nested function is JAX's ``//``, whose parts are not monotone."""
    if eqn.params.get("name") != "floor_divide":
        return False
    (own,) = jax.make_jaxpr(jnp.floor_divide)(*(v.aval for v in eqn.invars)).jaxpr.eqns
    return str(own.params["jaxpr"]) == str(closed)


def _negative(x: Number) -> Number:
    def flip(solve: Solve | None) -> Solve | None:
        return solve and (lambda at, bound: solve(at, -bound))

    literal = None if x.literal is None else -x.literal
    return Number(lambda at: -x.value(at), -x.slope, flip(x.at_least), flip(x.at_most), literal)


def _sum(x: Number, y: Number) -> Number | None:
    if x.slope * y.slope < 0:
        return None
    value, literal = lambda at: x.value(at) + y.value(at), None
    if x.literal is not None and y.literal is not None:
        literal = x.literal + y.literal
    if x.slope and y.slope:
        return Number(value, x.slope)
    moving, still = (x, y) if x.slope else (y, x)

    def less(solve: Solve | None) -> Solve | None:
        return solve and (lambda at, bound: solve(at, bound - still.value(at)))

    return Number(value, moving.slope, less(moving.at_most), less(moving.at_least), literal)


def _product(x: Number, y: Number) -> Number | None:
    if x.literal is None and y.literal is None:
        return None
    x, factor = (x, y.literal) if y.literal is not None else (y, x.literal)
    assert factor is not None
    if factor < 0:
        return _negative(_times(x, -factor))
    return _times(x, factor) if factor else Number(lambda at: Integer.known(0), 0, literal=0)


def _times(x: Number, factor: int) -> Number:
    def at_most(solve: Solve) -> Solve:
        return lambda at, bound: solve(at, bound.divided(factor))

    def at_least(solve: Solve) -> Solve:
        return lambda at, bound: solve(at, (bound + Integer.known(factor - 1)).divided(factor))

    literal = None if x.literal is None else x.literal * factor
    solves = x.at_most and at_most(x.at_most), x.at_least and at_least(x.at_least)
    return Number(lambda at: x.value(at).times(factor), x.slope, *solves, literal)


def _quotient(x: Any, y: Any) -> Number | None:
    """``x // y``."""
    if not isinstance(x, Number) or not isinstance(y, Number) or y.literal is None or y.literal <= 0:
        return None
    divisor: int = y.literal

    def at_most(solve: Solve) -> Solve:
        return lambda at, bound: solve(at, bound.times(divisor) + Integer.known(divisor - 1))

    def at_least(solve: Solve) -> Solve:
        return lambda at, bound: solve(at, bound.times(divisor))

    literal = None if x.literal is None else x.literal // divisor
    solves = x.at_most and at_most(x.at_most), x.at_least and at_least(x.at_least)
    return Number(lambda at: x.value(at).divided(divisor), x.slope, *solves, literal)


def _extreme(choose: Callable[[Any, Any], Any], x: Number, y: Number) -> Number | None:
    if x.slope * y.slope < 0:
        return None

    def value(at: Point) -> Integer:
        chosen = choose(x.value(at).value(), y.value(at).value())
        return Integer.known(chosen) if isinstance(chosen, int) else Integer(chosen, -MOST - 1, MOST)

    return Number(value, x.slope or y.slope)


def _at_most(x: Number, y: Number) -> Condition | None:
    """``x <= y``."""

    def holds(at: Point) -> Any:
        return x.value(at).value() <= y.value(at).value()

    change = y.slope - x.slope  # Both may move, but apart.
    if not change:
        return None if x.slope else Condition(always=holds)
    if x.slope * y.slope > 0:
        return None
    if not y.slope and x.at_most:
        edge: Edge = lambda at, solve=x.at_most: solve(at, y.value(at))
    elif not x.slope and y.at_least:
        edge = lambda at, solve=y.at_least: solve(at, x.value(at))
    else:
        edge = functools.partial(_bisected, holds, change > 0)
    return Condition(begin=edge) if change > 0 else Condition(end=edge)


def _bisected(holds: Edge, does_begin: bool, at: Point) -> Any:
    """The first page where a condition begins to hold, or no longer holds; the number of pages if there is none."""

    def halve(_: Any, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = bounds
        middle = jax.lax.shift_right_logical(low + high, jnp.int32(1))
        is_before = holds(at._replace(j0=middle * at.page_size)) != does_begin
        # After the last turn that is needed, the bounds are equal, and the page between them is none.
        is_before &= low < high
        return jnp.where(is_before, middle + 1, low), jnp.where(is_before, high, middle)

    bounds = jnp.int32(0), jnp.int32(at.width)
    return jax.lax.fori_loop(0, at.width.bit_length(), halve, bounds)[0]


def _less(x: Number, y: Number) -> Condition | None:
    """``x < y``."""
    less = _sum(y, Number(lambda at: Integer.known(-1), 0, literal=-1))
    return less and _at_most(x, less)


def _equal(x: Number, y: Number) -> Condition | None:
    first, second = _at_most(x, y), _at_most(y, x)
    return first and second and _both(first, second)


def _both(a: Condition, b: Condition) -> Condition:
    """``a & b``."""
    always = _joined(lambda x, y: x & y, a.always, b.always)
    return Condition(_joined(greater, a.begin, b.begin), _joined(lesser, a.end, b.end), always)


def _either(a: Condition, b: Condition) -> Condition | None:
    """``a | b``."""
    if a.is_constant or b.is_constant:
        other, still = (b, a) if a.is_constant else (a, b)
        return _unless(still.always, other) if still.always else still
    a, b = _within_edge(a), _within_edge(b)
    if a.end is None and b.end is None:
        return Condition(begin=_joined(lesser, a.begin, b.begin))
    if a.begin is None and b.begin is None:
        return Condition(end=_joined(greater, a.end, b.end))
    return None


def _unless(still: Edge, other: Condition) -> Condition:
    """``still | other``, where ``still`` is the same for all pages."""
    begin, end = other.begin, other.end
    return Condition(
        begin and (lambda at: _select(still(at), 0, begin(at))),
        end and (lambda at: _select(still(at), _PAST_ALL, end(at))),
        _joined(lambda x, y: x | y, other.always, still) if other.always else None,
    )


def _within_edge(condition: Condition) -> Condition:
    """A condition of one edge, which is past all pages, or before them, where the condition holds on none."""
    begin, end, always = condition
    if always is None or (begin and end):
        return condition
    if begin:
        return Condition(begin=lambda at: _select(always(at), begin(at), _PAST_ALL))
    return Condition(end=end and (lambda at: _select(always(at), end(at), 0)))


def _inverse(a: Condition) -> Condition | None:
    """``~a``."""
    if a.is_constant:
        always = a.always
        return Condition(always=lambda at: _select(always(at), False, True) if always else False)
    if a.begin and a.end:
        return None
    a = _within_edge(a)
    return Condition(begin=a.end, end=a.begin)


def _joined(join: Callable[[Any, Any], Any], a: Edge | None, b: Edge | None) -> Edge | None:
    if a is None or b is None:
        return a or b
    return lambda at: join(a(at), b(at))


def _select(condition: Any, x: Any, y: Any) -> Any:
    if isinstance(condition, bool | np.bool_):
        return x if condition else y
    return jnp.where(condition, x, y)


def _swapped(rule: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, y: rule(y, x)


# What is known of the result of an operation, by the kind of its operands. All numbers are int32.
_RULES: dict[tuple[Any, ...], Callable[..., Any]] = {
    ("add", Number): _sum,
    ("sub", Number): lambda x, y: _sum(x, _negative(y)),
    ("neg", Number): _negative,
    ("mul", Number): _product,
    ("max", Number): functools.partial(_extreme, greater),
    ("min", Number): functools.partial(_extreme, lesser),
    ("le", Number): _at_most,
    ("ge", Number): _swapped(_at_most),
    ("lt", Number): _less,
    ("gt", Number): _swapped(_less),
    ("eq", Number): _equal,
    ("ne", Number): lambda x, y: (equal := _equal(x, y)) and _inverse(equal),
    ("and", Condition): _both,
    ("or", Condition): _either,
    ("not", Condition): _inverse,
}
