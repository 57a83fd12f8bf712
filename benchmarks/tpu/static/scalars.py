"""The integer operands of every Pallas kernel in a function, followed from its concrete arguments through the jaxpr.

A kernel's control flow depends on scalars that its caller computes: cumulative lengths, page lists, bounds. Whatever
follows from concrete arguments alone is evaluated, on the CPU; the rest of the program is left out.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jcore

_LARGEST = 1 << 22  # elements of a result that is still evaluated
# Calls, and the parameter that holds what they call.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
}


class Scalars(NamedTuple):
    """One kernel's integer operands by index: those whose values follow from the arguments, and the other ones."""

    kernel: str
    values: dict[int, np.ndarray]
    unknown: list[int]


def kernel_scalars(function: Callable[..., Any], args: Any) -> list[Scalars]:
    """The integer operands of each ``pallas_call``, in the order of the calls.

    **Arguments:**

    - `function`: what is called with `args`.
    - `args`: a pytree of arrays, which are followed, and of `jax.ShapeDtypeStruct`, which are not.

    **Returns:** one entry for each call. One inside of `jax.lax.scan` has the numbers of the first turn; one inside of
    another loop has no entry. The results of a loop with a kernel are not known.
    """
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    leaves = jax.tree.leaves(args, is_leaf=is_shape)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args, is_leaf=is_shape)
    found: list[Scalars] = []
    _follow(jax.make_jaxpr(function)(*shapes), [None if is_shape(leaf) else leaf for leaf in leaves], found)
    return found


def _follow(closed: Any, inputs: Sequence[Any], found: list[Scalars]) -> list[Any]:
    """The values of a jaxpr's results, ``None`` where they are not known."""
    jaxpr = getattr(closed, "jaxpr", closed)
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=False))
    known.update(zip(jaxpr.invars, inputs, strict=True))
    read = lambda variable: variable.val if isinstance(variable, jcore.Literal) else known.get(variable)
    for equation in jaxpr.eqns:
        values = [read(variable) for variable in equation.invars]
        known.update(zip(equation.outvars, _results(equation, values, found), strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _results(equation: Any, values: list[Any], found: list[Scalars]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    unknown = [None] * len(equation.outvars)
    if name == "pallas_call":
        integers = [i for i, v in enumerate(equation.invars) if jnp.issubdtype(v.aval.dtype, jnp.integer)]
        arrays = {i: np.asarray(values[i]) for i in integers if values[i] is not None}
        found.append(Scalars(_kernel_name(params), arrays, [i for i in integers if i not in arrays]))
        return unknown
    if name in _CALLS:
        return _follow(params[_CALLS[name]], values, found)
    if name == "cond" and values[0] is not None:
        return _follow(params["branches"][int(values[0])], values[1:], found)
    if name == "scan" and _follow_first_turn(equation, values, found):
        return unknown
    size = sum(int(np.prod(variable.aval.shape)) for variable in equation.outvars)
    if any(value is None for value in values) or equation.effects or size >= _LARGEST:
        return unknown
    with contextlib.suppress(Exception):  # not known then: a run names the operands that have no value
        results = equation.primitive.bind(*values, **params)
        return [np.asarray(x) for x in (results if equation.primitive.multiple_results else [results])]
    return unknown


def _follow_first_turn(equation: Any, values: list[Any], found: list[Scalars]) -> bool:
    """Follow a scan's body with the first of what it goes over. Whether it holds a kernel."""
    before, body = len(found), equation.params["jaxpr"]
    first = -1 if equation.params["reverse"] else 0
    dims = [(outer.aval.ndim, inner.aval.ndim) for outer, inner in zip(equation.invars, body.jaxpr.invars, strict=True)]
    of_a_turn = lambda value, outer, inner: value[first] if value is not None and outer > inner else value
    _follow(body, [of_a_turn(value, *both) for value, both in zip(values, dims, strict=True)], found)
    return len(found) > before


def _kernel_name(params: dict[str, Any]) -> str:
    return params.get("name") or getattr(params.get("name_and_src_info"), "name", None) or "kernel"
