"""A program's scores and visibility at one shape of tile, with all that its terms close over as an argument.

A user's term may close over arrays, and loops, gradients and kernels cannot see into a closure. So the terms are traced
once, at the tile's shape, and the trace is cut in two. The *early* part runs once, before any tile, and its results
become operands. The *late* part runs on tiles. `plain_terms` only makes the closed-over arrays early. `kernel_terms`
makes everything early that depends on the query head alone, because kernels compute elementwise arithmetic only.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jaxtyping import Array

from paged.spec import Given

from ..jax_version import shape_like, vary_alike
from .brought import by_name, dtypes_of
from .factors import merge_factors, variables
from .program import Program

# What a kernel may compute of a tile: elementwise arithmetic, and changes of shape that cost nothing.
_ELEMENTWISE = """
abs add and atan2 ceil clamp convert_element_type copy cos div eq erf exp exp2 expm1 floor ge gt integer_pow
is_finite le log log1p logistic lt max min mul ne neg not or pow rem round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin sqrt square stop_gradient sub tan tanh xor
broadcast_in_dim iota squeeze reshape
"""
_NESTED = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat", "checkpoint")
_LENGTH = jax.ShapeDtypeStruct((), jnp.int32)
# The results of an equation of a trace, from the values of its operands.
Compute = Callable[[Any, list[Any]], list[Any]]


class Terms(NamedTuple):
    """A program's scores and visibility at one shape of tile.

    * ``early(*heads)`` gives the arrays that the other two functions need. Call it once, before any tile.
    * ``scores(arrays, given, s, p, j, *heads)`` gives a tile's scores. ``s`` is ``factor`` times the products of
      queries and keys.
    * ``visible(arrays, given, p, j, length, *heads)`` tells which pairs of a tile are visible: `Program.visible`.
    * ``scores_use_positions`` is False where scores depend on the products and the head alone.

    ``given`` is what the batch brings for the tile: the numbers of its sequence, and ``is_ancestor`` where the program
    asks for it. The query heads are an argument of ``early`` in `kernel_terms`, and of the others in `plain_terms`.
    """

    factor: float
    early: Callable[..., tuple[Array, ...]]
    scores: Callable[..., Array]
    visible: Callable[..., Array]
    scores_use_positions: bool


class _Cut(NamedTuple):
    """A traced function cut in two. ``late(early(*known), *unknown)`` is its value, if the first unknown comes
    multiplied by ``factor``. ``used`` tells which unknowns are read, and ``late_names`` are the late operations."""

    early: Callable[..., tuple[Array, ...]]
    late: Callable[..., Array]
    factor: float = 1.0
    used: tuple[bool, ...] = ()
    late_names: tuple[str, ...] = ()


def plain_terms(program: Program, heads: int, rows: int, keys: int, like: Any = 0) -> Terms:
    """Terms for plain JAX code: gradients flow through them to what they close over.

    A tile is ``s [heads, rows, keys]``, already scaled, with ``p [1, rows, 1]``, ``j [1, 1, keys]`` and
    ``h [heads, rows, 1]``; each varies over a mesh as ``like`` does. A program of built-in terms closes over nothing:
    its functions are called as they are.
    """

    def scores_of(given: Given, s: Any, p: Any, j: Any, h: Any) -> Any:
        return program.apply_scores(s, p, j, h, given)

    def visible_of(given: Given, p: Any, j: Any, length: Any, h: Any) -> Any:
        return program.visible(p, j, length, given._replace(head=h if program.has_heads else None))

    if not (program.visibility.is_opaque or any(op.is_opaque for op in program.score_ops)):
        scores, visible = (_Cut(lambda: (), lambda _, *tile, fn=fn: fn(*tile)) for fn in (scores_of, visible_of))
        return _terms(scores, visible, 0)
    s = shape_like(like, (heads, rows, keys), jnp.float32)
    shapes = ((1, rows, 1), (1, 1, keys), (heads, rows, 1), ())
    p, j, h, length = (shape_like(like, shape, jnp.int32) for shape in shapes)
    given = _given_shapes(program, lambda shape, dtype: shape_like(like, shape, dtype), (1, rows, keys))
    scores = _close(scores_of, given._replace(is_ancestor=None), s, p, j, h)
    visible = _close(visible_of, given, p, j, length, h)
    return _terms(scores, visible, len(scores.early()))


def kernel_terms(program: Program, rows: int, keys: int, unit: float = 1.0, compute: Compute | None = None) -> Terms:
    """Terms for kernels, which have no gradient of their own.

    A tile is ``[rows, keys]``: products ``s``, and positions ``p`` and ``j`` of every pair; ``h [rows, 1]`` are its
    heads. Scores come out multiplied by ``unit``: log2(e) where weights are powers of two. ``compute`` computes one
    operation of a tile, where a kernel needs another way than `_compute`.
    """
    scores, visible = _cuts(program, rows, keys, unit, compute or _compute)
    num_scores = len(jax.eval_shape(scores.early, jax.ShapeDtypeStruct((rows, 1), jnp.int32)))
    return _terms(scores, visible, num_scores)


def refused_operations(program: Program, allowed: str = _ELEMENTWISE) -> tuple[str, ...]:
    """Operations in the program's terms that a kernel has no rule for, such as a gather by position.

    ``allowed`` are the names of those that it has rules for, with spaces between them.
    """
    scores, visible = _cuts(program, 8, 128)
    names = dict.fromkeys((*scores.late_names, *visible.late_names))
    return tuple(name for name in names if name not in allowed.split())


def _terms(scores: _Cut, visible: _Cut, num_scores: int) -> Terms:
    """Both functions as one, with the arrays of scores, ``num_scores`` of them, before those of visibility."""
    return Terms(
        factor=scores.factor,
        early=lambda *heads: (*scores.early(*heads), *visible.early(*heads)),
        scores=lambda arrays, *tile: scores.late(arrays[:num_scores], *tile),
        visible=lambda arrays, *tile: visible.late(arrays[num_scores:], *tile),
        scores_use_positions=any(scores.used[1:3]),
    )


def _given_shapes(program: Program, shape: Callable[[tuple[int, ...], Any], Any], tile: tuple[int, ...]) -> Given:
    """The shapes of what a batch brings for a tile: numbers of its sequence, and which keys are ancestors'."""
    numbers = by_name(program.values, (shape((), dtype) for dtype in dtypes_of(program.values)))
    return Given(numbers, is_ancestor=shape(tile, jnp.bool_) if program.has_ancestors else None)


