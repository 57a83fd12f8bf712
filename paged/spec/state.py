"""`AttentionState`: attention over some of the keys, and `merge`, which joins two states into one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class AttentionState(NamedTuple):
    """Attention over some of the keys: the normalised output, and the logarithm of the softmax's denominator.

    - `out` float[tokens, q_heads, value_dim]: 0 in an empty row.
    - `lse` float32[tokens, q_heads]: the *natural* logarithm of ``sum_j exp(s_j)``; ``-inf`` in an empty row. In states
      of other libraries ``+inf`` also marks an empty row: see `merge`.

    `merge` joins states over disjoint keys. Split KV, shared prefixes and caches spread over devices use it.
    """

    out: Float[Array, "tokens q_heads value_dim"]
    lse: Float[Array, "tokens q_heads"]

    @classmethod
    def empty(cls, tokens: Any, q_heads: int, value_dim: int, dtype: Any = jnp.float32) -> "AttentionState":
        """The state over no keys: ``(0, -inf)`` in every row. Merging it into another state changes nothing.

        **Arguments:**

        - `tokens`, `q_heads`, `value_dim`: the shape of ``out``.
        - `dtype`: the dtype of ``out``. ``lse`` is float32.

        >>> AttentionState.empty(tokens=1, q_heads=2, value_dim=4).lse.tolist()
        [[-inf, -inf]]
        """
        return cls(jnp.zeros((tokens, q_heads, value_dim), dtype), jnp.full((tokens, q_heads), -jnp.inf, jnp.float32))


def merge(a: AttentionState, b: AttentionState) -> AttentionState:
    """Attention over the union of two disjoint sets of keys, from the state over each set.

    ``lse = log(exp(lse_a) + exp(lse_b))`` and ``out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b``, computed
    in float32. Source: the online softmax of Milakov and Gimelshein, arXiv:1805.02867.

    **Arguments:**

    - `a`, `b`: states of one shape. Keep them in float32 when many are merged. Sinks must not be in them: add sinks
      once, after the last merge.

    A row is empty where its ``lse`` is ``-inf``, or ``+inf`` as some kernels write there. The lowerings of this package
    never give ``+inf``. The output of an empty row is not read, so it may be NaN.

    **Returns:** the merged state, its output in the dtype of ``a.out``. A row that is empty in one state is the other
    state's row. Two empty rows merge to ``(0, -inf)``. All gradients are finite; an empty row has none.

    **Raises:** ``TypeError`` for what is no `AttentionState` of floats, ``ValueError`` for states of different shapes.

    >>> empty = AttentionState(jnp.zeros((1, 1, 2)), jnp.full((1, 1), -jnp.inf))
    >>> one = AttentionState(jnp.ones((1, 1, 2)), jnp.zeros((1, 1)))
    >>> merge(empty, one).out.tolist(), merge(empty, empty).lse.tolist()
    ([[[1.0, 1.0]]], [[-inf]])
    """
    _require_state("a", a)
    _require_state("b", b)
    if a.out.shape != b.out.shape or a.lse.shape != b.lse.shape:
        raise ValueError(f"merge needs states of one shape; got out {a.out.shape} and {b.out.shape}.")
    a, b = _without_empty_rows(a), _without_empty_rows(b)
    weight_a, weight_b, lse = _shares(a.lse, b.lse)
    out = weight_a[..., None] * a.out.astype(jnp.float32) + weight_b[..., None] * b.out.astype(jnp.float32)
    return AttentionState(out.astype(a.out.dtype), lse)


def merge_stacked(states: AttentionState) -> AttentionState:
    """Merge any number of float32 states at once.

    **Arguments:**

    - `states`: a state whose arrays have a leading axis of states. Empty rows are as in `merge`.

    **Returns:** the merged state, without that axis.

    **Raises:** ``TypeError`` for what is no `AttentionState` of floats, ``ValueError`` for arrays of other ranks.

    >>> states = AttentionState(jnp.array([[[[1.0]]], [[[3.0]]]]), jnp.zeros((2, 1, 1)))
    >>> merge_stacked(states).out.tolist()
    [[[2.0]]]
    """
    _require_state("states", states)
    if states.lse.ndim < 1 or not states.lse.shape[0]:
        raise ValueError(f"states must have a leading axis of at least one state; got lse of shape {states.lse.shape}.")
    states = _without_empty_rows(states)
    top = jax.lax.stop_gradient(jnp.max(states.lse, axis=0, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    share = exp_minus(states.lse, top)
    total = jnp.sum(share, axis=0, keepdims=True)
    is_empty = total == 0
    total = jnp.where(is_empty, 1.0, total)
    out = jnp.sum((share / total)[..., None] * states.out, axis=0)
    return AttentionState(out, jnp.where(is_empty, -jnp.inf, top + jnp.log(total))[0])


def add_sinks(state: AttentionState, sinks: Float[Array, " q_heads"]) -> AttentionState:
    """The state with one more logit per query head in the denominator. A sink takes weight and has no value.

    **Arguments:**

    - `state`: the state over all keys. A sink enters once: add it after the last merge. Empty rows are as in `merge`.
    - `sinks`: float[q_heads], see `sinks_per_head`.

    **Returns:** the state with sinks. An empty row keeps ``out = 0`` and has ``lse = sink``.

    >>> state = AttentionState(jnp.ones((1, 1, 2)), jnp.zeros((1, 1)))
    >>> add_sinks(state, jnp.zeros(1)).out.tolist()
    [[[0.5, 0.5]]]
    """
    state = _without_empty_rows(state)
    # In the dtype of the log-sum-exp: float32, and float64 in a reference of float64.
    sinks = jnp.broadcast_to(sinks.astype(state.lse.dtype), state.lse.shape)
    weight, _, lse = _shares(state.lse, sinks)
    out = weight[..., None] * state.out.astype(state.lse.dtype)
    return AttentionState(out.astype(state.out.dtype), lse)


def _require_state(name: str, state: Any) -> None:
    if not isinstance(state, AttentionState) or not all(hasattr(x, "shape") and hasattr(x, "dtype") for x in state):
        raise TypeError(f"{name} must be an AttentionState of two arrays, out and lse; got {type(state).__name__}.")
    for part, x in zip(state._fields, state, strict=True):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name}.{part} must be floating point; got {x.dtype.name}.")
    if state.out.shape[:-1] != state.lse.shape:
        raise ValueError(
            f"{name}.lse must have the shape of {name}.out without its last axis, {state.out.shape[:-1]}; got "
            f"{state.lse.shape}."
        )


def _without_empty_rows(state: AttentionState) -> AttentionState:
    """The state with ``(0, -inf)`` in its empty rows. A weight of 0 would not remove a NaN: 0 times NaN is NaN."""
    is_empty = jnp.isinf(state.lse)
    return AttentionState(jnp.where(is_empty[..., None], 0, state.out), jnp.where(is_empty, -jnp.inf, state.lse))


def log_add_exp(a: Array, b: Array) -> Array:
    """``log(exp(a) + exp(b))``, elementwise. Gradients are finite where ``a``, ``b`` or both are ``-inf``.

    >>> float(log_add_exp(jnp.float32(-jnp.inf), jnp.float32(2.0)))
    2.0
    """
    return _shares(a, b)[2]


def _shares(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """``exp(a - lse)``, ``exp(b - lse)`` and ``lse = log(exp(a) + exp(b))``. Two empty sets have shares of 0.

    The shares are computed as quotients, so that they add up to 1 whatever ``lse`` is. Computed as ``exp(a - lse)``,
    they would have the rounding error of ``lse``: 3e-5 of the output at ``|lse| = 1000``, and more at larger ones.
    """
    top = jax.lax.stop_gradient(jnp.maximum(a, b))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    share_a, share_b = exp_minus(a, top), exp_minus(b, top)
    is_empty = share_a + share_b == 0
    total = jnp.where(is_empty, 1.0, share_a + share_b)
    return share_a / total, share_b / total, jnp.where(is_empty, -jnp.inf, top + jnp.log(total))


def exp_minus(a: Array, b: Array) -> Array:
    """``exp(a - b)``, elementwise. Where ``a`` is ``-inf`` it is 0 with gradient 0, even if ``b`` is ``-inf`` too.

    >>> float(exp_minus(jnp.float32(-jnp.inf), jnp.float32(-jnp.inf)))
    0.0
    """
    is_empty = jnp.isneginf(a)
    difference = jnp.where(is_empty, 0.0, a) - jnp.where(is_empty, 0.0, b)
    return jnp.where(is_empty, 0.0, jnp.exp(difference))
