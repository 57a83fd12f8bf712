"""`in_turn`: a layer of a stack, whose arrays leave the stack one by one, where the layer uses them."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jaxtyping import Array

from paged.lower import at_index, vary_alike

from ._apart import LARGE, View, is_apart, is_product, is_view, pick, run_at


def in_turn(f: Callable[[Any, Any], Any], stacks: Any, place: Array, carry: Any) -> Any:
    """``f(arrays, carry)``, where ``arrays`` are those at one place of the stacks.

    XLA:CPU cannot multiply with a part of a larger array, so it copies each array out of its stack. It would copy all
    arrays of a layer before the first is used, more than a cache holds, and read memory again when each is used. Here
    the copy of a large array waits for what ``f`` computes before it uses that array. On other platforms nothing waits.
    Of arrays that are `Apart`, none is copied: a product with one has a branch for each layer.

    **Arguments:**

    - `f`: traced once.
    - `stacks`: a pytree of arrays with a leading axis, and of `Apart`.
    - `place`: int32[], an index in range of that axis.
    - `carry`: a pytree of arrays.
    """
    stacked, structure = jax.tree.flatten(stacks, is_leaf=is_apart)
    own = [x.part if is_apart(x) else jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in stacked]
    closed, shapes = jax.make_jaxpr(f, return_shape=True)(jax.tree.unflatten(structure, own), carry)
    jaxpr, given = closed.jaxpr, jax.tree.leaves(carry)
    known: dict[Var, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known |= dict(zip(jaxpr.invars[len(own) :], given, strict=True))
    waiting = {v: x for v, x in zip(jaxpr.invars, stacked, strict=False) if not is_apart(x)}
    views = {v: View(x) for v, x in zip(jaxpr.invars, stacked, strict=False) if is_apart(x)}
    following: set[Var] = set(jaxpr.invars[len(own) :])  # what is computed from the carry
    latest: Array | None = None  # of these
    large = [v for v, x in waiting.items() if x.nbytes >= LARGE * x.shape[0]]
    run = lambda eqn, known: _run(eqn, jaxpr, known)
    for eqn in jaxpr.eqns:
        apart = {v: views[v] for v in _variables(eqn.invars) if v in views}
        if apart and is_view(eqn):
            (view,) = apart.values()
            views[eqn.outvars[0]] = view.then(run, eqn)
            continue
        if not is_product(eqn):
            known |= {v: pick(place, view) for v, view in apart.items()}
            apart = {}
        for v in _variables(eqn.invars):
            if v in waiting:
                stack = waiting.pop(v)
                is_large = stack.nbytes >= LARGE * stack.shape[0]
                known[v] = at_index(stack, _after(latest, place) if is_large else place)
        results = run_at(place, run, eqn, apart, known) if apart else run(eqn, known)
        if eqn.primitive.name == "dot_general" and eqn.invars[0] in large:
            results = [_as_computed(x) for x in results]
        known |= zip(eqn.outvars, results, strict=True)
        if following.intersection(_variables(eqn.invars)):
            following.update(eqn.outvars)
            latest = next((known[v] for v in eqn.outvars if _is_number(known[v])), latest)
    known |= {v: at_index(stack, place) for v, stack in waiting.items()}  # given back as they are, or not used
    known |= {v: pick(place, views[v]) for v in _variables(jaxpr.outvars) if v in views and v not in known}
    results = [x.val if isinstance(x, Literal) else known[x] for x in jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _variables(atoms: Iterable[Any]) -> list[Var]:
    return [x for x in atoms if not isinstance(x, Literal)]


def _run(eqn: JaxprEqn, jaxpr: Jaxpr, known: dict[Var, Any]) -> list[Any]:
    """One operation of a jaxpr, under its own names and source lines."""
    read = list(dict.fromkeys(_variables(eqn.invars)))
    parts: dict[str, Any] = {"constvars": [], "invars": read, "outvars": eqn.outvars, "eqns": [eqn]}
    names = jaxpr.debug_info.with_unknown_names()
    alone = jaxpr.replace(**parts, effects=eqn.effects, debug_info=names)
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*[known[v] for v in read])


def _is_number(x: Array) -> bool:
    return x.ndim > 0 and x.size > 0 and jnp.issubdtype(x.dtype, jnp.floating)


def _as_computed(product: Array) -> Array:
    """A product whose first operand is a large array of the layer, kept in its order on CPU.

    XLA:CPU would fold a transposition of the result, such as that of ``jax.vmap`` over a matrix times a vector, into
    the product. The array is then the second operand, and is packed anew or read against its order: in float32 that
    takes up to twice the time. In narrower dtypes it is the faster way, so nothing is done there.
    """
    if product.dtype != jnp.float32:
        return product
    return jax.lax.platform_dependent(product, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def _after(x: Array | None, place: Array) -> Array:
    """``place``, which XLA:CPU knows only when it has computed ``x``, if there is one."""
    if x is None:
        return place

    def later(x: Array, place: Array) -> Array:
        first = jax.lax.bitcast_convert_type(x[(0,) * x.ndim].astype(jnp.float32), jnp.int32)
        return jnp.maximum(place, jnp.minimum(place, first))  # XLA does not see that this is ``place``

    x, place = vary_alike(jax.lax.stop_gradient(x), place)
    return jax.lax.platform_dependent(x, place, cpu=later, default=lambda x, place: place)
