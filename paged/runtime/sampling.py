"""Sampling: from logits to token ids."""

import dataclasses
import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from paged.lower import whole_rows

from ._arguments import integer

# How many of the likeliest tokens are ranked to find those that hold the mass `top_p`. Measured on two cores, 8 rows of
# 49152 logits: 1.8 ms of CPU to rank 512, 10 ms for 4096, 63 ms for all.
_CANDIDATES = 512
_FLOAT32 = np.finfo(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a token is drawn from logits. Hashable: a jitted step is compiled for its sampler.

    The rule, in this order: divide the logits by the temperature, after the row's largest is subtracted from each, so
    that nothing that counts overflows; keep the ``top_k`` largest; renormalise, and of the
    tokens left keep the fewest, largest first, whose probabilities add up to ``top_p`` (nucleus sampling,
    arXiv:1904.09751); draw one of them. Among equal logits the lower token id comes first.

    **Arguments:**

    - `temperature`: at least 0. At 0, the default, and below the least normal float32, 1.2e-38, the token with the
      largest logit is taken: the limit of ever lower temperatures.
    - `top_k`: how many of the likeliest tokens may be drawn; None for all.
    - `top_p`: the probability mass that may be drawn, in (0, 1]; None for all.

    Raises ``ValueError`` or ``TypeError`` for values outside of these ranges.

    >>> Sampler(temperature=0.7, top_p=0.9).is_greedy, Sampler().is_greedy
    (False, True)
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "temperature", _real("temperature", self.temperature))
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature must be finite and not negative; got {self.temperature}. 0 takes the likeliest token."
            )
        if self.top_k is not None:
            object.__setattr__(self, "top_k", integer("top_k", self.top_k))
            if self.top_k < 1:
                raise ValueError(
                    f"top_k must be at least 1, because one token must remain; got {self.top_k}. For all tokens, leave "
                    "it out."
                )
        if self.top_p is not None:
            object.__setattr__(self, "top_p", _real("top_p", self.top_p))
            if not 0 < self.top_p <= 1:
                raise ValueError(
                    f"top_p must be in (0, 1]: it is the probability mass to keep; got {self.top_p}. For all tokens, "
                    "leave it out."
                )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without chance."""
        return self.temperature < float(_FLOAT32.tiny) or self.top_k == 1


def sample(
    logits: Float[Array, "*batch vocab"], sampler: Sampler, keys: Key[Array, "*batch"] | None = None
) -> Int[Array, "*batch"]:
    """Draw one token for each row of logits, in float32.

    **Arguments:**

    - `logits`: any number of leading axes. A logit of ``-inf`` is never drawn. Of several logits of ``inf`` each is as
      likely.
    - `sampler`: the rule.
    - `keys`: a typed PRNG key (``jax.random.key``) per row. A row's draw depends on its own key and logits only. A
      greedy sampler needs no keys.

    **Returns:** token ids, int32. -1 for a row that holds NaN, or nothing but ``-inf``: no token can be drawn from it.

    Raises ``TypeError`` or ``ValueError`` for logits that are no floats, for an empty vocabulary, and for keys that are
    missing, untyped or of another shape.

    With ``top_p`` the 512 likeliest tokens are ranked. A batch with a row whose mass these do not hold also looks at
    all tokens, and so does every batch under ``jax.vmap``.

    >>> logits = jnp.log(jnp.array([[0.1, 0.6, 0.3], [0.4, 0.4, 0.2]]))
    >>> sample(logits, Sampler()).tolist()
    [1, 0]
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> sample(logits, Sampler(temperature=1.0, top_p=0.3), keys).tolist()
    [1, 0]
    """
    if not isinstance(sampler, Sampler):
        raise TypeError(f"sampler must be a Sampler; got {sampler!r}.")
    logits = jnp.asarray(logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits must be floats; got {logits.dtype.name}.")
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must be [..., vocab] with at least one token; got {logits.shape}.")
    if sampler.is_greedy:
        return _take_largest(*whole_rows(logits))
    is_array = isinstance(keys, jax.Array)
    if not is_array or not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != logits.shape[:-1]:
        got = f"{keys.dtype} of shape {keys.shape}" if is_array else repr(keys)
        raise ValueError(
            f"keys must be one typed PRNG key per row, shape {logits.shape[:-1]}, because the sampler draws at random; "
            f"got {got}. Use jax.random.split(jax.random.key(seed), rows)."
        )
    vocab = logits.shape[-1]
    return _draw(logits.astype(jnp.float32).reshape(-1, vocab), keys.reshape(-1), sampler).reshape(keys.shape)


def _take_largest(logits: Float[Array, "*batch vocab"]) -> Int[Array, "*batch"]:
    ids = jnp.argmax(logits, axis=-1, keepdims=True)  # of a NaN, where there is one
    has_token = jnp.take_along_axis(logits, ids, axis=-1)[..., 0] > -jnp.inf
    return jnp.where(has_token, ids[..., 0].astype(jnp.int32), -1)


# A jit of its own: outside of one, the branches below would be compiled at every call.
@functools.partial(jax.jit, static_argnames="sampler")
def _draw(logits: Float[Array, "rows vocab"], keys: Key[Array, " rows"], sampler: Sampler) -> Int[Array, " rows"]:
    logits, keys = whole_rows(logits, keys)
    vocab, top_p = logits.shape[1], sampler.top_p
    top_k = vocab if sampler.top_k is None else min(sampler.top_k, vocab)
    largest = jnp.max(logits, axis=1, keepdims=True)
    # XLA's maximum of a row on CPUs may pass over a NaN.
    has_token = (largest[:, 0] > -jnp.inf) & ~jnp.any(jnp.isnan(logits), axis=1)
    logits = _over_temperature(logits, largest, sampler.temperature)
    if top_p is None or top_p == 1:
        drawn = _draw_ranked(*jax.lax.top_k(logits, top_k), keys) if sampler.top_k is not None else _one(logits, keys)
    elif top_k < vocab:
        ranked, ids = jax.lax.top_k(logits, top_k)
        drawn, _ = _draw_nucleus(ranked, ids, jax.nn.logsumexp(ranked, axis=1), top_p, keys)
    else:
        drawn = _draw_from_candidates(logits, has_token, top_p, keys)
    return jnp.where(has_token, drawn, -1)


def _over_temperature(
    logits: Float[Array, "rows vocab"], largest: Float[Array, "rows 1"], temperature: float
) -> Float[Array, "rows vocab"]:
    """Logits over the temperature, less the largest: 0 for the largest itself, at any temperature."""
    # It and its reciprocal, by which a compiler may multiply instead, are normal numbers in float32. Else 0 / 0 and
    # -inf / inf would give NaN.
    temperature = min(max(temperature, 2.0**-126), 2.0**126)
    below = (logits - jnp.where(jnp.isfinite(largest), largest, 0.0)) / temperature
    below = jnp.where(largest == jnp.inf, -jnp.inf, below)
    return jnp.where(logits == largest, 0.0, below)


def _draw_from_candidates(
    logits: Float[Array, "rows vocab"], has_token: Any, top_p: float, keys: Key[Array, " rows"]
) -> Int[Array, " rows"]:
    """Draw from the likeliest tokens where they hold the mass, else from all: the row alone decides which."""
    log_total = jax.nn.logsumexp(logits, axis=1)
    ranked, ids = jax.lax.top_k(logits, min(_CANDIDATES, logits.shape[1]))
    drawn, holds = _draw_nucleus(ranked, ids, log_total, top_p, keys)
    if ranked.shape == logits.shape:
        return drawn
    holds |= ~has_token
    from_all = lambda: jnp.where(holds, drawn, _draw_from_all(logits, log_total, top_p, keys))
    return jax.lax.cond(jnp.all(holds), lambda: drawn, from_all)


def _draw_from_all(
    logits: Float[Array, "rows vocab"], log_total: Any, top_p: float, keys: Key[Array, " rows"]
) -> Int[Array, " rows"]:
    """Draw one of the fewest tokens that reach the mass, which a bisection finds without ranking any.

    The logits are at most 0. The bits of their absolute values are integers of the same order: 31 halvings find the
    last logit above which less than the mass lies. All above it are kept, and of its ties the first that are needed.
    """
    mass = jnp.exp(logits - log_total[:, None])
    depth = jax.lax.bitcast_convert_type(jnp.abs(logits), jnp.int32)

    def mass_above(bound: Array) -> Array:
        return jnp.sum(jnp.where(depth < bound[:, None], mass, 0.0), axis=1)

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        least, most = bounds
        middle = least + (most - least + 1) // 2
        is_above = mass_above(middle) < top_p
        return jnp.where(is_above, middle, least), jnp.where(is_above, most, middle - 1)

    infinity = np.float32(np.inf).view(np.int32)
    start = jnp.zeros(len(logits), jnp.int32), jnp.full(len(logits), infinity, jnp.int32)
    bound, _ = jax.lax.fori_loop(0, 31, halve, start)
    is_tie = depth == bound[:, None]
    ties_before = jnp.cumsum(is_tie, axis=1, dtype=jnp.int32) - is_tie.astype(jnp.int32)
    tie_mass = jnp.max(jnp.where(is_tie, mass, 0.0), axis=1, keepdims=True)
    is_needed = mass_above(bound)[:, None] + ties_before.astype(jnp.float32) * tie_mass < top_p
    return _one(jnp.where((depth < bound[:, None]) | (is_tie & is_needed), logits, -jnp.inf), keys)


def _draw_nucleus(
    ranked: Float[Array, "rows ranked"], ids: Any, log_total: Any, top_p: float, keys: Key[Array, " rows"]
) -> tuple[Int[Array, " rows"], Any]:
    """Draw one of the fewest ranked tokens that reach the mass, and whether the ranked tokens reach it."""
    mass = jnp.exp(ranked - log_total[:, None])
    mass_through = jnp.cumsum(mass, axis=1)
    # The first token is kept whatever its mass: rounding must not leave none.
    is_kept = (mass_through - mass < top_p) | (jnp.arange(ranked.shape[1]) == 0)[None]
    return _draw_ranked(jnp.where(is_kept, ranked, -jnp.inf), ids, keys), mass_through[:, -1] >= top_p


def _draw_ranked(ranked: Float[Array, "rows ranked"], ids: Any, keys: Key[Array, " rows"]) -> Int[Array, " rows"]:
    return jnp.take_along_axis(ids, _one(ranked, keys)[:, None], axis=1)[:, 0]


def _one(logits: Float[Array, "rows vocab"], keys: Key[Array, " rows"]) -> Int[Array, " rows"]:
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _real(name: str, value: Any) -> float:
    """``value`` as a Python float. A NumPy number is one; a bool and a string are none."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {value!r}.")
    return float(value)
