"""Fold successive multiplications of scores by constants into one.

The scale, the two factors of a soft cap, and the change to powers of two would each be an operation on every score.
"""

import collections
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex

# Factors are folded while their product, or a divisor's inverse, stays within these bounds. Beyond them a folded factor
# could overflow to infinity, or be so small that it counts as 0.
_SMALLEST, _LARGEST = 1e-30, 1e30


def merge_factors(eqns: list[Any], first: Any, results: list[Any]) -> tuple[list[Any], Any, float]:
    """Fold successive multiplications by constants, for ``first`` and whatever is computed from it.

    Results change by rounding only. Equations on positions alone are left as they are: a mask may need exact integers.

    **Arguments:**

    - `eqns`: the equations, in order.
    - `first`: the variable of the products.
    - `results`: the variables that must still be computed.

    **Returns:** the new equations, a variable, and a factor. Where ``first`` is used once, by a multiplication, that
    equation is dropped: the caller gives the returned variable, which is ``first`` times the factor. Else they are
    ``first`` and 1.
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
    """The operands that are variables, and not constants."""
    return [v for v in atoms if not isinstance(v, jex.Literal)]


def _scaling(eqn: Any) -> tuple[Any, float]:
    """The variable and the constant that an equation multiplies it by; None and 1 for any other equation."""
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
    """An equation with the result of ``eqn`` that multiplies ``x`` by a constant."""
    (made,) = jax.make_jaxpr(lambda x: x * factor)(x.aval).jaxpr.eqns
    return made.replace(invars=[x, *made.invars[1:]], outvars=eqn.outvars)
