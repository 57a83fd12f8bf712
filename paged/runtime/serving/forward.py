"""The model's part of a step: which rows it computes, in which form, and whose logits are made."""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from paged.spec import CheckedFor, Everything, GroupedBatch, Minimum, RaggedBatch

from .._model_call import apply, logits_of_rows
from .drafting import Drafts
from .state import Queue
from .told import PromptLogProbs, has_prompt_rows

# With fewer rows than so many beside those that decode, a step has one ragged form.
_WORTH_HALVING = 32


def logits_of(model: Any, queue: Queue, state: eqx.nn.State, budget: int, minima: Any) -> Array:
    """The logits that a step makes of a queue, [1, slots, vocab]: to be traced for their shape."""
    return forward(model, queue, jnp.zeros_like(queue.request), None, state, budget, minima, False)[0]


def forward(
    model: Any,
    queue: Queue,
    rows: Int[Array, " slots"],
    drafts: Drafts | None,
    state: eqx.nn.State,
    budget: int,
    minima: tuple[Minimum, ...],
    has_told: bool,
) -> tuple[Float[Array, "most slots vocab"], PromptLogProbs | None, eqx.nn.State]:
    """Run the model on a step's rows.

    **Arguments:**

    - `queue`: its pool counts the rows, and has pages for the drafts.
    - `rows`: how many known tokens each slot computes: its last ones.
    - `drafts`: tokens that are computed after these; None for none.
    - `budget`, `minima`: as for `serve_step`.
    - `has_told`: whether requests may ask for the log-probabilities of their prompts.

    **Returns:** the logits of each slot's last row and of its drafts, which are anything where there is no such row;
    the log-probabilities, None where no request may ask; and the state.

    The step has one of few forms. Where every slot has one row or none, the batch has one row for each slot. Where
    some have drafts too, and all have pages for them, it has ``1 + num_tokens`` rows for each. Kernels for decoding
    take both. Else it is ragged, and also where log-probabilities of a prompt's tokens are told. A ragged batch has as
    many rows as the first of `ragged_sizes` that holds the step's: padding is computed like any row.
    """
    slots, lengths = rows.shape[0], queue.pool.lengths
    most = 1 if drafts is None else 1 + drafts.tokens.shape[1]
    last, takes = jnp.arange(slots, dtype=jnp.int32), rows > 0

    def even(each: int, told: Any, state: eqx.nn.State) -> tuple[Array, Any, eqx.nn.State]:
        own = queue.with_lengths(lengths + each - 1)
        # A layer may check its batch, and XLA may do so before the loop that does not run this form: without pages for
        # all rows the batch has none.
        own_takes = takes if each == 1 else takes & has_even_rows
        ids, batch = rows_for_each(own, drafts, own_takes, each, minima)
        x, state = apply(model, ids, batch, state)
        # Row by row of all slots, as they are drawn from.
        logits = logits_of_rows(model, x, (last[None] * each + jnp.arange(each, dtype=jnp.int32)[:, None]).reshape(-1))
        return logits.reshape(each, slots, -1), told, state

    more = jnp.zeros_like(rows) if drafts is None else drafts.count

    def ragged(size: int, told: Any, state: eqx.nn.State) -> tuple[Array, Any, eqx.nn.State]:
        own = queue.with_lengths(lengths + more)
        # As above: where the form does not run for lack of room, its batch has no rows.
        own_rows = rows + more if size == budget else jnp.where(num_rows <= size, rows + more, 0)
        ids, batch = ragged_rows(own, drafts, own_rows, size, minima)
        x, state = apply(model, ids, batch, state)
        first = jnp.cumsum(rows + more, dtype=jnp.int32) - more - 1
        row = jnp.clip(first[None] + jnp.arange(most, dtype=jnp.int32)[:, None], 0, size - 1)
        told = PromptLogProbs.of(model, x, own, rows + more, budget) if has_told and size == budget else told
        return logits_of_rows(model, x, row.reshape(-1)).reshape(most, slots, -1), told, state

    told = PromptLogProbs.none(budget) if has_told else None
    if budget == 1 and not has_told:
        return even(1, told, state)
    is_told, has_even_rows = has_prompt_rows(queue, rows), jnp.zeros((), bool)
    is_single = jnp.all(rows <= 1) & ~is_told
    if drafts is not None:
        is_single, has_even_rows = is_single & ~jnp.any(drafts.count > 0), drafts.has_even_rows & ~is_told
    forms: list[tuple[Array, Any]] = [(is_single, functools.partial(even, 1))]
    # Log-probabilities are told by the largest form alone.
    num_rows, sizes = jnp.where(is_told, budget, jnp.sum(rows + more, dtype=jnp.int32)), ragged_sizes(slots, budget)
    which = sum(((num_rows > size).astype(jnp.int32) for size in sizes[:-1]), jnp.zeros((), jnp.int32))
    for i, size in enumerate(sizes):
        forms.append((~is_single & ~has_even_rows & (which == i), functools.partial(ragged, size)))
    if drafts is not None:
        forms.append((has_even_rows, functools.partial(even, most)))
    logits = jax.eval_shape(lambda state: even(1, None, state)[0], state)
    carry = jnp.zeros((most, *logits.shape[1:]), logits.dtype), told, state
    return _run_one(forms, carry)


