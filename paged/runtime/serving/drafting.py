"""Where drafts come from: the sequence's own tokens, or a smaller model. Both on the device."""

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .._arguments import integer
from .requests import Requests


class Drafts(eqx.Module):
    """Tokens that are proposed to follow the known ones of each slot.

    * ``tokens`` i32[slots, num_tokens]: in order; anything past the count.
    * ``count`` i32[slots]: how many a step verifies.
    * ``has_even_rows`` bool[]: whether every slot of the step has one known row and pages for ``num_tokens`` more.
    """

    tokens: Int[Array, "slots num_tokens"]
    count: Int[Array, " slots"]
    has_even_rows: Bool[Array, ""]

    def after(self, of_slots: Requests) -> Int[Array, "slots width"]:
        """The known tokens of each slot's request, and the drafts after them."""
        known = of_slots.known
        slot = jnp.arange(known.shape[0], dtype=jnp.int32)[:, None]
        place = known[:, None] + jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None]
        # A draft may be -1, where the draft model could draw none. It is never equal to a token.
        return of_slots.tokens.at[slot, place].set(jnp.maximum(self.tokens, 0), mode="drop")

    def at(
        self, known: Int[Array, "*#rows"], slot: Int[Array, "*#rows"], place: Int[Array, "*#rows"]
    ) -> Int[Array, "..."]:
        """The draft at each place of a slot's sequence that has so many known tokens; anything before them."""
        return jnp.maximum(self.tokens[slot, jnp.clip(place - known, 0, self.tokens.shape[1] - 1)], 0)


class NGramDraft(eqx.Module):
    """Drafts that a sequence's own tokens propose: what followed its last tokens where they came before.

    The last ``ngram`` tokens are looked up in the prompt and the answer, or fewer of them, down to ``min_ngram``. Of
    the longest matches the latest counts. The tokens after it are the drafts; where they reach the end of the sequence,
    they go on as they began, as in a sequence that repeats itself. A sequence in which nothing is found has no drafts.
    The method is prompt lookup decoding (Saxena, 2023).

    **Arguments:**

    - `num_tokens`: the most drafts of a sequence in one step.
    - `ngram`, `min_ngram`: the most and the fewest tokens that must be equal.

    Raises ``TypeError`` or ``ValueError`` unless they are positive integers, and ``min_ngram`` is at most ``ngram``.

    >>> NGramDraft(num_tokens=3, ngram=2)
    NGramDraft(num_tokens=3, ngram=2)
    """

    num_tokens: int = eqx.field(static=True, default=4)
    ngram: int = eqx.field(static=True, default=3)
    min_ngram: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        for field in dataclasses.fields(self):
            integer(field.name, getattr(self, field.name), 1)
        if self.min_ngram > self.ngram:
            raise ValueError(f"min_ngram must be at most ngram={self.ngram}; got {self.min_ngram}.")

    def propose(self, of_slots: Requests) -> tuple[Int[Array, "slots num_tokens"], Bool[Array, " slots"]]:
        """The drafts of each slot's request, and which have any."""
        tokens, known = of_slots.tokens, of_slots.known
        width, last = tokens.shape[1], known[:, None] - 1
        place = jnp.arange(width, dtype=jnp.int32)[None]
        is_equal, length = jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape, jnp.int32)
        for i in range(self.ngram):
            wanted = jnp.take_along_axis(tokens, jnp.maximum(last - i, 0), axis=1)
            before = jnp.pad(tokens, ((0, 0), (i, 0)), constant_values=-2)[:, :width]
            is_equal = is_equal & (before == wanted) & (last >= i)
            length = length + is_equal.astype(jnp.int32)
        is_match = (length >= self.min_ngram) & (place < last)
        latest = jnp.max(jnp.where(is_match, length * width + place, -1), axis=1)
        period = jnp.where(latest >= 0, last[:, 0] - latest % width, 1)[:, None]
        draft = jnp.arange(self.num_tokens, dtype=jnp.int32)[None] % period
        found = jnp.take_along_axis(tokens, jnp.clip(last + 1 - period + draft, 0, width - 1), axis=1)
        return found, latest >= 0


class ModelDraft(eqx.Module):
    """Drafts that another model draws, a smaller one with the same tokens.

    It is run on the same chunks of prompts as the served model, and has pages of its own with the same numbers: shared
    pages, copies and hits in the prefix cache are those of both. Its pages must be of the same size, and at least as
    many. Its tokens are drawn by the rule and the key of the request, so that sampled ones are accepted too where the
    models agree.

    **Arguments:**

    - `model`: a callable pytree, as `Engine` takes it.
    - `state`: its state. Its memory is the engine's from then on. It may hold nothing but pages, because those alone
      can forget a token by a sequence's length.
    - `num_tokens`: the most drafts of a sequence in one step.

    Raises ``TypeError`` or ``ValueError`` unless ``num_tokens`` is a positive integer.
    """

    model: Any
    state: eqx.nn.State | None
    num_tokens: int = eqx.field(static=True, default=4)

    def __check_init__(self):
        integer("num_tokens", self.num_tokens, 1)

    @property
    def without_state(self) -> "ModelDraft":
        """This one, whose state is kept elsewhere: in `ServeState`."""
        return dataclasses.replace(self, state=None)
