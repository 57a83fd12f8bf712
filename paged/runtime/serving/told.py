"""Log-probabilities that a step tells: of the tokens that it has drawn, and of the prompts' tokens."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._model_call import logits_of_rows
from ..sampling import log_probs, top_log_probs
from .state import Queue

# Rows whose logits are made at once for the tokens of prompts: so many logits are in memory, and not those of all rows.
_ROWS = 64


class DrawnLogProbs(eqx.Module):
    """Log-probabilities of what each slot has drawn, under the model: of logits before any rule changes them.

    * ``log_prob`` f32[slots, most]: of the tokens. * ``ids`` i32[slots, most, n], ``top`` f32[slots, most, n]: the
      likeliest tokens in each one's place, and theirs. Where no request asks they are zero.
    """

    log_prob: Float[Array, "*steps slots most"]
    ids: Int[Array, "*steps slots most n"]
    top: Float[Array, "*steps slots most n"]

    @classmethod
    def none(cls, slots: int, most: int, n: int) -> "DrawnLogProbs":
        zero = jnp.zeros((slots, most, n), jnp.float32)
        return cls(jnp.zeros((slots, most), jnp.float32), zero.astype(jnp.int32), zero)

    @classmethod
    def of(
        cls,
        asks: Bool[Array, " slots"],
        logits: Float[Array, "most slots vocab"],
        token: Int[Array, "slots most"],
        n: int,
    ) -> "DrawnLogProbs":
        """The log-probabilities of these tokens. They are computed if any slot asks that has drawn one."""
        most, slots, vocab = logits.shape

        def found() -> "DrawnLogProbs":
            rows = jnp.swapaxes(logits, 0, 1).reshape(slots * most, vocab)
            own = log_probs(rows, token.reshape(-1)).reshape(slots, most)
            ids, top = top_log_probs(rows, n)
            return cls(own, ids.reshape(slots, most, n), top.reshape(slots, most, n))

        is_asked = jnp.any(asks & (token[:, 0] >= 0))
        return jax.lax.cond(is_asked, found, lambda: cls.none(slots, most, n))


class PromptLogProbs(eqx.Module):
    """Log-probabilities of tokens of prompts, one for each row of a step.

    * ``request`` i32[budget]: whose; -1 for a row that tells none. * ``place`` i32[budget]: of the token in its prompt.
    * ``log_prob`` f32[budget]: of the token, given those before it.
    """

    request: Int[Array, "*steps budget"]
    place: Int[Array, "*steps budget"]
    log_prob: Float[Array, "*steps budget"]

    @classmethod
    def none(cls, budget: int) -> "PromptLogProbs":
        nobody = jnp.full(budget, -1, jnp.int32)
        return cls(nobody, nobody, jnp.zeros(budget, jnp.float32))

    @classmethod
    def of(cls, model: Any, x: Any, queue: Queue, rows: Int[Array, " slots"], budget: int) -> "PromptLogProbs":
        """Those of a ragged step.

        **Arguments:**

        - `model`, `x`: what gives logits of rows.
        - `queue`: its pool counts the rows. - `rows`: of each slot.
        """
        row, starts = jnp.arange(budget, dtype=jnp.int32), jnp.cumsum(rows) - rows
        slot = jnp.repeat(jnp.arange(rows.shape[0], dtype=jnp.int32), rows, total_repeat_length=budget)
        known, place = queue.of_slots, queue.pool.lengths[slot] - rows[slot] + row - starts[slot] + 1
        tells = (row < jnp.sum(rows)) & asks_for_prompt(queue)[slot] & (place < known.prompt[slot])
        token = queue.tokens_at(slot, place)
        at = jnp.minimum(jnp.arange(-(-budget // _ROWS) * _ROWS, dtype=jnp.int32), budget - 1).reshape(-1, _ROWS)

        def found() -> Array:
            own = jax.lax.map(lambda some: log_probs(logits_of_rows(model, x, some), token[some]), at)
            return own.reshape(-1)[:budget]

        log_prob = jax.lax.cond(jnp.any(tells), found, lambda: jnp.zeros(budget, jnp.float32))
        return cls(jnp.where(tells, queue.request[slot], -1), place, log_prob)


def asks_for_prompt(queue: Queue) -> Bool[Array, " slots"]:
    """Which slots' requests ask for the log-probabilities of their prompt's tokens."""
    asked = queue.of_slots.prompt_log_probs
    return jnp.zeros(queue.request.shape, bool) if asked is None else queue.is_running & (asked > 0)


def has_prompt_rows(queue: Queue, rows: Int[Array, " slots"]) -> Bool[Array, ""]:
    """Whether a step has rows that tell of a prompt's tokens."""
    first = queue.pool.lengths - rows
    return jnp.any(asks_for_prompt(queue) & (rows > 0) & (first + 1 < queue.of_slots.prompt))
