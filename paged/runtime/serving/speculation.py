"""The drafts of a step: how many each slot may have, pages for them, and the steps of a draft model."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .._model_call import apply, logits_of_rows
from .._new_pools import has_more_than_pages
from .._prefix_pools import pools_of_groups
from ..sampling import draw
from .drafting import Drafts, ModelDraft, NGramDraft
from .forward import ragged_rows, rows_for_each
from .record import history, keys_of
from .reuse import make_free
from .state import Queue

Speculation = NGramDraft | ModelDraft


def require_speculation(state: eqx.nn.State, speculation: Any) -> None:
    """``TypeError`` or ``ValueError`` unless drafts can be verified with a model of this state."""
    if not isinstance(speculation, NGramDraft | ModelDraft):
        raise TypeError(f"speculation must be an NGramDraft or a ModelDraft; got {speculation!r}.")
    states = {"the model's state": state}
    if isinstance(speculation, ModelDraft):
        if not isinstance(speculation.state, eqx.nn.State):
            raise TypeError(f"ModelDraft needs the draft model's state, an eqx.nn.State; got {speculation.state!r}.")
        states["the draft model's state"] = speculation.state
        if {id(x) for x in jax.tree.leaves(state)} & {id(x) for x in jax.tree.leaves(speculation.state)}:
            raise ValueError("ModelDraft needs a state of its own; got one with arrays of the served model's state.")
    for name, own in states.items():
        if has_more_than_pages(own):
            raise ValueError(
                f"speculation needs models whose state holds pages alone, and {name} holds other arrays. A rejected "
                "draft is forgotten by the length of its sequence, which nothing but pages can do."
            )


def speculate(
    speculation: Speculation, queue: Queue, rows: Int[Array, " slots"], state: Any, budget: int, minima: Any
) -> tuple[Queue, Drafts, Any]:
    """The drafts of a step.

    **Arguments:**

    - `queue`: its pool counts the rows of known tokens.
    - `rows`: how many they are.
    - `state`: of the draft model; None without one.
    - `budget`, `minima`: as for `serve_step`.

    **Returns:** the queue, whose pool has pages for the drafts; the drafts; and the draft model's state, whose pages
    have the step's known tokens and its drafts.
    """
    most = _most_drafts(queue, rows, speculation.num_tokens)
    if isinstance(speculation, NGramDraft):
        tokens, is_found = speculation.propose(queue.of_slots)
        queue, count, has_even_rows = _with_room(queue, rows, jnp.where(is_found, most, 0), speculation, budget)
        return queue, Drafts(tokens, count, has_even_rows), state
    # A prompt's pages come with the step itself: nothing can be drafted after it yet.
    queue, count, has_even_rows = _with_room(queue, rows, jnp.where(rows == 1, most, 0), speculation, budget)
    tokens, state = _draft(speculation, queue, rows, count, state, minima)
    drafts = Drafts(tokens, count, has_even_rows)
    return queue, drafts, _catch_up(speculation, queue, rows, drafts, state, budget, minima)


def _most_drafts(queue: Queue, rows: Int[Array, " slots"], num_tokens: int) -> Int[Array, " slots"]:
    """How many drafts each slot can use: none where its prompt goes on, and none past the last token that it may have.

    One token is drawn without any draft.
    """
    of_slots = queue.of_slots
    draws = queue.is_running & (rows > 0) & (queue.pool.lengths == of_slots.known)
    return jnp.where(draws, jnp.clip(of_slots.most - of_slots.known - 1, 0, num_tokens), 0)


def _with_room(
    queue: Queue, rows: Int[Array, " slots"], count: Int[Array, " slots"], speculation: Speculation, budget: int
) -> tuple[Queue, Int[Array, " slots"], Bool[Array, ""]]:
    """Pages for drafts, how many drafts there is room for in the budget and in the pages, and whether all slots can
    have as many rows.

    Pages that only the prefix cache holds are given up for them. No sequence is preempted.
    """
    left = budget - jnp.sum(rows, dtype=jnp.int32)
    count = jnp.clip(left - (jnp.cumsum(count, dtype=jnp.int32) - count), 0, count)
    is_even = jnp.all(rows <= 1) & jnp.any(count > 0)
    asked = jnp.where(is_even, jnp.where(rows > 0, speculation.num_tokens, 0), count)
    lengths, size = queue.pool.lengths, queue.pool.page_size
    entries = jnp.stack([own.entries for own in pools_of_groups(queue.pool)])
    lacking = jnp.sum(jnp.maximum(-(-(lengths + asked)[None] // size) - entries, 0), axis=1, dtype=jnp.int32)
    queue = make_free(queue, lacking, asked)
    pool, ok = queue.pool.reserve(jnp.where(asked > 0, lengths + asked, 0))
    held = jnp.min(entries, axis=0) * size - lengths
    return queue.replace(pool=pool), jnp.where(ok, count, jnp.clip(held, 0, count)), is_even & jnp.all(ok)


def _draft(
    speculation: ModelDraft, queue: Queue, rows: Int[Array, " slots"], count: Int[Array, " slots"], state: Any,
    minima: Any,
) -> tuple[Int[Array, "slots num_tokens"], Any]:  # fmt: skip
    """Draw drafts one after the other, each from the one before it.

    In a step of decoding rows the last draft is put into pages too, and so is the one row of a slot without drafts: the
    draft model has then seen whatever may be accepted.
    """
    model, slots, lengths = speculation.model, rows.shape[0], queue.pool.lengths
    of_slots = queue.of_slots
    is_even = jnp.all(rows <= 1)

    def feed(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        tokens, state = carry
        own, drafts = queue.with_lengths(lengths + i), Drafts(tokens, count, is_even)
        takes = (rows > 0) & (i < count + is_even.astype(jnp.int32))
        ids, batch = rows_for_each(own, drafts, takes, 1, minima)
        x, state = apply(model, ids, batch, state)
        logits = logits_of_rows(model, x, jnp.arange(slots))

        def known() -> Array:
            tokens = drafts.after(queue.of_slots)
            is_known = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < (of_slots.known + i)[:, None]
            return jnp.where(is_known, tokens, -1)

        past = history(queue, known, logits.shape[1])
        token = draw(logits, of_slots.samplers, lambda: keys_of(of_slots, i), *past)
        return tokens.at[:, i].set(token, mode="drop"), state

    feeds = jnp.max(count) + is_even.astype(jnp.int32)
    none = jnp.zeros((slots, speculation.num_tokens), jnp.int32)
    return jax.lax.fori_loop(0, feeds, feed, (none, state))


def _catch_up(
    speculation: ModelDraft, queue: Queue, rows: Int[Array, " slots"], drafts: Drafts, state: eqx.nn.State,
    budget: int, minima: Any,
) -> eqx.nn.State:  # fmt: skip
    """Run the draft model on the rows of a step that prefills, so that its pages have what the served model's have."""

    def run(_: Any, state: eqx.nn.State) -> eqx.nn.State:
        own = queue.with_lengths(queue.pool.lengths + drafts.count)
        ids, batch = ragged_rows(own, drafts, rows + drafts.count, budget, minima)
        return apply(speculation.model, ids, batch, state)[1]

    return jax.lax.fori_loop(0, jnp.any(rows > 1).astype(jnp.int32), run, state)
