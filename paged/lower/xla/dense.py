"""Attention over dense keys and values, from the same program: for training, and for prompts that need no cache."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from paged.spec import AttentionSpec, AttentionState, Sinks, add_sinks, require_sinks, sinks_per_head

from ..program import Program


def dense_attention(
    spec: AttentionSpec,
    q: Float[Array, "batch tokens q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads value_dim"],
    sinks: Sinks | None = None,
) -> Float[Array, "batch tokens q_heads value_dim"]:
    """The spec's attention without pages: for training, and for prompts that need no cache.

    It computes what a paged layer computes from the same keys and values, up to rounding, and is differentiable.

    **Arguments:**

    - `spec`: the attention.
    - `q`: queries. Row ``i`` of ``n`` has the position ``length - n + i``: the last rows of the sequence.
    - `k`, `v`: keys and values of all positions, from 0 on.
    - `sinks`: one logit per query head, or several; needed if and only if the spec has ``sinks=True``.

    **Returns:** the output in the dtype of ``q``, 0 in rows that see no key. Gradients are finite there too. The
    softmax is in float32.

    Memory grows with ``tokens * length`` per head, since all scores are kept: it suits lengths of training.

    Raises ``ValueError`` or ``TypeError`` that names the argument whose shape or dtype does not fit.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, window=2)
    >>> q, kv = jnp.ones((1, 3, 4, 8)), jnp.ones((1, 3, 2, 8))
    >>> dense_attention(spec, q, kv, kv).shape
    (1, 3, 4, 8)
    """
    _require_dense(spec, q, k, v)
    require_sinks(spec, sinks)
    program = Program.from_spec(spec)
    batch, tokens, length = *q.shape[:2], k.shape[1]
    grouped = q.astype(jnp.float32).reshape(batch, tokens, spec.num_kv_heads, spec.group, spec.head_dim)
    s = program.scale * jnp.einsum("bthgd,bjhd->bhgtj", grouped, k.astype(jnp.float32), precision="highest")
    p = jnp.reshape(length - tokens + jnp.arange(tokens, dtype=jnp.int32), (1, 1, 1, -1, 1))
    j = jnp.reshape(jnp.arange(length, dtype=jnp.int32), (1, 1, 1, 1, -1))
    head = jnp.arange(spec.num_q_heads, dtype=jnp.int32).reshape(1, spec.num_kv_heads, spec.group, 1, 1)
    s = jnp.where(program.visible(p, j, length), program.apply_scores(s, p, j, head), -jnp.inf)
    top = jnp.max(s, axis=-1, keepdims=True, initial=-jnp.inf)
    weights = jnp.exp(s - jnp.where(jnp.isneginf(top), 0.0, top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    is_empty = total == 0
    total = jnp.where(is_empty, 1.0, total)
    out = jnp.einsum("bhgtj,bjhd->bthgd", weights / total, v.astype(jnp.float32), precision="highest")
    out = out.reshape(batch, tokens, spec.num_q_heads, v.shape[-1])
    if sinks is not None:
        lse = jnp.where(is_empty, -jnp.inf, jnp.log(total) + top)[..., 0]
        lse = jnp.moveaxis(lse.reshape(batch, spec.num_q_heads, tokens), 1, 2)
        out = add_sinks(AttentionState(out, lse), sinks_per_head(spec, sinks)).out
    return out.astype(q.dtype)


def _require_dense(spec: AttentionSpec, q: Array, k: Array, v: Array) -> None:
    if not isinstance(spec, AttentionSpec):
        raise TypeError(f"spec must be a paged.AttentionSpec; got {spec!r}.")
    heads = {"q": spec.num_q_heads, "k": spec.num_kv_heads, "v": spec.num_kv_heads}
    for name, array in (("q", q), ("k", k), ("v", v)):
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            raise TypeError(f"{name} must be an array; got {type(array).__name__}.")
        if array.ndim != 4 or array.shape[2] != heads[name] or (name != "v" and array.shape[3] != spec.head_dim):
            dim = "value_dim" if name == "v" else spec.head_dim
            raise ValueError(
                f"{name} must be [batch, tokens, heads, dim] = [*, *, {heads[name]}, {dim}] (from the spec); got "
                f"{array.shape}."
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point; got {array.dtype.name}.")
    if q.shape[0] != k.shape[0] or k.shape[:2] != v.shape[:2]:
        raise ValueError(f"q, k and v must agree on batch, and k and v on length; got {q.shape}, {k.shape}, {v.shape}.")
