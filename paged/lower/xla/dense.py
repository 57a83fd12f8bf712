"""Attention over dense keys and values, from the same program: for training, and for prompts that need no cache."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from paged.spec import AttentionSpec, AttentionState, Given, Sinks, add_sinks, require_sinks, sinks_per_head

from ..program import Program


def dense_attention(
    spec: AttentionSpec,
    q: Float[Array, "batch tokens q_heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads value_dim"],
    sinks: Sinks | None = None,
    *,
    segments: Int[Array, "batch length"] | None = None,
    values: Mapping[str, Any] | None = None,
    mask: Bool[Array, "..."] | None = None,
    weight_factors: Float[Array, "batch q_heads tokens length"] | None = None,
) -> Float[Array, "batch tokens q_heads value_dim"]:
    """The spec's attention without pages: for training, and for prompts that need no cache.

    It computes what a paged layer computes from the same keys and values, up to rounding, and is differentiable.

    **Arguments:**

    - `spec`: the attention.
    - `q`: queries. Row ``i`` of ``n`` has the position ``length - n + i``: the last rows of the sequence.
    - `k`, `v`: keys and values of all positions, from 0 on.
    - `sinks`: one logit per query head, or several; needed if and only if the spec has ``sinks=True``.
    - `segments`: the document of each position, for documents that are packed into one row: any numbers, equal for the
      tokens of a document, which lie side by side. A token sees its own document alone, and masks and scores count
      positions from the document's first token. So the result is that of the documents apart.
    - `values`: what the spec names by `Value`: for each name [batch], or [batch, size] for a value with a size.
    - `mask`: which pairs of a query and a key may see each other, besides the spec's mask: bools [tokens, length], or
      [batch, heads, tokens, length] with ``heads`` the query heads or 1. A paged call has no such array, so the same
      rule belongs into the spec where the model is served.
    - `weight_factors`: what the weights are multiplied by after the softmax: 0 and ``1 / (1 - p)`` for a dropout.

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
    _require_brought(spec, k, segments, values)
    _require_pairs(spec, q, k, mask, weight_factors)
    program = Program.from_spec(spec).of_chains  # whole sequences have no drafts
    batch, tokens, length = *q.shape[:2], k.shape[1]
    grouped = q.astype(jnp.float32).reshape(batch, tokens, spec.num_kv_heads, spec.group, spec.head_dim)
    s = program.scale * jnp.einsum("bthgd,bjhd->bhgtj", grouped, k.astype(jnp.float32), precision="highest")
    p, j, is_seen = _positions(tokens, length, segments)
    head = jnp.arange(spec.num_q_heads, dtype=jnp.int32).reshape(1, spec.num_kv_heads, spec.group, 1, 1)
    given = Given(_numbers(spec, values or {}))
    is_seen &= program.visible(p, j, length, given._replace(head=head if program.has_heads else None))
    if mask is not None:
        is_seen &= _per_head(spec, mask if mask.ndim == 4 else mask[None, None])
    s = jnp.where(is_seen, program.apply_scores(s, p, j, head, given), -jnp.inf)
    top = jnp.max(s, axis=-1, keepdims=True, initial=-jnp.inf)
    weights = jnp.exp(s - jnp.where(jnp.isneginf(top), 0.0, top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    is_empty = total == 0
    total = jnp.where(is_empty, 1.0, total)
    weights = weights / total
    if weight_factors is not None:
        weights = weights * _per_head(spec, weight_factors.astype(jnp.float32))
    out = jnp.einsum("bhgtj,bjhd->bthgd", weights, v.astype(jnp.float32), precision="highest")
    out = out.reshape(batch, tokens, spec.num_q_heads, v.shape[-1])
    if sinks is not None:
        lse = jnp.where(is_empty, -jnp.inf, jnp.log(total) + top)[..., 0]
        lse = jnp.moveaxis(lse.reshape(batch, spec.num_q_heads, tokens), 1, 2)
        out = add_sinks(AttentionState(out, lse), sinks_per_head(spec, sinks)).out
    return out.astype(q.dtype)


def _positions(tokens: int, length: int, segments: Array | None) -> tuple[Array, Array, Array]:
    """Positions of queries and of keys, and which pairs are of one document; to broadcast against the scores."""
    j = jnp.arange(length, dtype=jnp.int32)[None]
    of_key = jnp.zeros_like(j)
    if segments is not None:
        is_first = jnp.pad(segments[:, 1:] != segments[:, :-1], [(0, 0), (1, 0)], constant_values=True)
        first = jax.lax.cummax(jnp.where(is_first, j, 0), axis=1)
        of_key, j = jnp.cumsum(is_first, axis=1, dtype=jnp.int32), j - first
    p = length - tokens + jnp.arange(tokens, dtype=jnp.int32)[None]
    of_query = jnp.zeros_like(p)
    if segments is not None:
        is_there, at = p >= 0, jnp.maximum(p, 0)[0]
        p, of_query = jnp.where(is_there, j[:, at], p), jnp.where(is_there, of_key[:, at], 0)
    p, j, of_query, of_key = (
        x[:, None, None, :, None] if is_query else x[:, None, None, None, :]
        for x, is_query in ((p, True), (j, False), (of_query, True), (of_key, False))
    )
    return p, j, of_query == of_key


def _per_head(spec: AttentionSpec, x: Array) -> Array:
    """``x`` [batch, q_heads or 1, tokens, length], to broadcast against the scores."""
    heads = (spec.num_kv_heads, spec.group) if x.shape[1] == spec.num_q_heads else (1, 1)
    return x.reshape(x.shape[0], *heads, *x.shape[2:])


def _numbers(spec: AttentionSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of each sequence, to broadcast against the scores. No gradient flows to them."""
    numbers: dict[str, Any] = {}
    for value in spec.values:
        x = jax.lax.stop_gradient(jnp.asarray(values[value.name], value.dtype))[:, None, None, None, None]
        numbers[value.name] = x if value.size is None else tuple(x[..., i] for i in range(value.size))
    return numbers


def _require_brought(spec: AttentionSpec, k: Array, segments: Any, values: Mapping[str, Any] | None) -> None:
    given, named = values or {}, {value.name: value for value in spec.values}
    if set(given) != set(named):
        raise ValueError(f"values must be {sorted(named)}, which the spec names; got {sorted(given)}.")
    for name, value in named.items():
        shape = (k.shape[0],) if value.size is None else (k.shape[0], value.size)
        if jnp.shape(given[name]) != shape:
            raise ValueError(
                f"values[{name!r}] must be [batch] or [batch, size] = {shape}; got {jnp.shape(given[name])}."
            )
    if segments is not None and (segments.shape != k.shape[:2] or not jnp.issubdtype(segments.dtype, jnp.integer)):
        raise ValueError(
            f"segments must be integers [batch, length] = {k.shape[:2]}; got {segments.dtype.name}{segments.shape}."
        )


def _require_pairs(spec: AttentionSpec, q: Array, k: Array, mask: Any, weight_factors: Any) -> None:
    pairs = (q.shape[1], k.shape[1])
    if weight_factors is not None and weight_factors.shape != (q.shape[0], spec.num_q_heads, *pairs):
        wanted = (q.shape[0], spec.num_q_heads, *pairs)
        raise ValueError(
            f"weight_factors must be [batch, q_heads, tokens, length] = {wanted}; got {weight_factors.shape}."
        )
    if mask is None:
        return
    if not hasattr(mask, "dtype") or mask.dtype != bool:
        raise TypeError(f"mask must be an array of bools, True where a query sees a key; got {mask!r}.")
    shapes = [pairs, *((q.shape[0], heads, *pairs) for heads in (1, spec.num_q_heads))]
    if mask.shape not in shapes:
        raise ValueError(
            f"mask must be [tokens, length] = {pairs}, or [batch, heads, tokens, length] = {shapes[-1]}, or with 1 for "
            f"heads; got {mask.shape}."
        )


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
