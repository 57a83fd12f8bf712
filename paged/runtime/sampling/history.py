"""Which tokens a row has already: what penalties ask."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def tokens_from(known: Int[Array, "rows width"], first: Int[Array, " rows"], vocab: int) -> Bool[Array, "rows vocab"]:
    """Which tokens of a vocabulary a row has from a place on.

    **Arguments:**

    - `known`: the tokens of each row, in order, and -1 past them.
    - `first`: the place of the first token that counts.
    - `vocab`: how many tokens there are.

    >>> tokens_from(jnp.array([[2, 0, -1]]), jnp.array([1]), vocab=3).tolist()
    [[True, False, False]]
    """
    place = jnp.arange(known.shape[1], dtype=jnp.int32)[None]
    counts = (known >= 0) & (place >= first[:, None])
    rows = jnp.arange(known.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros((known.shape[0], vocab), bool).at[rows, jnp.where(counts, known, vocab)].set(True, mode="drop")
