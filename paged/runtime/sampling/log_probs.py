"""Log-probabilities of tokens under the model: of the logits as they are, before any rule changes them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def log_probs(logits: Float[Array, "rows vocab"], tokens: Int[Array, " rows"]) -> Float[Array, " rows"]:
    """The log-probability of one token of each row, in float32.

    **Arguments:**

    - `logits`: of the model.
    - `tokens`: a token id for each row.

    **Returns:** f32[rows]: ``log(softmax(logits))`` at the token; NaN for a token outside of the vocabulary, such as
    the -1 of a row from which nothing can be drawn.

    >>> log_probs(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([0])).tolist()
    [-1.3862943649291992]
    """
    logits = logits.astype(jnp.float32)
    is_token = (tokens >= 0) & (tokens < logits.shape[1])
    at = jnp.take_along_axis(logits, jnp.where(is_token, tokens, 0)[:, None], axis=1)[:, 0]
    return jnp.where(is_token, at - jax.nn.logsumexp(logits, axis=1), jnp.nan)


def top_log_probs(logits: Float[Array, "rows vocab"], n: int) -> tuple[Int[Array, "rows n"], Float[Array, "rows n"]]:
    """The ``n`` likeliest tokens of each row, and their log-probabilities in float32.

    **Arguments:**

    - `logits`: of the model.
    - `n`: how many, at most the vocabulary.

    **Returns:** the ids and the log-probabilities, largest first; among equal ones the lower id.

    >>> ids, logs = top_log_probs(jnp.log(jnp.array([[0.25, 0.75]])), 1)
    >>> ids.tolist(), logs.shape
    ([[1]], (1, 1))
    """
    logits = logits.astype(jnp.float32)
    ranked, ids = jax.lax.top_k(logits, n)
    return ids, ranked - jax.nn.logsumexp(logits, axis=1, keepdims=True)
