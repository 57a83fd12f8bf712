"""Multiplications of scores by constants that follow each other, made one.

A scale, a cap's two, and the change to powers of two would each be an operation on every score.
"""

import collections
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex

# Constants within these can be made one, or a divisor a factor: beyond, what comes out could be infinite, or so small
# that it counts as 0.
_SMALLEST, _LARGEST = 1e-30, 1e30


def merge_factors(eqns: list[Any], first: Any, results: list[Any]) -> tuple[list[Any], Any, float]:
    """Equations with consecutive constant factors of what comes of ``first`` as one multiplication, where ``results``
    are found as before, but for rounding; of positions all is left as it is, since a rule may ask for whole numbers.

    Where ``first`` is used once, and then multiplied, that factor is left to the caller: it comes last, and before it
    the variable that now stands for the product.
    """
    uses = collections.Counter(variables([*(v for eqn in eqns for v in eqn.invars), *results]))
    derived = {first}
    kept: dict[Any, Any] = {}
    for eqn in eqns:
        if derived.isdisjoint(variables(eqn.invars)):
            kept[eqn.outvars[0]] = eqn
            continue
        derived.update(eqn.outvars)
        x, factor = _scaling(eqn)
        inner, earlier = _scaling(kept[x]) if x in kept and uses[x] == 1 else (None, 1.0)
        if inner in derived and _is_kept_whole(earlier * factor):
            del kept[x]
            x, factor = inner, earlier * factor
        kept[eqn.outvars[0]] = _times(eqn, x, factor) if x is not None and _is_kept_whole(factor) else eqn
    merged = list(kept.values())
    for eqn in merged:
        x, factor = _scaling(eqn)
        if x is first and uses[first] == 1:
            return [other for other in merged if other is not eqn], eqn.outvars[0], factor
    return merged, first, 1.0


def _is_kept_whole(factor: float) -> bool:
    return _SMALLEST < abs(factor) < _LARGEST


def variables(atoms: list[Any]) -> list[Any]:
    """Those of an equation's operands, or of results, that are no constants."""
    return [v for v in atoms if not isinstance(v, jex.Literal)]


def _scaling(eqn: Any) -> tuple[Any, float]:
    """The variable and the constant that an equation multiplies it by; None and 1 of any other equation."""
    if eqn.primitive not in (lax.mul_p, lax.div_p) or eqn.outvars[0].aval.dtype != jnp.float32:
        return None, 1.0
    x, factor = eqn.invars
    if eqn.primitive is lax.mul_p and isinstance(x, jex.Literal):
        x, factor = factor, x
    if isinstance(x, jex.Literal) or not isinstance(factor, jex.Literal) or np.ndim(factor.val):
        return None, 1.0
    factor = float(factor.val)
    if eqn.primitive is lax.div_p:
        factor = 1 / factor if factor else math.inf
    return (x, factor) if math.isfinite(factor) else (None, 1.0)


def _times(eqn: Any, x: Any, factor: float) -> Any:
    """An equation for the same variable that multiplies ``x`` by a constant."""
    (made,) = jax.make_jaxpr(lambda x: x * factor)(x.aval).jaxpr.eqns
    return made.replace(invars=[x, *made.invars[1:]], outvars=eqn.outvars)
