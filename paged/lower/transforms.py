"""Kernels under JAX's transforms and modes: the XLA lowering's derivatives, ``vmap`` as a loop, 32 bits in any mode."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.custom_batching
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from .xla import Linear, linear

Function = Callable[..., Any]


def run_kernels(run: Function, like: Function, *args: Any, is_interpreted: bool) -> Any:
    """``run(*args)``, which calls kernels, as a function that JAX can transform.

    **Arguments:**

    - ``run``: a function of arrays.
    - ``like``: a function of the same arrays, by XLA, that computes what ``run`` does. Its derivatives are ``run``'s.
    - ``args``: arrays. The last one, the sequences, has no derivative.
    - ``is_interpreted``: whether the kernels of ``run`` are interpreted.
    """
    run = _in_turn(functools.partial(_in_32_bits, run))
    if is_interpreted and jax.config.jax_enable_checks:  # pyright: ignore
        # The interpreter calls the host, and JAX's checker refuses a rule for derivatives around such calls. So here
        # the kernels run before the rule, as a constant, and the rule is around their results.
        return _with_derivatives(
            _first, functools.partial(_ignoring_first, like), run(*jax.lax.stop_gradient(args)), *args
        )
    return _with_derivatives(run, like, *args)


def _in_32_bits(run: Function, *args: Array) -> Any:
    """``run(*args)`` traced as if ``jax_enable_x64`` were off.

    With it, Python's numbers and the counters of loops become 64 bits wide, which no TPU kernel computes, and a user's
    ``p / 8`` becomes float64. Without it every kernel is one program in both modes. This is sound because

    * every argument has at most 32 bits per number, and a wider array that a user's term closes over is rounded here;
    * every trace of ``run`` passes here: JAX traces it anew for the rule of a derivative and for ``vmap``;
    * JAX's caches of traces know the mode, and a trace keeps its types when JAX compiles it later in the other mode.
    """
    with jax.enable_x64(False):
        return run(*args)


def _in_turn(run: Function) -> Function:
    """``run``, a function of arrays that calls kernels, with kernels one after the other under ``jax.vmap``.

    Pallas has a rule for ``vmap`` of its own: it copies a block of every batched operand into the kernel. It refuses
    operands that a kernel copies by itself, such as pages, and so does not allow several layers' pages with one batch.
    """
    return jax.custom_batching.sequential_vmap(run)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _with_derivatives(run: Function, like: Function, *args: Any) -> Any:
    """``run(*args)``, with the derivatives of ``like``."""
    del like
    return run(*args)


def _jvp(run: Function, like: Function, primals: Any, tangents: Any) -> Any:
    out = _with_derivatives(run, like, *primals)
    leaves, tree = jax.tree.flatten(primals)
    moves = jax.tree.leaves(tangents)
    which = [i for i, move in enumerate(moves) if not _is_zero(move)]

    def put(leaves: Any, moved: Any) -> Any:
        placed = dict(zip(which, moved, strict=True))
        return [placed.get(i, leaf) for i, leaf in enumerate(leaves)]

    def at(leaves: Any) -> Function:
        """The floats that ``like`` computes, as a function of what moves."""
        return lambda moved: [x for x in jax.tree.leaves(like(*tree.unflatten(put(leaves, moved)))) if _is_float(x)]

    def apply(leaves: Any, x: Any) -> Any:
        return jax.jvp(at(leaves), ([leaves[i] for i in which],), (x,))[1]

    def transpose(leaves: Any, y: Any) -> Any:
        return jax.vjp(at(leaves), [leaves[i] for i in which])[1](y)[0]

    def derivative(leaves: Any, x: Any, along: Any) -> Any:
        own = [i for i, move in enumerate(along) if move is not None]

        def changed(moved: Any) -> Any:
            placed = dict(zip(own, moved, strict=True))
            return apply([placed.get(i, leaf) for i, leaf in enumerate(leaves)], x)

        return jax.jvp(changed, ([leaves[i] for i in own],), ([along[i] for i in own],))[1]

    changes = iter(linear(Linear(apply, transpose, derivative), leaves, [moves[i] for i in which]))
    none = lambda x: np.zeros(x.shape, jax.dtypes.float0)
    return out, jax.tree.map(lambda x: next(changes) if _is_float(x) else none(x), out)


_with_derivatives.defjvp(_jvp, symbolic_zeros=True)


def _is_zero(move: Any) -> bool:
    return type(move) is SymbolicZero or move.dtype == jax.dtypes.float0


def _is_float(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def _first(results: Any, *args: Any) -> Any:
    del args
    return results


def _ignoring_first(like: Function, results: Any, *args: Any) -> Any:
    del results
    return like(*args)
