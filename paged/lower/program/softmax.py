"""Online softmax: attention over blocks of keys, one block after the other."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def exact_product(weights: Float[Array, "*heads rows keys"], v: Float[Array, "*heads keys dim"]) -> Array:
    """Weighted sums of values, in full float32."""
    return jnp.matmul(weights, v, precision="highest")


def update_maximum(
    top: Float[Array, "..."],
    block: Float[Array, "..."],
    exp: Callable[[Array], Array] = jnp.exp,
    *,
    is_finite: bool = False,
) -> tuple[Array, Array, Array]:
    """Take one more block into a running row maximum.

    **Arguments:**

    - `top`: the row maximum so far; ``-inf`` before any visible key.
    - `block`: the row maximum of the block.
    - `exp`: the exponential that weights are made with, such as ``jnp.exp2``.
    - `is_finite`: whether every row is known to see a key of the block.

    **Returns:** the new maximum; the number to subtract from scores before ``exp``; and the factor by which sums that
    are relative to the old maximum shrink.
    """
    new = jnp.maximum(top, block)
    # While a row has seen no key its maximum is -inf, and -inf minus -inf would be NaN.
    origin = new if is_finite else jnp.where(new == -jnp.inf, 0.0, new)
    return new, origin, exp(top - origin)


class Running(NamedTuple):
    """An online softmax over the blocks of keys so far, all float32.

    ``top`` is the row maximum of scores. ``total`` sums weights and ``values`` sums weighted values, both relative to
    that maximum. Leading axes, such as KV heads, are independent of each other.
    """

    top: Float[Array, "*heads rows 1"]
    total: Float[Array, "*heads rows 1"]
    values: Float[Array, "*heads rows dim"]

    @classmethod
    def start(cls, *heads_rows: int, dim: int) -> "Running":
        """The state before any block."""
        scalar = (*heads_rows, 1)
        f32 = jnp.float32
        return cls(jnp.full(scalar, -jnp.inf, f32), jnp.zeros(scalar, f32), jnp.zeros((*heads_rows, dim), f32))

    def step(self, s: Float[Array, "*heads rows keys"], v: Float[Array, "*heads keys dim"]) -> "Running":
        """Take in one more block: scores, ``-inf`` where invisible, and values, finite even where invisible."""
        running, weights = self.weigh(s)
        return running.add(weights, v)

    def weigh(self, s: Float[Array, "*heads rows keys"]) -> tuple["Running", Float[Array, "*heads rows keys"]]:
        """The first half of `step`: scores to weights. `add` takes the values, in any number of pieces.

        Source: the online softmax of Milakov and Gimelshein, arXiv:1805.02867.
        """
        top, origin, decay = update_maximum(self.top, jnp.max(s, axis=-1, keepdims=True))
        weights = jnp.exp(s - origin)
        total = decay * self.total + jnp.sum(weights, axis=-1, keepdims=True)
        return Running(top, total, decay * self.values), weights

    @classmethod
    def first(cls, s: Float[Array, "*heads rows keys"], dim: int) -> tuple["Running", Float[Array, "*heads rows keys"]]:
        """`weigh` for the first block of a row. It computes less, because no earlier sum decays."""
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
        """The second half of `step`: add values, weighted by what `weigh` returned for their keys.

        ``product(weights, v)`` sums over keys, in float32.
        """
        return self._replace(values=self.values + product(weights, v))

    def finish(self) -> tuple[Float[Array, "*heads rows dim"], Float[Array, "*heads rows 1"]]:
        """The normalised output and the natural log-sum-exp. A row that saw no key has ``(0, -inf)``."""
        out = self.values / jnp.where(self.total == 0, 1.0, self.total)
        return out, jnp.log(self.total) + self.top


def select_values(
    is_visible: Bool[Array, "... rows keys"], v: Float[Array, "kv_heads keys dim"]
) -> Float[Array, "kv_heads keys dim"]:
    """Values, with 0 for every key that no row sees. Such a value may be NaN, and a weight of 0 times NaN is NaN."""
    is_seen = jnp.broadcast_to(is_visible.any(axis=-2)[..., None], (*v.shape[:-1], 1))
    return jnp.where(is_seen, v, 0.0)
