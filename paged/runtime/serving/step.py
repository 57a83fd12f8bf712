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
from .record import StepEvents, record
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
    *,
    budget: int,
    minima: tuple[Minimum, ...] = (),
    speculation: Speculation | None = None,
    log_probs: int | None = None,
    has_figures: bool = False,
) -> tuple[ServeState, StepEvents, Int[Array, ""]]:
    """`serve_step` until nothing runs and nothing waits, at most ``steps`` times.

    **Arguments:**

    - `model`, `state`, `budget`, `minima`, `speculation`, `log_probs`, `has_figures`: as for `serve_step`.
    - `steps`: the most steps, an int: for so many there is room in the events.
    - `limit`: the most steps of this call, i32[], at most ``steps``; may be traced. None for ``steps``.

    **Returns:** the new state; the events of all steps, [steps, slots] each; and how many steps there were.
    """
    limit = steps if limit is None else jnp.minimum(limit, steps)
    none = StepEvents.none(state.queue.request.shape[0], 0 if speculation is None else speculation.num_tokens)
    none = dataclasses.replace(none, figures=StepFigures.zero(state.queue) if has_figures else None)
    if log_probs is not None:
        (slots, most), of_prompts = none.token.shape, PromptLogProbs.none(budget)
        drawn = DrawnLogProbs.none(slots, most, log_probs)
        none = dataclasses.replace(none, drawn=drawn, of_prompts=of_prompts)
    events = jax.tree.map(lambda x: jnp.broadcast_to(x, (steps, *x.shape)), none)

    def goes_on(carry: tuple) -> Array:
        i, state, _ = carry
        return (i < limit) & (jnp.any(state.queue.is_running) | jnp.any(state.queue.is_waiting))

    def one(carry: tuple) -> tuple:
        i, state, events = carry
        how: Any = {"minima": minima, "speculation": speculation, "has_figures": has_figures}
        how |= {"log_probs": log_probs}
        state, own = serve_step(model, state, budget=budget, **how)
        return i + 1, state, jax.tree.map(lambda all_, x: all_.at[i].set(x), events, own)

    done, state, events = jax.lax.while_loop(goes_on, one, (jnp.zeros((), jnp.int32), state, events))
    return state, events, done
