"""Kernels under JAX's transforms and modes: the XLA lowering's gradients, ``vmap`` as a loop, 32 bits in any mode."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.custom_batching
from jaxtyping import Array

Function = Callable[..., Any]


def run_kernels(run: Function, like: Function, *args: Any, is_interpreted: bool) -> Any:
    """``run(*args)``, which calls kernels, as a function that JAX can transform.

    **Arguments:**

    - ``run``: a function of arrays.
    - ``like``: a function of the same arrays, by XLA, that computes what ``run`` does. Its gradient is ``run``'s.
    - ``args``: arrays. The last one, the sequences, has no gradient.
    - ``is_interpreted``: whether the kernels of ``run`` are interpreted.
    """
    run = _in_turn(functools.partial(_in_32_bits, run))
    if is_interpreted and jax.config.jax_enable_checks:  # pyright: ignore
        # The interpreter calls the host, and JAX's checker refuses a rule for gradients around such calls. So here the
        # kernels run before the rule, as a constant, and the rule is around their results.
        return _with_gradient(
            _first, functools.partial(_ignoring_first, like), run(*jax.lax.stop_gradient(args)), *args
        )
    return _with_gradient(run, like, *args)


def _in_32_bits(run: Function, *args: Array) -> Any:
    """``run(*args)`` traced as if ``jax_enable_x64`` were off.

    With it, Python's numbers and the counters of loops become 64 bits wide, which no TPU kernel computes, and a user's
    ``p / 8`` becomes float64. Without it every kernel is one program in both modes. This is sound because

    * every argument has at most 32 bits per number, and a wider array that a user's term closes over is rounded here;
    * every trace of ``run`` passes here: JAX traces it anew for the rule of a gradient and for ``vmap``;
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_gradient(run: Function, like: Function, *args: Any) -> Any:
    """``run(*args)``, with the gradient of ``like``."""
    del like
    return run(*args)


def _forward(run: Function, like: Function, *args: Any) -> Any:
    del like
    return run(*args), args


def _backward(run: Function, like: Function, args: Any, cotangent: Any) -> Any:
    del run
    *differentiable, seqs = args
    _, pull = jax.vjp(lambda *differentiable: like(*differentiable, seqs), *differentiable)
    return (*pull(cotangent), None)


_with_gradient.defvjp(_forward, _backward)


def _first(results: Any, *args: Any) -> Any:
    del args
    return results


def _ignoring_first(like: Function, results: Any, *args: Any) -> Any:
    del results
    return like(*args)