def _close(fn: Callable[..., Array], *tile: Any) -> _Cut:
    """``fn`` with only the arrays that it closes over early. Nested functions keep their own rules for gradients."""
    closed = jax.make_jaxpr(fn)(*tile)

    def late(arrays: tuple[Array, ...], *tile: Any) -> Array:
        (value,) = jax.core.eval_jaxpr(closed.jaxpr, arrays, *jax.tree.leaves(vary_alike(*tile)))
        return value

    return _Cut(lambda: tuple(jnp.asarray(constant) for constant in closed.consts), late)


def _cuts(
    program: Program, rows: int, keys: int, unit: float = 1.0, compute: Compute | None = None
) -> tuple[_Cut, _Cut]:
    s = jax.ShapeDtypeStruct((rows, keys), jnp.float32)
    position = jax.ShapeDtypeStruct((rows, keys), jnp.int32)
    head = jax.ShapeDtypeStruct((rows, 1), jnp.int32)

    given = _given_shapes(program, jax.ShapeDtypeStruct, (rows, keys))

    def scores_of(h: Any, products: Any, p: Any, j: Any, given: Given) -> Any:
        scores = program.apply_scores(products * program.scale, p, j, h, given)
        return scores if unit == 1 else scores * unit

    def visible_of(h: Any, given: Given, p: Any, j: Any, length: Any) -> Any:
        return program.visible(p, j, length, given._replace(head=h if program.has_heads else None))

    compute, of_tile = compute or _compute, (s, position, position, given._replace(is_ancestor=None))
    scores = _cut(scores_of, (head,), of_tile, compute, merges=True)
    scores = scores._replace(late=lambda arrays, given, s, p, j, late=scores.late: late(arrays, s, p, j, given))
    return scores, _cut(visible_of, (head,), (given, position, position, _LENGTH), compute)


