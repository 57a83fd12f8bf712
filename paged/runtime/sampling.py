"""Sampling: from logits to token ids."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a token is drawn from logits. Hashable: a jitted step is compiled for its sampler.

    The rule, in this order: divide the logits by the temperature; keep the ``top_k`` largest; renormalise, and of the
    tokens left keep the fewest, largest first, whose probabilities add up to ``top_p`` (nucleus sampling,
    arXiv:1904.09751); draw one of them. Among equal logits the lower token id comes first.

    **Arguments:**

    - `temperature`: at least 0. At 0, the default, the token with the largest logit is taken: the limit of ever lower
      temperatures.
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
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature must be finite and not negative; got {self.temperature}. 0 takes the likeliest token."
            )
        if self.top_k is not None:
            if isinstance(self.top_k, bool) or not isinstance(self.top_k, int):
                raise TypeError(f"top_k must be a Python int or None; got {self.top_k!r}.")
            if self.top_k < 1:
                raise ValueError(
                    f"top_k must be at least 1, because one token must remain; got {self.top_k}. For all tokens, leave "
                    "it out."
                )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p must be in (0, 1]: it is the probability mass to keep; got {self.top_p}. For all tokens, leave "
                "it out."
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without chance."""
        return self.temperature == 0 or self.top_k == 1


def sample(
    logits: Float[Array, "*batch vocab"], sampler: Sampler, keys: Key[Array, "*batch"] | None = None
) -> Int[Array, "*batch"]:
    """Draw one token for each row of logits, in float32.

    **Arguments:**

    - `logits`: any number of leading axes. A logit of ``-inf`` is never drawn while its row has a finite one.
    - `sampler`: the rule.
    - `keys`: a typed PRNG key (``jax.random.key``) per row. A row's draw depends on its own key and logits only. A
      greedy sampler needs no keys.

    **Returns:** token ids, int32. Raises ``ValueError`` for an empty vocabulary, and for keys that are missing, untyped
    or of another shape.

    >>> logits = jnp.log(jnp.array([[0.1, 0.6, 0.3], [0.4, 0.4, 0.2]]))
    >>> sample(logits, Sampler()).tolist()
    [1, 0]
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> sample(logits, Sampler(temperature=1.0, top_p=0.3), keys).tolist()
    [1, 0]
    """
    logits = jnp.asarray(logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must be [..., vocab] with at least one token; got {logits.shape}.")
    if sampler.is_greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if keys is None or not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != logits.shape[:-1]:
        got = "None" if keys is None else f"{keys.dtype} of shape {keys.shape}"
        raise ValueError(
            f"keys must be one typed PRNG key per row, shape {logits.shape[:-1]}, because the sampler draws at random; "
            f"got {got}. Use jax.random.split(jax.random.key(seed), rows)."
        )
    vocab = logits.shape[-1]
    draw = jax.vmap(lambda row, key: _draw(row, sampler, key))
    return draw(logits.astype(jnp.float32).reshape(-1, vocab), keys.reshape(-1)).reshape(keys.shape)


def _draw(logits: Float[Array, " vocab"], sampler: Sampler, key: Key[Array, ""]) -> Int[Array, ""]:
    logits = logits / sampler.temperature
    if sampler.top_k is None and sampler.top_p is None:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    kept = logits.shape[0] if sampler.top_k is None else min(sampler.top_k, logits.shape[0])
    ranked, ids = jax.lax.top_k(logits, kept)  # equal values come lowest id first
    if sampler.top_p is not None and sampler.top_p < 1:
        probabilities = jax.nn.softmax(ranked)
        mass_before = jnp.cumsum(probabilities) - probabilities
        # The first token is kept whatever its mass: rounding must not leave none.
        is_kept = (mass_before < sampler.top_p) | (jnp.arange(kept) == 0)
        ranked = jnp.where(is_kept, ranked, -jnp.inf)
    return ids[jax.random.categorical(key, ranked)].astype(jnp.int32)
