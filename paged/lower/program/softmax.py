"""Online softmax: attention over a stream of key blocks, one step at a time."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def exact_product(weights: Float[Array, "*heads rows keys"], v: Float[Array, "*heads keys dim"]) -> Array:
    """Weighted sums of values, in full float32."""
    return jnp.matmul(weights, v, precision="highest")


def raise_top(
    top: Float[Array, "..."],
    block: Float[Array, "..."],
    exp: Callable[[Array], Array] = jnp.exp,
    *,
    is_finite: bool = False,
) -> tuple[Array, Array, Array]:
    """The row maximum after a block whose own is ``block``; what to take from scores before ``exp``; and the factor by
    which sums relative to the old maximum shrink. ``is_finite`` where every row sees a key of the block."""
    new = jnp.maximum(top, block)
    # While a row has seen no key its maximum is -inf, and -inf minus -inf would be NaN.
    origin = new if is_finite else jnp.where(new == -jnp.inf, 0.0, new)
    return new, origin, exp(top - origin)


class Running(NamedTuple):
    """The softmax of the blocks seen so far: the row maximum, and the sums of weights and of weighted values, both
    relative to that maximum. All float32. Leading axes, such as KV heads, go side by side."""

    top: Float[Array, "*heads rows 1"]
    total: Float[Array, "*heads rows 1"]
    values: Float[Array, "*heads rows dim"]

    @classmethod
    def start(cls, *heads_rows: int, dim: int) -> "Running":
        """Of no block at all."""
        scalar = (*heads_rows, 1)
        f32 = jnp.float32
        return cls(jnp.full(scalar, -jnp.inf, f32), jnp.zeros(scalar, f32), jnp.zeros((*heads_rows, dim), f32))

    def step(self, s: Float[Array, "*heads rows keys"], v: Float[Array, "*heads keys dim"]) -> "Running":
        """Take in one more block of scores, ``-inf`` where invisible, and its values, finite there."""
        running, weights = self.weigh(s)
        return running.add(weights, v)

    def weigh(self, s: Float[Array, "*heads rows keys"]) -> tuple["Running", Float[Array, "*heads rows keys"]]:
        """The first half of `step`: scores to weights. Their values are still to be added, in any number of parts.

        Source: the online softmax of Milakov and Gimelshein, arXiv:1805.02867.
        """
        top, origin, decay = raise_top(self.top, jnp.max(s, axis=-1, keepdims=True))
        weights = jnp.exp(s - origin)
        total = decay * self.total + jnp.sum(weights, axis=-1, keepdims=True)
        return Running(top, total, decay * self.values), weights

    @classmethod
    def first(cls, s: Float[Array, "*heads rows keys"], dim: int) -> tuple["Running", Float[Array, "*heads rows keys"]]:
        """`weigh` for the first block, with less to compute: nothing decays."""
        top = jnp.max(s, axis=-1, keepdims=True)
        weights = jnp.exp(s - jnp.where(top == -jnp.inf, 0.0, top))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        return cls(top, total, jnp.zeros((*s.shape[:-1], dim), jnp.float32)), weights

    def add(
        self,
        weights: Float[Array, "*heads rows keys"],
        v: Float[Array, "*heads keys dim"],
        product: Callable[[Array, Array], Array] = exact_product,
    ) -> "Running":
        """The second half of `step`: take in values with the weights that `weigh` gave their keys.

        ``product(weights, v)`` sums over keys, in float32.
        """
        return self._replace(values=self.values + product(weights, v))

    def finish(self) -> tuple[Float[Array, "*heads rows dim"], Float[Array, "*heads rows 1"]]:
        """The normalised output and the natural log-sum-exp: ``(0, -inf)`` for a row that saw no key."""
        out = self.values / jnp.where(self.total == 0, 1.0, self.total)
        return out, jnp.log(self.total) + self.top


def select_values(
    is_visible: Bool[Array, "... rows keys"], v: Float[Array, "kv_heads keys dim"]
) -> Float[Array, "kv_heads keys dim"]:
    """Values with 0 for every key that no row sees: a weight of 0 does not silence a NaN, a selection does."""
    is_seen = jnp.broadcast_to(is_visible.any(axis=-2)[..., None], (*v.shape[:-1], 1))
    return jnp.where(is_seen, v, 0.0)