def _cut(
    fn: Callable[..., Array], known: tuple[Any, ...], unknown: tuple[Any, ...], compute: Compute, merges: bool = False
) -> _Cut:
    """``fn`` with everything early that depends on ``known`` alone and has no axis of keys.

    With ``merges``, successive constant factors of the first unknown are merged.
    """
    closed = jax.make_jaxpr(fn)(*known, *unknown)
    jaxpr, consts = closed.jaxpr, closed.consts
    is_known = {*jaxpr.constvars, *jaxpr.invars[: len(known)]}
    early, late = [], []
    for eqn in jaxpr.eqns:
        spans_keys = any(v.aval.size > max(v.aval.shape[:1], default=1) for v in eqn.outvars)
        if all(isinstance(v, jex.Literal) or v in is_known for v in eqn.invars) and not spans_keys:
            early.append(eqn)
            is_known.update(eqn.outvars)
        else:
            late.append(eqn)
    unknowns, factor = list(jaxpr.invars[len(known) :]), 1.0
    if merges:
        late, unknowns[0], factor = merge_factors(late, unknowns[0], jaxpr.outvars)
    reads = variables([*(v for eqn in late for v in eqn.invars), *jaxpr.outvars])
    crossing = list(dict.fromkeys(v for v in reads if v in is_known))

    def run_early(*args: Array) -> tuple[Array, ...]:
        env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=False))
        _evaluate(early, env, _compute)
        return tuple(jnp.asarray(env[v]) for v in crossing)

    def run_late(arrays: tuple[Array, ...], *args: Any) -> Array:
        # Kernels hold Booleans as numbers.
        arrays = tuple(x != 0 if v.aval.dtype == bool else x for v, x in zip(crossing, arrays, strict=True))
        env = dict(zip(crossing, arrays, strict=True)) | dict(zip(unknowns, _leaves(args), strict=True))
        _evaluate(late, env, compute)
        return _read(env, jaxpr.outvars[0])

    return _Cut(run_early, run_late, factor, tuple(v in reads for v in unknowns), tuple(_names(late)))


def _leaves(args: Any) -> list[Any]:
    """Leaves of a tile's arguments, with None in the place of positions that nobody reads."""
    return [x for arg in args for x in ([arg] if arg is None else jax.tree.leaves(arg))]


def _evaluate(eqns: Any, env: dict[Any, Any], compute: Compute) -> None:
    """Compute equations, with nested functions inlined."""
    for eqn in eqns:
        values = [_read(env, v) for v in eqn.invars]
        if eqn.primitive.name in _NESTED:
            closed = _nested_jaxpr(eqn)
            inner = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
            inner |= dict(zip(closed.jaxpr.invars, values, strict=True))
            _evaluate(closed.jaxpr.eqns, inner, compute)
            results = [_read(inner, v) for v in closed.jaxpr.outvars]
        else:
            results = compute(eqn, values)
        env.update(zip(eqn.outvars, results, strict=True))


def _compute(eqn: Any, values: list[Any]) -> list[Any]:
    """An operation as TPU kernels can: they broadcast numbers, not masks."""
    if eqn.primitive.name == "broadcast_in_dim" and jnp.issubdtype(jnp.result_type(values[0]), jnp.bool_):
        bind = functools.partial(eqn.primitive.bind, **eqn.params)
        return [bind(jnp.asarray(values[0]).astype(jnp.int32)) != 0]
    results = eqn.primitive.bind(*values, **eqn.params)
    return results if eqn.primitive.multiple_results else [results]


def _read(env: dict[Any, Any], v: Any) -> Any:
    return np.asarray(v.val)[()] if isinstance(v, jex.Literal) else env[v]


def _names(eqns: Any) -> list[str]:
    names = []
    for eqn in eqns:
        names += _names(_nested_jaxpr(eqn).jaxpr.eqns) if eqn.primitive.name in _NESTED else [eqn.primitive.name]
    return names


def _nested_jaxpr(eqn: Any) -> Any:
    nested = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return nested if hasattr(nested, "consts") else jex.ClosedJaxpr(nested, ())
