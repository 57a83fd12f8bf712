"""What a step has drawn: the tokens of each slot, in the table and as events, and which requests they end."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ..sampling import draw, tokens_from
from .drafting import Drafts
from .figures import StepFigures
from .requests import Reason, Requests, Status
from .reuse import keep
from .state import Queue
from .told import DrawnLogProbs, PromptLogProbs


class StepEvents(eqx.Module):
    """What one step did to each slot, or many steps, with a leading axis.

    * ``request`` i32[slots]: the row of the request that drew tokens, -1 for none.
    * ``token`` i32[slots, most]: the tokens in order, -1 past them.
    * ``count`` i32[slots]: how many they are; 0 too where none could be drawn.
    * ``reason`` i32[slots]: why the request is done with the last one, see `Reason`.
    * ``figures``: of the step; None where they are not asked for.
    * ``drawn``, ``of_prompts``: log-probabilities; None where they are not asked for.
    * ``drafted`` i32[slots]: how many drafts of each slot were verified; None in a loop without speculation. Of the
      ``count`` tokens all but the first were drafts.
    """

    request: Int[Array, "*steps slots"]
    token: Int[Array, "*steps slots most"]
    count: Int[Array, "*steps slots"]
    reason: Int[Array, "*steps slots"]
    figures: StepFigures | None = None
    drafted: Int[Array, "*steps slots"] | None = None
    drawn: DrawnLogProbs | None = None
    of_prompts: PromptLogProbs | None = None

    @classmethod
    def none(cls, slots: int, num_drafts: int = 0) -> "StepEvents":
        """The events of a step in which no slot draws, with room for one token of each and so many drafts."""
        nobody, zero = jnp.full(slots, -1, jnp.int32), jnp.zeros(slots, jnp.int32)
        token = jnp.full((slots, 1 + num_drafts), -1, jnp.int32)
        reason = jnp.full(slots, Reason.NONE, jnp.int32)
        return cls(nobody, token, zero, reason, drafted=zero if num_drafts else None)


def beside(events: StepEvents, requests: int) -> StepEvents:
    """The events of several shards of sequences as those of one loop: with their slots side by side.

    **Arguments:**

    - `events`: with a leading axis of shards. - `requests`: how many rows the table of one shard has.
    """

    def among_all(rows: Array) -> Array:
        shard = jnp.arange(rows.shape[0], dtype=jnp.int32).reshape(-1, *[1] * (rows.ndim - 1))
        return jnp.where(rows >= 0, rows + shard * requests, rows)

    def joined(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])

    told, figures = events.of_prompts, events.figures
    if told is not None:
        told = dataclasses.replace(told, request=among_all(told.request))
    events = dataclasses.replace(events, request=among_all(events.request), of_prompts=told, figures=None)
    figures = None if figures is None else figures.of_all(among_all(figures.request), joined)
    return dataclasses.replace(jax.tree.map(joined, events), figures=figures)


def record(
    queue: Queue,
    rows: Int[Array, " slots"],
    logits: Float[Array, "most slots vocab"],
    drafts: Drafts | None = None,
    log_probs: int | None = None,
) -> tuple[Queue, StepEvents]:
    """Draw tokens for every sequence whose known tokens are all in pages, and let go of those that are done.

    **Arguments:**

    - `queue`: after the step; its pool counts the known tokens that are in pages, and no drafts.
    - `rows`: how many of them each slot had in the step.
    - `logits`: of the last known token of each slot, and of its drafts.
    - `drafts`: those of the step; None for none.
    - `log_probs`: of how many of the likeliest tokens log-probabilities are told; None where none are.

    **Returns:** the queue and the events. A slot's first token is drawn from its first logits. While the token that is
    drawn is the one that was drafted, the next logits are those of this token, and one more is drawn: so all tokens are
    those that a step for each of them would have drawn. The tokens after one that ends the request are dropped.
    """
    draws = queue.is_running & (rows > 0) & (queue.pool.lengths == queue.of_slots.known)
    if drafts is None:
        queue, token, reason = _draw_next(queue, draws, logits[0])
        token, count, drafted = token[:, None], (token >= 0).astype(jnp.int32), None
    else:
        queue, token, count, reason = _draw_while_equal(queue, draws, logits, drafts)
        drafted = drafts.count
        # What was accepted is in pages, but for the last token: it is drawn and not computed yet.
        queue = queue.with_lengths(queue.pool.lengths + jnp.maximum(count - 1, 0))
    drawn = None
    if log_probs is not None:
        asked = queue.of_slots.log_probs
        drawn = DrawnLogProbs.of(draws if asked is None else asked >= 0, logits, token, log_probs)
    is_done = reason != Reason.NONE
    queue = queue.with_column(is_done, reason=reason)
    is_prefilled = (rows > 0) & (rows > jnp.where(draws, 1, 0))
    queue = keep(queue, is_done)
    events = StepEvents(jnp.where(draws, queue.request, -1), token, count, reason, drafted=drafted, drawn=drawn)
    counts = queue.counts.plus(
        steps=1,
        decode_steps=jnp.all(rows <= 1),
        prompt_tokens=jnp.sum(jnp.where(is_prefilled, rows, 0)),
        new_tokens=jnp.sum(count),
        done=jnp.sum(is_done),
    )
    return queue.replace(counts=counts).without(is_done, Status.DONE), events


def _draw_while_equal(
    queue: Queue, draws: Bool[Array, " slots"], logits: Float[Array, "most slots vocab"], drafts: Drafts
) -> tuple[Queue, Int[Array, "slots most"], Int[Array, " slots"], Int[Array, " slots"]]:
    """Tokens of each slot until one is not the draft, or ends the request: with their count and why it is done."""

    def goes_on(carry: tuple) -> Array:
        return jnp.any(carry[1])

    def one(carry: tuple) -> tuple:
        i, goes_on, table, known, token, reason = carry
        own = queue.replace(requests=dataclasses.replace(queue.requests, tokens=table, known=known))
        own, next_, why = _draw_next(own, goes_on, logits[i])
        reason = jnp.where(goes_on, why, reason)
        is_draft = (i < drafts.count) & (next_ == drafts.tokens[:, jnp.minimum(i, drafts.tokens.shape[1] - 1)])
        goes_on = goes_on & (why == Reason.NONE) & is_draft
        return i + 1, goes_on, own.requests.tokens, own.requests.known, token.at[:, i].set(next_), reason

    none = StepEvents.none(draws.shape[0], drafts.tokens.shape[1])
    table, known = queue.requests.tokens, queue.requests.known
    start = jnp.zeros((), jnp.int32), draws, table, known, none.token, none.reason
    _, _, table, known, token, reason = jax.lax.while_loop(goes_on, one, start)
    queue = queue.replace(requests=dataclasses.replace(queue.requests, tokens=table, known=known))
    return queue, token, jnp.sum(token >= 0, axis=1, dtype=jnp.int32), reason


def _draw_next(
    queue: Queue, goes_on: Bool[Array, " slots"], logits: Float[Array, "slots vocab"]
) -> tuple[Queue, Int[Array, " slots"], Int[Array, " slots"]]:
    """One token more for the request of each slot that goes on, -1 for none; and why the request is done with it."""
    of_slots = queue.of_slots
    past = history(queue, lambda: queue.of_slots.tokens, logits.shape[1])
    token = draw(logits, of_slots.samplers, lambda: keys_of(of_slots), *past)
    is_token = goes_on & (token >= 0)
    place = jnp.where(is_token, of_slots.known, queue.requests.tokens.shape[1])
    tokens = queue.requests.tokens.at[queue.rows_of(is_token), place].set(token, mode="drop")
    queue = queue.replace(requests=dataclasses.replace(queue.requests, tokens=tokens))
    queue = queue.with_column(is_token, known=of_slots.known + 1)
    return queue, jnp.where(is_token, token, -1), jnp.where(goes_on, _reason(queue, token), Reason.NONE)


def keys_of(of_slots: Requests, more: Any = 0) -> Key[Array, " slots"]:
    """The key of each slot's next token, or of the one that comes ``more`` tokens later."""
    return jax.vmap(jax.random.fold_in)(of_slots.keys, of_slots.drawn + more)


