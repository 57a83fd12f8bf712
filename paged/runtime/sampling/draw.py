"""`draw`: one token for each row of logits, each by its own rule, without a sort of the vocabulary."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from paged.lower import vary_alike
from paged.spec import LARGEST_INT32

from .._one_program import one_program
from .samplers import Samplers

# How many of the likeliest tokens are ranked to find those that may be drawn. Measured on two cores, 8 rows of 49152
# logits: 1.8 ms of CPU to rank 512, 10 ms for 4096, 63 ms for all.
_CANDIDATES = 512
# Tokens whose masses are added up before one of such a run of tokens is drawn.
_RUN = 256


class _Last(NamedTuple):
    """The last token that is kept of each row, in the order of falling logits and, where they are equal, of ids.

    * ``depth`` i32[rows]: the bits of its logit's absolute value. Logits are at most 0 here, and such bits are integers
      of the reverse order.
    * ``token`` i32[rows]: its id.
    """

    depth: Array
    token: Array

    def keeps(self, depth: Array, token: Any) -> Array:
        """Which tokens are not after it."""
        last, own = self.depth[:, None], self.token[:, None]
        return (depth < last) | ((depth == last) & (token <= own))

    def earlier(self, other: "_Last") -> "_Last":
        """The earlier one of two."""
        is_first = (self.depth < other.depth) | ((self.depth == other.depth) & (self.token <= other.token))
        return _Last(*(jnp.where(is_first, a, b) for a, b in zip(self, other, strict=True)))


def draw(
    logits: Float[Array, "rows vocab"],
    samplers: Samplers,
    keys: Key[Array, " rows"] | Callable[[], Key[Array, " rows"]],
    seen: Bool[Array, "rows vocab"] | None = None,
    drawn: Bool[Array, "rows vocab"] | None = None,
) -> Int[Array, " rows"]:
    """Draw one token for each row, in float32: a pure function, inside of a step or outside.

    **Arguments:**

    - `logits`: of the model. A logit of ``-inf`` is never drawn. Of several logits of ``inf`` each is as likely.
    - `samplers`: the rule of each row.
    - `keys`: a typed PRNG key for each row, or a function that makes them where a row draws by chance. A row's draw
      depends on its own key, rule and logits only.
    - `seen`, `drawn`: for penalties, which tokens the prompt or the answer of a row has, and which the answer alone.
      None for none.

    **Returns:** token ids, i32[rows]. -1 for a row that holds NaN, or nothing but ``-inf``: no token can be drawn.

    Nothing but the largest is looked for where all rows are greedy. Else the 512 likeliest tokens are ranked, if any
    row has a ``top_k`` or ``top_p``. Where these do not hold what may be drawn, a bisection over the vocabulary finds
    it: also under ``jax.vmap``, for every row.

    >>> logits = jnp.log(jnp.array([[0.1, 0.6, 0.3], [0.4, 0.4, 0.2]]))
    >>> rules = Samplers.of([Sampler(), Sampler(temperature=1.0, top_p=0.3)])
    >>> draw(logits, rules, jax.random.split(jax.random.key(0), 2)).tolist()
    [1, 0]
    """
    if callable(keys):
        return _drawn(logits, samplers, keys, seen, drawn)
    return _drawn_with(logits, samplers, keys, seen, drawn)


@one_program
def _drawn_with(logits: Array, samplers: Samplers, keys: Array, seen: Any, drawn: Any) -> Array:
    return _drawn(logits, samplers, lambda: keys, seen, drawn)


def _drawn(logits: Array, samplers: Samplers, keys: Callable[[], Array], seen: Any, drawn: Any) -> Array:
    logits = samplers.changed(logits.astype(jnp.float32), seen, drawn)
    first = take_largest(logits)
    has_token = first >= 0

    def by_chance() -> Array:
        largest = jnp.take_along_axis(logits, jnp.maximum(first, 0)[:, None], axis=1)
        return jnp.where(samplers.is_greedy, first, _by_chance(logits, largest, has_token, samplers, keys()))

    found = jax.lax.cond(jnp.all(samplers.is_greedy | ~has_token), lambda: first, by_chance)
    return jnp.where(has_token, found, -1)


def take_largest(logits: Float[Array, "rows vocab"]) -> Int[Array, " rows"]:
    """The token with the largest logit of each row, the first of several; -1 where no token can be drawn.

    Reductions that XLA:CPU makes with vectors: `jnp.argmax` takes ten times as long there (measured, 16 rows of
    49152 logits).
    """
    largest = jnp.max(logits, axis=1, keepdims=True)
    token = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
    first = jnp.min(jnp.where(logits == largest, token, LARGEST_INT32), axis=1)
    # A maximum of XLA:CPU may pass over NaN.
    return jnp.where((largest[:, 0] > -jnp.inf) & ~jnp.any(jnp.isnan(logits), axis=1), first, -1)


def _by_chance(logits: Array, largest: Array, has_token: Array, samplers: Samplers, keys: Array) -> Array:
    """A draw for each row; anything for greedy rows and for those without a token."""
    vocab = logits.shape[1]
    below = _over_temperature(logits, largest, samplers.temperature[:, None])
    depth, token = jax.lax.bitcast_convert_type(jnp.abs(below), jnp.int32), jnp.arange(vocab, dtype=jnp.int32)[None]
    asks = ((samplers.top_k < vocab) | (samplers.top_p < 1)) & has_token & ~samplers.is_greedy
    everything = (jnp.full(logits.shape[0], x, jnp.int32) for x in (np.float32(np.inf).view(np.int32), vocab))
    _, everything = vary_alike(depth, _Last(*everything))
    mass = jnp.exp(below)
    last = jax.lax.cond(jnp.any(asks), lambda: _last_kept(below, depth, mass, asks, samplers), lambda: everything)
    is_likely = below >= jnp.log(samplers.min_p)[:, None]
    return _one(jnp.where(last.keeps(depth, token) & is_likely, mass, 0.0), keys)


def _over_temperature(logits: Array, largest: Array, temperature: Array) -> Array:
    """Logits over the temperature, less the largest: 0 for the largest itself, at any temperature."""
    below = (logits - jnp.where(jnp.isfinite(largest), largest, 0.0)) / temperature
    below = jnp.where(largest == jnp.inf, -jnp.inf, below)
    return jnp.where(logits == largest, 0.0, below)


def _last_kept(below: Array, depth: Array, mass: Array, asks: Array, samplers: Samplers) -> _Last:
    """The last token within ``top_k`` and ``top_p``: among candidates where these hold it, else among all."""
    vocab = below.shape[1]
    top_k, top_p = jnp.minimum(samplers.top_k, vocab), samplers.top_p
    ranked, ids = jax.lax.top_k(below, min(_CANDIDATES, vocab))
    place = jnp.arange(ranked.shape[1], dtype=jnp.int32)[None]
    candidates = jnp.where(place < top_k[:, None], jnp.exp(ranked), 0.0)
    # With fewer than the vocabulary the total is that of the ones kept.
    total = jnp.where(top_k < vocab, jnp.sum(candidates, axis=1), jnp.sum(mass, axis=1))
    through = jnp.cumsum(candidates, axis=1)
    is_within = (through - candidates < (top_p * total)[:, None]) | (top_p >= 1)[:, None]
    # The first token is kept whatever its mass: rounding must not leave none.
    is_kept = ((place < top_k[:, None]) & is_within) | (place == 0)
    count = jnp.sum(is_kept, axis=1, dtype=jnp.int32)
    # The mass alone tells that no more tokens are needed, unless top_k does.
    holds = (top_k <= ranked.shape[1]) | ((top_k >= vocab) & (through[:, -1] >= top_p * total) & (top_p < 1))
    at = lambda x: jnp.take_along_axis(x, count[:, None] - 1, axis=1)[:, 0]
    own = _Last(jax.lax.bitcast_convert_type(jnp.abs(at(ranked)), jnp.int32), at(ids))
    if ranked.shape == below.shape:
        return own

    def of_all() -> _Last:
        found = _last_of_all(depth, mass, top_k, top_p)
        return _Last(*(jnp.where(holds, a, b) for a, b in zip(own, found, strict=True)))

    return jax.lax.cond(jnp.all(holds | ~asks), lambda: own, of_all)


def _last_of_all(depth: Array, mass: Array, top_k: Array, top_p: Array) -> _Last:
    """The last token within ``top_k`` and ``top_p``, by bisections over the whole vocabulary."""
    token, ones = jnp.arange(depth.shape[1], dtype=jnp.int32)[None], jnp.ones_like(mass)
    of_k = _last_before(depth, ones, top_k.astype(jnp.float32))
    total = jnp.sum(jnp.where(of_k.keeps(depth, token), mass, 0.0), axis=1)
    return of_k.earlier(_last_before(depth, mass, jnp.where(top_p < 1, top_p * total, jnp.inf)))


def _last_before(depth: Array, weights: Array, limit: Array) -> _Last:
    """The last token before which tokens weigh less than a limit.

    31 halvings find its depth, and of the tokens of this depth the first that are needed are kept.
    """

    def weight_above(bound: Array) -> Array:
        return jnp.sum(jnp.where(depth < bound[:, None], weights, 0.0), axis=1)

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        least, most = bounds
        middle = least + (most - least + 1) // 2
        is_less = weight_above(middle) < limit
        return jnp.where(is_less, middle, least), jnp.where(is_less, most, middle - 1)

    least, most, _ = vary_alike(jnp.zeros(len(depth), jnp.int32), jnp.max(depth, axis=1), limit)
    bound, _ = jax.lax.fori_loop(0, 31, halve, (least, most))
    is_tie = depth == bound[:, None]
    ties_before = (jnp.cumsum(is_tie, axis=1, dtype=jnp.int32) - is_tie.astype(jnp.int32)).astype(jnp.float32)
    each = jnp.max(jnp.where(is_tie, weights, 0.0), axis=1, keepdims=True)
    is_needed = is_tie & ((weight_above(bound)[:, None] + ties_before * each < limit[:, None]) | (ties_before == 0))
    token = jnp.arange(depth.shape[1], dtype=jnp.int32)[None]
    return _Last(bound, jnp.max(jnp.where(is_needed, token, -1), axis=1))


def _one(mass: Array, keys: Array) -> Array:
    """A token of each row, drawn in proportion to its mass: first a run of tokens, then one of the run.

    One uniform number of 23 bits for each keeps tokens of small mass as likely as they are.
    """
    rows, vocab = mass.shape
    runs = jnp.pad(mass, ((0, 0), (0, -vocab % _RUN))).reshape(rows, -1, _RUN)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(keys)
    run = _place(jnp.sum(runs, axis=2), uniform[:, 0])
    of_run = jnp.take_along_axis(runs, run[:, None, None], axis=1)[:, 0]
    return run * _RUN + _place(of_run, uniform[:, 1])


def _place(mass: Array, uniform: Array) -> Array:
    """The first place of each row up to which more than a part of the mass lies."""
    through = jnp.cumsum(mass, axis=1)
    is_past = (through > uniform[:, None] * through[:, -1:]) & (mass > 0)
    # Rounding may leave none: then it is the last one that has any mass.
    place = jnp.arange(mass.shape[1], dtype=jnp.int32)[None]
    last = jnp.max(jnp.where(mass > 0, place, 0), axis=1)
    return jnp.where(jnp.any(is_past, axis=1), jnp.argmax(is_past, axis=1).astype(jnp.int32), last)
