"""Transforms of kernels: gradients are those of the XLA lowering, which computes the same; ``vmap`` is a loop."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.custom_batching
from jaxtyping import Array

from paged.spec import AttentionState, Pages

from ..base import Lowering, Schedule
from ..program import Program
from ..xla import XLA_BLOCKS


def in_turn(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays that runs kernels, which under ``jax.vmap`` run one after the other.

    By its own rule for ``vmap`` Pallas would give every operand that is batched a block of its own, also where only
    some are, and refuse that of operands which a kernel transfers itself: the pages of layers that share a batch.
    """
    return jax.custom_batching.sequential_vmap(run)


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
    return in_turn(functools.partial(run, lowering, program, schedule))(q, pages, batch)


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
    return in_turn(functools.partial(run, lowering, program, schedule))(q, k, v, pages, batch)


def _state_forward(run: Any, lowering: Lowering, program: Program, schedule: Schedule, *args: Any):
    return in_turn(functools.partial(run, lowering, program, schedule))(*args), args


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