def history(
    queue: Queue, known: Callable[[], Int[Array, "slots width"]], vocab: int
) -> tuple[Bool[Array, "slots vocab"], Bool[Array, "slots vocab"]]:
    """For penalties: which tokens each slot's request has, and which its answer.

    Computed if any slot asks: ``known()`` are its tokens, -1 past them.
    """
    of_slots = queue.of_slots

    def found() -> tuple[Array, Array]:
        tokens, first = known(), jnp.zeros_like(of_slots.prompt)
        return tokens_from(tokens, first, vocab), tokens_from(tokens, of_slots.prompt, vocab)

    none = jnp.zeros((of_slots.prompt.shape[0], vocab), bool)
    return jax.lax.cond(jnp.any(queue.is_running & of_slots.samplers.needs_history), found, lambda: (none, none))


def _reason(queue: Queue, token: Int[Array, " slots"]) -> Int[Array, " slots"]:
    """Why each request is done after its token, if it is: the first reason that holds."""
    of_slots = queue.of_slots
    is_end = jnp.any((of_slots.ends == token[:, None]) & (token >= 0)[:, None], axis=1)
    length = of_slots.stops.shape[2]
    place = of_slots.known[:, None] - length + jnp.arange(length, dtype=jnp.int32)[None]
    has_stop = of_slots.stops[..., -1] >= 0

    def stops() -> Bool[Array, " slots"]:
        latest = queue.tokens_at(jnp.arange(token.shape[0], dtype=jnp.int32)[:, None], place)
        latest = jnp.where(place >= of_slots.prompt[:, None], latest, -2)[:, None]  # a stop lies in the answer
        return jnp.any(has_stop & jnp.all((of_slots.stops < 0) | (of_slots.stops == latest), axis=2), axis=1)

    is_stop = jax.lax.cond(jnp.any(has_stop), stops, lambda: jnp.zeros(token.shape, bool))
    reasons = [token < 0, is_end, is_stop, of_slots.known >= of_slots.most]
    names = [Reason.NO_TOKEN, Reason.EOS, Reason.STOP, Reason.LENGTH]
    return jnp.select(reasons, [jnp.full_like(token, name) for name in names], jnp.full_like(token, Reason.NONE))
