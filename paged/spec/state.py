"""`AttentionState`: attention over a subset of the keys, and the law that joins two of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class AttentionState(NamedTuple):
    """Attention over some of the keys: its normalised output, and the log of its softmax's denominator.

    * ``out`` float[tokens, q_heads, value_dim], zero for an empty row.
    * ``lse`` float32[tokens, q_heads], the *natural* log of ``sum_j exp(s_j)``, ``-inf`` for an empty row.

    Split KV, shared prefixes and caches spread over devices are all one law, `merge`; its identity is
    ``(0, -inf)``.
    """

    out: Float[Array, "tokens q_heads value_dim"]
    lse: Float[Array, "tokens q_heads"]

    @classmethod
    def empty(cls, tokens: int, q_heads: int, value_dim: int, dtype: Any = jnp.float32) -> "AttentionState":
        """The state over no keys at all, ``(0, -inf)`` in every row: the identity of `merge`.

        **Arguments:**

        * ``tokens``, ``q_heads``, ``value_dim``: the shape of ``out``.
        * ``dtype``: the dtype of ``out``. ``lse`` is float32.

        >>> AttentionState.empty(tokens=1, q_heads=2, value_dim=4).lse.tolist()
        [[-inf, -inf]]
        """
        return cls(jnp.zeros((tokens, q_heads, value_dim), dtype), jnp.full((tokens, q_heads), -jnp.inf, jnp.float32))


def merge(a: AttentionState, b: AttentionState) -> AttentionState:
    """Attention over the union of two disjoint sets of keys, from the state over each.

    Two empty states merge to the empty state, without NaN, and all gradients are finite. The outputs are combined in
    float32 and returned in ``a``'s dtype; keep states in float32 when many are merged.
    Source: the online softmax of Milakov and Gimelshein, arXiv:1805.02867.

    >>> empty = AttentionState(jnp.zeros((1, 1, 2)), jnp.full((1, 1), -jnp.inf))
    >>> one = AttentionState(jnp.ones((1, 1, 2)), jnp.zeros((1, 1)))
    >>> merge(empty, one).out.tolist(), merge(empty, empty).lse.tolist()
    ([[[1.0, 1.0]]], [[-inf]])
    """
    if a.out.shape != b.out.shape or a.lse.shape != b.lse.shape:
        raise ValueError(f"merge needs states of one shape; got out {a.out.shape} and {b.out.shape}.")
    weight_a, weight_b, lse = _shares(a.lse, b.lse)
    out = weight_a[..., None] * a.out.astype(jnp.float32) + weight_b[..., None] * b.out.astype(jnp.float32)
    return AttentionState(out.astype(a.out.dtype), lse)


def merge_stacked(states: AttentionState) -> AttentionState:
    """`merge` of any number of float32 states at once, stacked on a leading axis."""
    top = jax.lax.stop_gradient(jnp.max(states.lse, axis=0))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    share = exp_minus(states.lse, top)
    total = jnp.sum(share, axis=0)
    is_empty = total == 0
    total = jnp.where(is_empty, 1.0, total)
    out = jnp.sum((share / total)[..., None] * states.out, axis=0)
    return AttentionState(out, jnp.where(is_empty, -jnp.inf, top + jnp.log(total)))


def add_sinks(state: AttentionState, sinks: Float[Array, " q_heads"]) -> AttentionState:
    """The state with one more logit a query head in the denominator: it takes weight and gives no value.

    An empty row keeps ``out = 0`` and gets ``lse = sink``. A sink enters once, after every merge.
    """
    sinks = jnp.broadcast_to(sinks.astype(jnp.float32), state.lse.shape)
    weight, _, lse = _shares(state.lse, sinks)
    out = weight[..., None] * state.out.astype(jnp.float32)
    return AttentionState(out.astype(state.out.dtype), lse)


def log_add_exp(a: Array, b: Array) -> Array:
    """``log(exp(a) + exp(b))``, with a finite gradient where one or both are ``-inf``."""
    return _shares(a, b)[2]


def _shares(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """``exp(a - lse)``, ``exp(b - lse)`` and ``lse = log(exp(a) + exp(b))``; two empty sets have shares of 0.

    The shares are quotients, which add up to 1 however large ``lse`` is: taken as exponentials of differences, they
    would have its rounding error, which at ``|lse| = 1000`` is 3e-5 of the output, and is everything in the limit.
    """
    top = jax.lax.stop_gradient(jnp.maximum(a, b))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    share_a, share_b = exp_minus(a, top), exp_minus(b, top)
    is_empty = share_a + share_b == 0
    total = jnp.where(is_empty, 1.0, share_a + share_b)
    return share_a / total, share_b / total, jnp.where(is_empty, -jnp.inf, top + jnp.log(total))


def exp_minus(a: Array, b: Array) -> Array:
    """``exp(a - b)``, exactly 0 with gradient 0 where ``a`` is ``-inf``, even if ``b`` is too."""
    is_empty = jnp.isneginf(a)
    difference = jnp.where(is_empty, 0.0, a) - jnp.where(is_empty, 0.0, b)
    return jnp.where(is_empty, 0.0, jnp.exp(difference))
