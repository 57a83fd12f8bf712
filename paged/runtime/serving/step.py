"""`serve_step`: one step of serving, and `serve_many`: many of them, on the device."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged.spec import Minimum

from .admit import schedule
from .figures import StepFigures
from .forward import forward
from .placing import whole
from .record import StepEvents, beside, record
from .shards import shards_of
from .speculation import Speculation, speculate
from .state import ServeState
from .told import DrawnLogProbs, PromptLogProbs


def serve_step(
    model: Any,
    state: ServeState,
    *,
    budget: int,
    minima: tuple[Minimum, ...] = (),
    speculation: Speculation | None = None,
    log_probs: int | None = None,
    has_figures: bool = False,
) -> tuple[ServeState, StepEvents]:
    """Admit requests, page, run the model once, draw tokens, and let go of what is done: a pure function.

    **Arguments:**

    - `model`: ``model(tokens, batch, state) -> (logits, state)``, as `generate` takes it.
    - `state`: what the loop carries.
    - `budget`: the most rows of a step; at least as many as there are slots, and one for each draft of all slots.
    - `minima`: what the numbers of the requests have been checked for.
    - `log_probs`: of how many of the likeliest tokens requests may ask for log-probabilities; None: of none, and not of
      the drawn tokens and the prompts' either.
    - `has_figures`: whether the events bring the step's `StepFigures`.
    - `speculation`: where drafts come from; None for none. The state of a `ModelDraft` is in ``state``.

    **Returns:** the new state, and what happened. Raises ``ValueError`` for a smaller budget.
    """
    slots = state.queue.request.shape[0]
    least = slots if speculation is None else slots * (1 + speculation.num_tokens)
    if budget < least:
        raise ValueError(f"budget must be at least {least}, a row for each slot and each of its drafts; got {budget}.")
    queue, rows = schedule(state.queue, budget)
    figures = StepFigures.of(state.queue, queue, rows) if has_figures else None
    drafts, draft_state = None, state.draft_state
    if speculation is not None:
        queue, drafts, draft_state = speculate(speculation, queue, rows, draft_state, budget, minima)
    has_told = log_probs is not None
    logits, of_prompts, model_state = forward(model, queue, rows, drafts, state.model_state, budget, minima, has_told)
    queue, events = record(queue, rows, logits, drafts, log_probs)
    events = dataclasses.replace(events, figures=figures, of_prompts=of_prompts)
    return ServeState(whole(model, queue), model_state, draft_state), events


def serve_many(
    model: Any,
    state: ServeState,
    steps: int,
    limit: Any = None,
    soon: Any = None,
    *,
    budget: int,
    minima: tuple[Minimum, ...] = (),
    speculation: Speculation | None = None,
    log_probs: int | None = None,
    has_figures: bool = False,
) -> tuple[ServeState, StepEvents, Int[Array, ""]]:
    """`serve_step` until nothing runs and nothing waits, at most ``steps`` times.

    Where a mesh shares out the sequences of the model's attention, every shard does that for itself, with a queue of
    its own: see `Shards`.

    **Arguments:**

    - `model`, `state`, `budget`, `minima`, `speculation`, `log_probs`, `has_figures`: as for `serve_step`. Of shards
      the arrays of the queue have a leading axis, and `budget` is of one of them.
    - `steps`: the most steps, an int: for so many there is room in the events.
    - `limit`: the most steps of this call, i32[], at most ``steps``; may be traced. None for ``steps``.
    - `soon`: after how many steps, i32[], the call ends as soon as it has drawn the first token of a request; may be
      traced. None: first tokens end no call.

    **Returns:** the new state; the events of all steps, [steps, slots] each; and how many steps there were. Of shards
    the slots are side by side, and figures are sums; rows of requests are those among all shards, and steps those of
    the shard that had most.
    """
    how: Any = {"budget": budget, "minima": minima, "log_probs": log_probs, "has_figures": has_figures}
    limit = jnp.asarray(steps, jnp.int32) if limit is None else jnp.minimum(limit, steps)
    soon = limit if soon is None else jnp.asarray(soon, jnp.int32)
    shards, every = shards_of(model), (model, speculation, limit, soon)
    if shards is None:
        return _many(steps, how, every, state)

    def run(every: tuple, state: ServeState) -> tuple[ServeState, tuple]:
        state, events, done = _many(steps, how, every, state)
        if events.figures is not None:
            events = dataclasses.replace(events, figures=events.figures.kept_after(done, state.queue))
        return state, (events, done)

    state, (events, done) = shards.run(run, every, state)
    return state, beside(events, state.queue.requests.status.shape[1]), jnp.max(done)


def _many(steps: int, how: dict[str, Any], every: tuple, state: ServeState) -> tuple[ServeState, StepEvents, Array]:
    """`serve_many` of one shard, or where there are none. ``every`` is what each gets: all but the queue."""
    model, speculation, limit, soon = every
    none = StepEvents.none(state.queue.request.shape[0], 0 if speculation is None else speculation.num_tokens)
    none = dataclasses.replace(none, figures=StepFigures.zero(state.queue) if how["has_figures"] else None)
    if how["log_probs"] is not None:
        (slots, most), of_prompts = none.token.shape, PromptLogProbs.none(how["budget"])
        drawn = DrawnLogProbs.none(slots, most, how["log_probs"])
        none = dataclasses.replace(none, drawn=drawn, of_prompts=of_prompts)
    events = jax.tree.map(lambda x: jnp.broadcast_to(x, (steps, *x.shape)), none)

    def goes_on(carry: tuple) -> Array:
        i, state, _, has_first = carry
        most = jnp.where(has_first, jnp.minimum(soon, limit), limit)
        return (i < most) & (jnp.any(state.queue.is_running) | jnp.any(state.queue.is_waiting))

    def one(carry: tuple) -> tuple:
        i, state, events, has_first = carry
        state, own = serve_step(model, state, speculation=speculation, **how)
        drawn = state.queue.requests.drawn[jnp.maximum(own.request, 0)]
        has_first |= jnp.any((own.count > 0) & (drawn == own.count))
        return i + 1, state, jax.tree.map(lambda all_, x: all_.at[i].set(x), events, own), has_first

    start = jnp.zeros((), jnp.int32), state, events, jnp.zeros((), bool)
    done, state, events, _ = jax.lax.while_loop(goes_on, one, start)
    return state, events, done
