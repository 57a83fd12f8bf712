"""`PagedAttention.dense`: whole sequences without pages, as ``eqx.nn.MultiheadAttention`` computes them."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from paged.lower import dense_attention

from ._heads import ProcessHeads, heads_of, output_of, require_inputs


def dense(
    layer: Any,
    query: Array,
    key_: Array | None,
    value: Array | None,
    mask: Array | None,
    *,
    key: PRNGKeyArray | None,
    inference: bool | None,
    process_heads: ProcessHeads | None,
    segments: Array | None,
    values: Mapping[str, Any] | None,
) -> Array:
    """See `PagedAttention.dense`."""
    inputs: Any = require_inputs(layer, query, key_, value, is_step=False)
    is_one = query.ndim == 2
    if is_one:
        inputs = tuple(x[None] for x in inputs)
        segments = None if segments is None else segments[None]
        values = None if values is None else {name: jnp.asarray(x)[None] for name, x in values.items()}
        mask = mask[None] if mask is not None and jnp.ndim(mask) == 3 else mask
    (batch, tokens, _), length = inputs[0].shape, inputs[1].shape[1]
    of_keys = jnp.arange(length, dtype=jnp.int32)
    of_rows = length - tokens + jnp.arange(tokens, dtype=jnp.int32)

    def project(inputs: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        return heads_of(layer, inputs, of_rows, of_keys, process_heads, is_step=False)

    keys = None if key is None else key[None] if is_one else jax.random.split(key, batch)
    how: dict[str, Any] = {"segments": segments, "values": values, "mask": mask}
    if _drops(layer.dropout, inference):
        how["weight_factors"] = _factors(layer.dropout, keys, (batch, layer.spec.num_q_heads, tokens, length))
    out = dense_attention(layer.spec, *jax.vmap(project)(inputs), layer.sinks, **how)
    out = jax.vmap(lambda out: output_of(layer, out))(out)
    return out[0] if is_one else out


def _drops(dropout: eqx.nn.Dropout | None, inference: bool | None) -> bool:
    if dropout is None or (isinstance(dropout.p, int | float) and dropout.p == 0):
        return False
    return not (dropout.inference if inference is None else inference)


def _factors(
    dropout: eqx.nn.Dropout, keys: Array | None, shape: tuple[int, int, int, int]
) -> Float[Array, "batch q_heads tokens length"]:
    """What a dropout multiplies weights by: for each sequence drawn as ``MultiheadAttention`` draws it."""
    ones = jnp.ones(shape[2:], jnp.float32)
    if keys is None:
        return dropout(ones, inference=False)  # which says that a key is missing
    of_head = jax.vmap(lambda key: dropout(ones, key=key, inference=False))
    return jax.vmap(lambda key: of_head(jax.random.split(key, shape[1])))(keys)
