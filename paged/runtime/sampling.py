"""Sampling: from logits to token ids."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a token is drawn from logits; hashable, so that a jitted step is compiled for it.

    In this order: ``logits / temperature``; the ``top_k`` largest; of those, with their probabilities adding up to 1
    again, the fewest that reach the mass ``top_p``, largest first (nucleus sampling, arXiv:1904.09751); then one draw.
    Equal logits rank by token id, lowest first. Temperature 0, the default, is the limit of ever smaller ones: the
    largest logit, lowest id first. Raises ``ValueError`` or ``TypeError`` for values that mean nothing.

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
        """Whether it takes the likeliest token, without chance."""
        return self.temperature == 0 or self.top_k == 1


def sample(
    logits: Float[Array, "*batch vocab"], sampler: Sampler, keys: PRNGKeyArray | None = None
) -> Int[Array, "*batch"]:
    """One token id, int32, for each row of logits.

    ``keys`` is one PRNG key a row, typed (``jax.random.key``), shape [*batch]; a row's draw depends on its own key and
    logits only. A greedy sampler needs none. Computes in float32. Logits of ``-inf`` are never drawn while a row has a
    finite one. Raises ``ValueError`` where keys are missing or of another shape.

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
            f"keys must be one typed PRNG key a row, shape {logits.shape[:-1]}, because the sampler draws at random; "
            f"got {got}. Use jax.random.split(jax.random.key(seed), rows)."
        )
    vocab = logits.shape[-1]
    draw = jax.vmap(lambda row, key: _draw(row, sampler, key))
    return draw(logits.astype(jnp.float32).reshape(-1, vocab), keys.reshape(-1)).reshape(keys.shape)


def _draw(logits: Float[Array, " vocab"], sampler: Sampler, key: PRNGKeyArray) -> Int[Array, ""]:
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