def _run_one(forms: list[tuple[Array, Any]], carry: tuple) -> tuple:
    """What the one form that runs makes of the carry, whose first part has room for its logits."""

    def run(form: Any, carry: tuple) -> tuple:
        new, *others = form(*carry[1:])
        return jax.lax.dynamic_update_slice(carry[0], new, (0, 0, 0)), *others

    # Each form is a loop of one turn or none. XLA updates what a loop carries in place; a branch would get a copy of
    # every page.
    for runs, form in forms:
        carry = jax.lax.fori_loop(0, runs.astype(jnp.int32), lambda _, carry, form=form: run(form, carry), carry)
    return carry


def ragged_sizes(slots: int, budget: int) -> tuple[int, ...]:
    """How many rows the ragged forms of a step have, the smallest first.

    One row for each slot, and half of the others or all. Where the others are few, one form serves: another one takes
    longer to compile than it saves.
    """
    others = budget - slots
    return (budget,) if others < _WORTH_HALVING else (slots + others // 2, budget)


def rows_for_each(
    queue: Queue, drafts: Drafts | None, takes: Bool[Array, " slots"], each: int, minima: Any
) -> tuple[Int[Array, " rows"], Any]:
    """The ids and the batch of a step that computes the last ``each`` tokens of every slot that takes part."""
    place = queue.pool.lengths[:, None] - each + jnp.arange(each, dtype=jnp.int32)[None]
    ids = _ids(queue, drafts, jnp.arange(takes.shape[0], dtype=jnp.int32)[:, None], place)
    batch = trusted(queue.pool.decode_batch(takes, query_rows=each), queue, takes.shape[0] * each, minima)
    return jnp.where(takes[:, None], ids, 0).reshape(-1), batch


def ragged_rows(
    queue: Queue, drafts: Drafts | None, rows: Int[Array, " slots"], budget: int, minima: Any
) -> tuple[Int[Array, " budget"], Any]:
    """The ids and the batch of a step that computes the last ``rows`` tokens of each slot."""
    starts, row = jnp.cumsum(rows, dtype=jnp.int32) - rows, jnp.arange(budget, dtype=jnp.int32)
    slot = jnp.repeat(jnp.arange(rows.shape[0], dtype=jnp.int32), rows, total_repeat_length=budget)
    place = queue.pool.lengths[slot] - rows[slot] + row - starts[slot]
    ids = _ids(queue, drafts, slot, place)
    return jnp.where(row < jnp.sum(rows, dtype=jnp.int32), ids, 0), trusted(
        queue.pool.ragged_batch(rows), queue, budget, minima
    )


def _ids(
    queue: Queue, drafts: Drafts | None, slot: Int[Array, "*#rows"], place: Int[Array, "*#rows"]
) -> Int[Array, "..."]:
    """The token of each row: at a place of a slot's sequence, or of the drafts after it."""
    ids = queue.tokens_at(slot, place)
    if drafts is None:
        return ids
    known = queue.of_slots.known[slot]
    return jnp.where(place >= known, drafts.at(known, slot, place), ids)


def trusted(batch: Any, queue: Queue, tokens: int, minima: Any) -> Any:
    """The batch, marked as checked: a pool's tables are sound, and requests are checked when they are submitted."""
    values, size = dict(queue.of_slots.values), queue.pool.page_size

    def marked(own: RaggedBatch, num_pages: int) -> RaggedBatch:
        facts = CheckedFor(size, num_pages, tokens, Everything(), minima)
        return dataclasses.replace(own, values=values, checked_for=facts)

    if not isinstance(batch, GroupedBatch):
        return marked(batch, queue.pool.num_pages)
    return GroupedBatch(map(marked, batch.batches, queue.pool.num_pages), batch.masks)
