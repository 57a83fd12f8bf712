"""`serve_step`: one step of serving, and `serve_many`: many of them, on the device."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paged.spec import CheckedFor, Everything, GroupedBatch, Minimum, RaggedBatch

from .._model_call import apply, logits_of_rows
from .admit import admit, make_room, plan_rows
from .figures import StepFigures
from .record import StepEvents, record
from .state import Queue, ServeState


def serve_step(
    model: Any, state: ServeState, *, budget: int, minima: tuple[Minimum, ...] = (), has_figures: bool = False
) -> tuple[ServeState, StepEvents]:
    """Admit requests, page, run the model once, draw tokens, and let go of what is done: a pure function.

    **Arguments:**

    - `model`: ``model(tokens, batch, state) -> (logits, state)``, as `generate` takes it.
    - `state`: what the loop carries.
    - `budget`: the most rows of a step; at least as many as there are slots.
    - `minima`: what the numbers of the requests have been checked for.
    - `has_figures`: whether the events bring the step's `StepFigures`.

    **Returns:** the new state, and what happened.
    """
    queue = admit(state.queue)
    rows = plan_rows(queue, budget)
    queue, rows = make_room(queue, rows)
    figures = StepFigures.of(state.queue, queue, rows) if has_figures else None
    logits, model_state = _run(model, queue, rows, state.model_state, budget, minima)
    queue, events = record(queue, rows, logits[:, None])
    return ServeState(queue, model_state), dataclasses.replace(events, figures=figures)


def serve_many(
    model: Any,
    state: ServeState,
    steps: int,
    limit: Any = None,
    *,
    budget: int,
    minima: tuple[Minimum, ...] = (),
    has_figures: bool = False,
) -> tuple[ServeState, StepEvents, Int[Array, ""]]:
    """`serve_step` until nothing runs and nothing waits, at most ``steps`` times.

    **Arguments:**

    - `model`, `state`, `budget`, `minima`, `has_figures`: as for `serve_step`.
    - `steps`: the most steps, an int: for so many there is room in the events.
    - `limit`: the most steps of this call, i32[], at most ``steps``; may be traced. None for ``steps``.

    **Returns:** the new state; the events of all steps, [steps, slots] each; and how many steps there were.
    """
    limit = steps if limit is None else jnp.minimum(limit, steps)
    slots = state.queue.request.shape[0]
    none = dataclasses.replace(StepEvents.none(slots), figures=StepFigures.zero(state.queue) if has_figures else None)
    events = jax.tree.map(lambda x: jnp.broadcast_to(x, (steps, *x.shape)), none)

    def goes_on(carry: tuple) -> Array:
        i, state, _ = carry
        return (i < limit) & (jnp.any(state.queue.is_running) | jnp.any(state.queue.is_waiting))

    def one(carry: tuple) -> tuple:
        i, state, events = carry
        state, own = serve_step(model, state, budget=budget, minima=minima, has_figures=has_figures)
        return i + 1, state, jax.tree.map(lambda all_, x: all_.at[i].set(x), events, own)

    done, state, events = jax.lax.while_loop(goes_on, one, (jnp.zeros((), jnp.int32), state, events))
    return state, events, done


def logits_of(model: Any, queue: Queue, state: eqx.nn.State, budget: int, minima: Any) -> Array:
    """The logits that a step makes of a queue: to be traced for their shape."""
    return _run(model, queue, jnp.zeros_like(queue.request), state, budget, minima)[0]


def _run(
    model: Any, queue: Queue, rows: Int[Array, " slots"], state: eqx.nn.State, budget: int, minima: Any
) -> tuple[Float[Array, "slots vocab"], eqx.nn.State]:
    """Logits of the last row of each slot; of a slot without rows, anything.

    Where every slot has one row or none, the batch has one row for each slot: kernels for decoding take it.
    """
    slots, known = rows.shape[0], queue.of_slots

    def decode(state: eqx.nn.State) -> tuple[Array, eqx.nn.State]:
        place = jnp.maximum(queue.pool.lengths - 1, 0)
        tokens = jnp.take_along_axis(known.tokens, place[:, None], axis=1)[:, 0]
        batch = _trusted(queue.pool.decode_batch(rows > 0), queue, slots, minima)
        x, state = apply(model, jnp.where(rows > 0, tokens, 0), batch, state)
        return logits_of_rows(model, x, jnp.arange(slots)), state

    def mixed(state: eqx.nn.State) -> tuple[Array, eqx.nn.State]:
        batch = _trusted(queue.pool.ragged_batch(rows), queue, budget, minima)
        starts, row = jnp.cumsum(rows) - rows, jnp.arange(budget, dtype=jnp.int32)
        slot = jnp.repeat(jnp.arange(slots, dtype=jnp.int32), rows, total_repeat_length=budget)
        place = queue.pool.lengths[slot] - rows[slot] + row - starts[slot]
        tokens = known.tokens[slot, jnp.clip(place, 0, known.tokens.shape[1] - 1)]
        x, state = apply(model, jnp.where(row < jnp.sum(rows), tokens, 0), batch, state)
        return logits_of_rows(model, x, jnp.maximum(starts + rows - 1, 0)), state

    if budget == slots:
        return decode(state)
    # Each form is a loop of one turn or none. XLA updates what a loop carries in place; a branch would get a copy of
    # every page.
    logits = jax.eval_shape(lambda state: decode(state)[0], state)
    is_decode, carry = jnp.all(rows <= 1), (jnp.zeros(logits.shape, logits.dtype), state)
    for runs, form in ((is_decode, decode), (~is_decode, mixed)):
        carry = jax.lax.fori_loop(0, runs.astype(jnp.int32), lambda _, carry, form=form: form(carry[1]), carry)
    return carry


def _trusted(batch: Any, queue: Queue, tokens: int, minima: Any) -> Any:
    """The batch, marked as checked: a pool's tables are sound, and requests are checked when they are submitted."""
    values, size = dict(queue.of_slots.values), queue.pool.page_size

    def marked(own: RaggedBatch, num_pages: int) -> RaggedBatch:
        facts = CheckedFor(size, num_pages, tokens, Everything(), minima)
        return dataclasses.replace(own, values=values, checked_for=facts)

    if not isinstance(batch, GroupedBatch):
        return marked(batch, queue.pool.num_pages)
    return GroupedBatch(map(marked, batch.batches, queue.pool.num_pages), batch.masks)
