"""Transforms of kernels: gradients come from the XLA lowering, which computes the same; ``vmap`` is a loop."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.custom_batching
from jaxtyping import Array

from paged.spec import AttentionState, Pages

from ..base import Schedule
from ..program import Call, Program, Sequences
from ..xla import XLA_BLOCKS


def in_turn(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, a function of arrays that calls kernels, with kernels one after the other under ``jax.vmap``.

    Pallas has a rule for ``vmap`` of its own: it copies a block of every batched operand into the kernel. It refuses
    operands that a kernel copies by itself, such as pages, and so does not allow several layers' pages with one batch.
    """
    return jax.custom_batching.sequential_vmap(run)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def state_with_gradient(
    lowering: Any, program: Program, schedule: Schedule, call: Call, q: Array, pages: Pages, seqs: Sequences
) -> AttentionState:
    """``lowering.run_state``, with the XLA lowering's gradient."""
    return in_turn(functools.partial(lowering.run_state, program, schedule, call))(q, pages, seqs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def update_with_gradient(
    lowering: Any,
    program: Program,
    schedule: Schedule,
    call: Call,
    q: Array,
    k: Array,
    v: Array,
    pages: Pages,
    seqs: Sequences,
) -> tuple[AttentionState, Pages]:
    """``lowering.run_update``, with the XLA lowering's gradient."""
    return in_turn(functools.partial(lowering.run_update, program, schedule, call))(q, k, v, pages, seqs)


def _state_forward(lowering: Any, program: Program, schedule: Schedule, call: Call, *args: Any):
    return in_turn(functools.partial(lowering.run_state, program, schedule, call))(*args), args


def _state_backward(lowering: Any, program: Program, schedule: Schedule, call: Call, args: Any, cotangent: Any):
    del lowering, schedule
    q, pages, seqs = args
    own = XLA_BLOCKS.schedule(program, pages.layout)
    _, pull = jax.vjp(lambda q, pages: XLA_BLOCKS.state(program, own, call, q, pages, seqs), q, pages)
    return (*pull(cotangent), None)


def _update_forward(lowering: Any, program: Program, schedule: Schedule, call: Call, *args: Any):
    return in_turn(functools.partial(lowering.run_update, program, schedule, call))(*args), args


def _update_backward(lowering: Any, program: Program, schedule: Schedule, call: Call, args: Any, cotangent: Any):
    del lowering, schedule
    *differentiable, seqs = args
    own = XLA_BLOCKS.schedule(program, differentiable[-1].layout)
    _, pull = jax.vjp(
        lambda q, k, v, pages: XLA_BLOCKS.update(program, own, call, q, k, v, pages, seqs), *differentiable
    )
    return (*pull(cotangent), None)


state_with_gradient.defvjp(_state_forward, _state_backward)
update_with_gradient.defvjp(_update_forward, _update_backward)
