"""The XLA lowering's derivatives, in both modes and of both orders.

Write ``J`` for the derivative of the state by the operands. `tangent` is ``J x``, and `backward` is ``J^T y``: one is
the other's transpose. The derivative of ``J^T y`` by the operands is the Hessian of the state, weighted by ``y``. It is
symmetric, so it is its own transpose, and JAX computes it in forward mode from `backward`'s loops. So every second
derivative exists, in any order of modes. A third derivative is for forward mode alone.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from paged.spec import AttentionState

from . import forward
from .backward import backward
from .linear import Linear, linear
from .tangent import tangent
from .walk import Operands, Parts, Walk

_NO_THIRD = (
    "paged's attention over pages has no third derivative in reverse mode. Take the third one in forward mode, with "
    "jax.jvp or jax.jacfwd; or use paged.dense_attention, which has every derivative."
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attend(walk: Walk, operands: Operands) -> AttentionState:
    """State of the members' rows, float32; rows of no member are empty. Every derivative is finite."""
    return forward.attend(walk, operands)


def _attend_jvp(walk: Walk, primals: tuple[Operands], tangents: tuple[Any]) -> tuple[Any, Any]:
    (operands,), (moves,) = primals, tangents
    state = attend(walk, operands)
    moves = jax.tree.map(lambda move: None if type(move) is SymbolicZero else move, moves)
    return state, _tangent(walk, operands, state, _parts_of_moves(operands, moves))


attend.defjvp(_attend_jvp, symbolic_zeros=True)


def _tangent(walk: Walk, operands: Operands, state: AttentionState, x: Parts) -> AttentionState:
    """``J x``."""
    if not jax.tree.leaves(x):  # what moves is a constant, such as a scale
        return AttentionState(jnp.zeros_like(state.out), jnp.zeros_like(state.lse))
    like = jax.tree.map(lambda _: True, x)

    def derivative(residuals: Any, x: Parts, along: Any) -> AttentionState:
        return _tangent_change(walk, residuals[0], residuals[1], x, _parts_along(residuals, along))

    rule = Linear(
        lambda residuals, x: tangent(walk, residuals[0], residuals[1], x),
        lambda residuals, y: _gradient(walk, residuals[0], residuals[1], y, like),
        derivative,
    )
    return linear(rule, (operands, state), x)


def _gradient(walk: Walk, operands: Operands, state: AttentionState, y: AttentionState, like: Parts) -> Parts:
    """``J^T y``, of the parts that are in ``like``."""

    def derivative(residuals: Any, y: AttentionState, along: Any) -> Parts:
        return _curvature(walk, residuals[0], residuals[1], y, _parts_along(residuals, along), like)

    rule = Linear(
        lambda residuals, y: backward(walk, residuals[0], residuals[1], y, like),
        lambda residuals, x: _tangent(walk, residuals[0], residuals[1], x),
        derivative,
    )
    return linear(rule, (operands, state), y)


def _curvature(
    walk: Walk, operands: Operands, state: AttentionState, y: AttentionState, x: Parts, like: Parts
) -> Parts:
    """``H x`` of the parts that are in ``like``, where ``H`` is the Hessian of the state, weighted by ``y``."""
    along = jax.tree.map(lambda _: True, x)

    def apply(residuals: Any, x: Parts) -> Parts:
        operands, state, y = residuals
        return _change(walk, operands, state, x, lambda operands, state: backward(walk, operands, state, y, like))

    def transpose(residuals: Any, x: Parts) -> Parts:
        operands, state, y = residuals
        return _curvature(walk, operands, state, y, x, along)

    return linear(Linear(apply, transpose, functools.partial(_third, apply)), (operands, state, y), x)


def _tangent_change(walk: Walk, operands: Operands, state: AttentionState, fixed: Parts, x: Parts) -> AttentionState:
    """The change of ``J fixed`` along ``x``; its transpose is the Hessian's product with ``fixed``."""
    like = jax.tree.map(lambda _: True, x)

    def apply(residuals: Any, x: Parts) -> AttentionState:
        operands, state, fixed = residuals
        return _change(walk, operands, state, x, lambda operands, state: tangent(walk, operands, state, fixed))

    def transpose(residuals: Any, y: AttentionState) -> Parts:
        operands, state, fixed = residuals
        return _curvature(walk, operands, state, y, fixed, like)

    return linear(Linear(apply, transpose, functools.partial(_third, apply)), (operands, state, fixed), x)


def _change(walk: Walk, operands: Operands, state: AttentionState, x: Parts, of: Any) -> Any:
    """The change of ``of(operands, state)`` along ``x``; the state moves too, since it is the operands' result."""

    def at(parts: Parts, state: AttentionState) -> Any:
        return of(parts.put_in(operands), state)

    return jax.jvp(at, (Parts.of(operands).only(x), state), (x, tangent(walk, operands, state, x)))[1]


def _third(apply: Any, residuals: Any, x: Any, along: Any) -> Any:
    """The derivative of a second derivative: in forward mode only."""
    leaves, tree = jax.tree.flatten(residuals)
    which = [i for i, move in enumerate(along) if move is not None]

    def change(residuals: Any, moves: Any) -> Any:
        leaves, x = residuals

        def at(moved: Any) -> Any:
            placed = dict(zip(which, moved, strict=True))
            return apply(tree.unflatten([placed.get(i, leaf) for i, leaf in enumerate(leaves)]), x)

        return jax.jvp(at, ([leaves[i] for i in which],), (moves,))[1]

    def refuse(residuals: Any, y: Any) -> Any:
        raise NotImplementedError(_NO_THIRD)

    return linear(Linear(change, refuse), (leaves, x), [along[i] for i in which])


def _parts_along(residuals: Any, along: Any) -> Parts:
    """The operands' parts of a direction that lists one for each leaf of operands and state.

    The state's own directions are left out: they follow from the operands'.
    """
    moves, _ = jax.tree.unflatten(jax.tree.structure(residuals), along)
    return _parts_of_moves(residuals[0], moves)


def _parts_of_moves(operands: Operands, moves: Operands) -> Parts:
    """The parts of a direction, whose leaves are None where the operands do not move."""
    own, arrays = Parts.of(operands), moves.pages.arrays
    if own.arrays and any(move is not None for move in arrays):
        pairs = zip(arrays, own.arrays, strict=True)
        arrays = tuple(jnp.zeros_like(array) if move is None else move for move, array in pairs)
    else:
        arrays = ()
    constants = (None if c is None else move for c, move in zip(own.constants, moves.constants, strict=True))
    return Parts(moves.q, arrays, tuple(constants))
