"""`Apart`: the arrays of like layers that are not stacked, so that XLA:CPU multiplies with each where it lies."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal, Var
from jaxtyping import Array

LARGE = 2**16  # bytes: smaller arrays hardly matter to a cache

# What only says how an array is read. It is done where the array is multiplied.
_VIEWS = ("reshape", "convert_element_type", "transpose", "squeeze")
_MOST_OPERATIONS = 8  # of a choice of products by platform: one more branch for each layer must stay cheap to compile


class Apart(eqx.Module):
    """One array for each layer of a run, in place of an array with a leading axis of layers.

    XLA:CPU multiplies with whole arrays only. It copies a layer's part out of a stacked array at every step, which
    takes longer than a product with few rows.
    """

    arrays: tuple[Array, ...]

    @classmethod
    def of(cls, stack: Array) -> "Apart":
        """The parts of a stacked array."""
        return cls(tuple(stack[i] for i in range(stack.shape[0])))

    def __getitem__(self, i: int) -> Array:
        return self.arrays[i]

    @property
    def stacked(self) -> Array:
        """One array with a leading axis of layers: a copy."""
        return jnp.stack(self.arrays)

    @property
    def part(self) -> jax.ShapeDtypeStruct:
        """The shape and dtype of one layer's array."""
        return jax.ShapeDtypeStruct(self.arrays[0].shape, self.arrays[0].dtype)


def is_apart(x: Any) -> bool:
    """For ``is_leaf``."""
    return isinstance(x, Apart)


class View:
    """An array of `Apart` that is still to be picked, and how it is then read."""

    def __init__(self, apart: Apart, eqns: Sequence[tuple[Any, JaxprEqn]] = ()):
        self.apart, self._eqns = apart, tuple(eqns)

    def then(self, run: Any, eqn: JaxprEqn) -> "View":
        """This view, read in one way more; ``run(eqn, {variable: array})`` does it."""
        return View(self.apart, (*self._eqns, (run, eqn)))

    def read(self, i: int) -> Array:
        """Layer ``i``'s array, as it is read."""
        x = self.apart[i]
        for run, eqn in self._eqns:
            (variable,) = (v for v in eqn.invars if not isinstance(v, Literal))
            (x,) = run(eqn, {variable: x})
        return x


def is_view(eqn: JaxprEqn) -> bool:
    """Whether an operation only says how its one array is read."""
    return eqn.primitive.name in _VIEWS and sum(not isinstance(v, Literal) for v in eqn.invars) == 1


def is_product(eqn: JaxprEqn) -> bool:
    """Whether an operation is done once for each layer, with that layer's array where it lies."""
    if eqn.primitive.name == "cond":  # as of `jax.lax.platform_dependent`
        return all(len(branch.jaxpr.eqns) <= _MOST_OPERATIONS for branch in eqn.params["branches"])
    return eqn.primitive.name == "dot_general"


def run_at(place: Array, run: Any, eqn: JaxprEqn, views: dict[Var, View], known: dict[Var, Any]) -> list[Array]:
    """An operation with the arrays of the layer at ``place``: a branch for each layer, of which one runs."""
    count = len(next(iter(views.values())).apart.arrays)

    def branch(i: int) -> Any:
        return lambda: run(eqn, known | {v: view.read(i) for v, view in views.items()})

    return jax.lax.switch(place, [branch(i) for i in range(count)])


def pick(place: Array, view: View) -> Array:
    """The array of the layer at ``place``, as it is read: a copy."""
    return jax.lax.switch(place, [lambda i=i: view.read(i) for i in range(len(view.apart.arrays))])
