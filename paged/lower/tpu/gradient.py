"""Gradients of kernels: those of the XLA lowering, which computes the same."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from paged.spec import AttentionState, Pages

from ..lowering import Lowering
from ..program import Program
from ..schedule import Schedule
from ..xla import XLA_BLOCKS


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def state_with_gradient(
    run: Callable[..., AttentionState],
    lowering: Lowering,
    program: Program,
    schedule: Schedule,
    q: Array,
    pages: Pages,
    batch: Any,
) -> AttentionState:
    """``run(lowering, program, schedule, q, pages, batch)``."""
    return run(lowering, program, schedule, q, pages, batch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def update_with_gradient(
    run: Callable[..., tuple[AttentionState, Pages]],
    lowering: Lowering,
    program: Program,
    schedule: Schedule,
    q: Array,
    k: Array,
    v: Array,
    pages: Pages,
    batch: Any,
) -> tuple[AttentionState, Pages]:
    """``run(lowering, program, schedule, q, k, v, pages, batch)``."""
    return run(lowering, program, schedule, q, k, v, pages, batch)


def _state_forward(run: Any, lowering: Lowering, program: Program, schedule: Schedule, *args: Any):
    return run(lowering, program, schedule, *args), args


def _state_backward(run: Any, lowering: Lowering, program: Program, schedule: Schedule, args: Any, cotangent: Any):
    q, pages, batch = args
    own = XLA_BLOCKS.schedule(program, pages.layout)
    _, pull = jax.vjp(lambda q, pages: XLA_BLOCKS.state(program, own, q, pages, batch), q, pages)
    return (*pull(cotangent), None)


def _update_backward(run: Any, lowering: Lowering, program: Program, schedule: Schedule, args: Any, cotangent: Any):
    *differentiable, batch = args
    own = XLA_BLOCKS.schedule(program, differentiable[-1].layout)
    _, pull = jax.vjp(lambda q, k, v, pages: XLA_BLOCKS.update(program, own, q, k, v, pages, batch), *differentiable)
    return (*pull(cotangent), None)


state_with_gradient.defvjp(_state_forward, _state_backward)
update_with_gradient.defvjp(_state_forward, _update_backward)
