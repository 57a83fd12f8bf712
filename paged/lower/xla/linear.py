"""`linear`: a linear function whose transpose and derivative its author writes.

JAX has two kinds of custom rules. `jax.custom_vjp` allows reverse mode alone. `jax.custom_jvp` allows both modes, but
JAX must then transpose the tangent by itself, and it cannot transpose a loop of unknown length. `linear` is the missing
piece: the tangent of a `jax.custom_jvp` that runs one loop in forward mode, and another one in reverse mode.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_LINEAR = Primitive("paged_linear")  # its rules' pytrees are lists: residuals first, ``count`` of them
_LINEAR.multiple_results = True


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """A function ``apply(residuals, x)`` that is linear in ``x``. All arguments and results are pytrees of arrays.

    * ``transpose(residuals, y)`` is its transpose, with the structure of ``x``.
    * ``derivative(residuals, x, along)`` is the derivative of ``apply`` by the residuals. ``along`` lists a direction
      for each leaf of the residuals, None where that leaf does not move. None stands for residuals that never move.
    """

    apply: Callable[[Any, Any], Any]
    transpose: Callable[[Any, Any], Any]
    derivative: Callable[[Any, Any, Any], Any] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Trace:
    """A rule's ``apply`` as a jaxpr, which JAX must not take apart before it lowers it: its parts have own rules."""

    jaxpr: Any

    @property
    def results(self) -> Any:
        return self.jaxpr.out_avals


def linear(rule: Linear, residuals: Any, x: Any) -> Any:
    """``rule.apply(residuals, x)``, with the transpose and the derivative of the rule."""
    res, res_tree = jax.tree.flatten(residuals)
    xs, x_tree = jax.tree.flatten(x)
    jaxpr, shapes = jax.make_jaxpr(rule.apply, return_shape=True)(residuals, x)
    out_tree = jax.tree.structure(shapes)

    def apply(res: Any, xs: Any) -> Any:
        return jax.tree.leaves(rule.apply(res_tree.unflatten(res), x_tree.unflatten(xs)))

    def transpose(res: Any, ys: Any) -> Any:
        return jax.tree.leaves(rule.transpose(res_tree.unflatten(res), out_tree.unflatten(ys)))

    def derivative(res: Any, xs: Any, along: Any) -> Any:
        return jax.tree.leaves(rule.derivative(res_tree.unflatten(res), x_tree.unflatten(xs), along))  # pyright: ignore

    flat = Linear(apply, transpose, None if rule.derivative is None else derivative)
    return out_tree.unflatten(_LINEAR.bind(*res, *xs, rule=flat, trace=_Trace(jaxpr), count=len(res)))


def _evaluate(*args: Any, rule: Linear, trace: _Trace, count: int) -> Any:
    del rule, count
    return jax.core.eval_jaxpr(trace.jaxpr.jaxpr, trace.jaxpr.consts, *args)


def _jvp(primals: Any, tangents: Any, *, rule: Linear, trace: _Trace, count: int) -> Any:
    res, xs = primals[:count], primals[count:]
    out = _LINEAR.bind(*primals, rule=rule, trace=trace, count=count)
    parts = []
    if not all(type(t) is ad.Zero for t in tangents[count:]):
        moved = [ad.instantiate_zeros(t) for t in tangents[count:]]
        parts.append(_LINEAR.bind(*res, *moved, rule=rule, trace=trace, count=count))
    along = [None if type(t) is ad.Zero else t for t in tangents[:count]]
    if rule.derivative is not None and any(t is not None for t in along):
        parts.append(rule.derivative(list(res), list(xs), along))
    if not parts:
        return out, [ad.Zero(aval.to_tangent_aval()) for aval in trace.results]
    return out, parts[0] if len(parts) == 1 else [jnp.add(a, b) for a, b in zip(*parts, strict=True)]


def _transpose(cotangents: Any, *args: Any, rule: Linear, trace: _Trace, count: int) -> Any:
    ys = [
        ad.zeros_like_aval(aval) if type(y) is ad.Zero else y for y, aval in zip(cotangents, trace.results, strict=True)
    ]
    back = rule.transpose(list(args[:count]), ys)
    unknown = [ad.is_undefined_primal(x) for x in args[count:]]
    return [None] * count + [b if is_unknown else None for b, is_unknown in zip(back, unknown, strict=True)]


def _batch(args: Any, axes: Any, *, rule: Linear, trace: _Trace, count: int) -> Any:
    """The rule of a whole batch. Residuals that the batch shares stay one; all else has the batch's axis first."""
    size = next(x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None)
    res, res_axes = list(args[:count]), list(axes[:count])
    pairs = zip(args[count:], axes[count:], strict=True)
    xs = [jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in pairs]

    def derivative(res: Any, xs: Any, along: Any) -> Any:
        along_axes = [None if t is None else axis for t, axis in zip(along, res_axes, strict=True)]
        return jax.vmap(rule.derivative, in_axes=(res_axes, 0, along_axes))(res, xs, along)  # pyright: ignore

    batched = Linear(
        jax.vmap(rule.apply, in_axes=(res_axes, 0)),
        jax.vmap(rule.transpose, in_axes=(res_axes, 0)),
        None if rule.derivative is None else derivative,
    )
    jaxpr = jax.make_jaxpr(batched.apply)(res, xs)
    return _LINEAR.bind(*res, *xs, rule=batched, trace=_Trace(jaxpr), count=count), [0] * len(jaxpr.out_avals)


_LINEAR.def_impl(_evaluate)
_LINEAR.def_abstract_eval(lambda *_, trace, **__: trace.results)
ad.primitive_jvps[_LINEAR] = _jvp
ad.primitive_transposes[_LINEAR] = _transpose
batching.primitive_batchers[_LINEAR] = _batch
mlir.register_lowering(_LINEAR, mlir.lower_fun(_evaluate, multiple_results=True))
