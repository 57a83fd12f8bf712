"""A program's scores and mask as a kernel evaluates them: what depends on the head alone is computed before it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jaxtyping import Array

from ..program import Program
from .factors import merge_factors, variables

# What a kernel may compute of a tile: elementwise arithmetic, and changes of shape that cost nothing.
_ELEMENTWISE = """
abs add and atan2 ceil clamp convert_element_type copy cos div eq erf exp exp2 expm1 floor ge gt integer_pow
is_finite le log log1p logistic lt max min mul ne neg not or pow rem round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin sqrt square stop_gradient sub tan tanh xor
broadcast_in_dim iota squeeze reshape
"""
_NESTED = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat", "checkpoint")


class Terms(NamedTuple):
    """Scores and mask at one tile shape.

    ``early(h)`` computes, outside of the kernel, arrays that depend on ``h [rows, 1]`` and on what the terms close
    over. ``scores(arrays, s, p, j)`` and ``mask(arrays, p, j)`` run inside, on ``[rows, keys]`` tiles; ``s`` is
    ``factor`` times the products of queries and keys. ``scores_use_positions`` is False where scores are a function of
    ``s`` and the head alone.
    """

    factor: float
    early: Callable[[Array], tuple[Array, ...]]
    scores: Callable[..., Array]
    mask: Callable[..., Array]
    scores_use_positions: bool


class _Split(NamedTuple):
    """A function cut in two: equations on known values that do not span keys, and the rest, whose first unknown is to
    come multiplied by ``factor``."""

    factor: float
    early: Callable[..., tuple[Array, ...]]
    late: Callable[..., Array]
    used: tuple[bool, ...]
    refused: tuple[str, ...]


def split_terms(program: Program, rows: int, keys: int, unit: float = 1.0) -> Terms:
    """The program's terms for tiles of this shape. Scores are multiplied by ``unit``: log2(e) where weights are powers
    of two."""
    scores, mask = _splits(program, rows, keys, unit)
    num_scores = len(jax.eval_shape(scores.early, jax.ShapeDtypeStruct((rows, 1), jnp.int32)))

    return Terms(
        factor=scores.factor,
        early=lambda h: (*scores.early(h), *mask.early()),
        scores=lambda arrays, s, p, j: scores.late(arrays[:num_scores], s, p, j),
        mask=lambda arrays, p, j: mask.late(arrays[num_scores:], p, j),
        scores_use_positions=any(scores.used[1:]),
    )


def refused_operations(program: Program) -> tuple[str, ...]:
    """Operations in the program's terms that a kernel has no rule for, such as a gather by position."""
    scores, mask = _splits(program, 8, 128)
    return tuple(dict.fromkeys((*scores.refused, *mask.refused)))


def _splits(program: Program, rows: int, keys: int, unit: float = 1.0) -> tuple[_Split, _Split]:
    s = jax.ShapeDtypeStruct((rows, keys), jnp.float32)
    position = jax.ShapeDtypeStruct((rows, keys), jnp.int32)
    head = jax.ShapeDtypeStruct((rows, 1), jnp.int32)

    def scores_of(h: Any, products: Any, p: Any, j: Any) -> Any:
        scores = program.scores(products * program.scale, p, j, h)
        return scores if unit == 1 else scores * unit

    scores = _split(scores_of, (head,), (s, position, position), merges=True)
    return scores, _split(program.mask, (), (position, position))


def _split(fn: Callable[..., Array], known: tuple[Any, ...], unknown: tuple[Any, ...], merges: bool = False) -> _Split:
    """``fn`` cut in two; with ``merges`` constant factors of the first unknown, a real number, are merged."""
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
        _evaluate(early, env)
        return tuple(jnp.asarray(env[v]) for v in crossing)

    def run_late(arrays: tuple[Array, ...], *args: Array) -> Array:
        env = dict(zip(crossing, arrays, strict=True)) | dict(zip(unknowns, args, strict=True))
        _evaluate(late, env)
        return _read(env, jaxpr.outvars[0])

    return _Split(factor, run_early, run_late, tuple(v in reads for v in unknowns), tuple(_refused(late)))


def _evaluate(eqns: Any, env: dict[Any, Any]) -> None:
    for eqn in eqns:
        values = [_read(env, v) for v in eqn.invars]
        if eqn.primitive.name in _NESTED:
            closed = _nested_jaxpr(eqn)
            inner = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
            inner |= dict(zip(closed.jaxpr.invars, values, strict=True))
            _evaluate(closed.jaxpr.eqns, inner)
            results = [_read(inner, v) for v in closed.jaxpr.outvars]
        elif eqn.primitive.name == "broadcast_in_dim" and jnp.issubdtype(jnp.result_type(values[0]), jnp.bool_):
            # Kernels broadcast numbers, not masks.
            bind = functools.partial(eqn.primitive.bind, **eqn.params)
            results = [bind(jnp.asarray(values[0]).astype(jnp.int32)) != 0]
        else:
            results = eqn.primitive.bind(*values, **eqn.params)
            results = results if eqn.primitive.multiple_results else [results]
        env.update(zip(eqn.outvars, results, strict=True))


def _read(env: dict[Any, Any], v: Any) -> Any:
    return np.asarray(v.val)[()] if isinstance(v, jex.Literal) else env[v]


def _refused(eqns: Any) -> list[str]:
    names = []
    for eqn in eqns:
        if eqn.primitive.name in _NESTED:
            names += _refused(_nested_jaxpr(eqn).jaxpr.eqns)
        elif eqn.primitive.name not in _ELEMENTWISE.split():
            names.append(eqn.primitive.name)
    return names


def _nested_jaxpr(eqn: Any) -> Any:
    nested = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return nested if hasattr(nested, "consts") else jex.ClosedJaxpr(nested, ())
