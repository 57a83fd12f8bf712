"""From features to the heads of queries, keys and values, and back: what `PagedAttention` does around attention."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float, Int

ProcessHeads = Callable[..., tuple[Array, Array, Array]]

_NO_POSITIONS = """process_heads needs an argument `positions` where the layer serves: a step may begin at any position.
    wrong: def process_heads(q, k, v): ...              such as eqx.nn.RotaryPositionalEmbedding, which begins at 0
    right: def process_heads(q, k, v, positions): ...   or rotary=paged.runtime.Rotary(head_dim) for the layer"""


def heads_of(
    layer: Any,
    inputs: tuple[Array, Array, Array],
    of_rows: Int[Array, " tokens"],
    of_keys: Int[Array, " length"],
    process_heads: ProcessHeads | None,
    *,
    is_step: bool,
) -> tuple[Array, Array, Array]:
    """Queries, keys and values of one sequence, or of the rows of a step, from what they are made of."""
    query, key_, value = inputs
    q, k, v = queries_of(layer, query, of_rows), keys_of(layer, key_, of_keys), values_of(layer, value)
    if process_heads is None:
        return q, k, v
    if layer.rotary is not None:
        raise ValueError(
            "process_heads in a layer with rotary= could turn queries and keys twice: leave out process_heads, which "
            "rotary= replaces, or make the layer without rotary=."
        )
    has_positions = "positions" in inspect.signature(process_heads).parameters
    if is_step and not has_positions:
        raise ValueError(_NO_POSITIONS)
    if has_positions and q.shape[0] != k.shape[0]:
        raise ValueError(f"process_heads with positions needs as many queries as keys; got {q.shape[0]}, {k.shape[0]}.")
    new = process_heads(q, k, v, positions=of_keys) if has_positions else process_heads(q, k, v)
    if [x.shape for x in new] != [x.shape for x in (q, k, v)]:
        raise ValueError("process_heads must not change the shape of the heads.")
    return new


def queries_of(layer: Any, x: Float[Array, "tokens size"], positions: Int[Array, " tokens"]) -> Array:
    """Queries [tokens, q_heads, head_dim]: projected, normalised and turned."""
    q = _split(layer.query_proj, x, layer.spec.num_q_heads)
    q = q if layer.query_norm is None else jax.vmap(jax.vmap(layer.query_norm))(q)
    return q if layer.rotary is None else layer.rotary(q, positions)


def keys_of(layer: Any, x: Float[Array, "tokens size"], positions: Int[Array, " tokens"]) -> Array:
    """Keys [tokens, kv_heads, head_dim]: projected, normalised and turned."""
    k = _split(layer.key_proj, x, layer.spec.num_kv_heads)
    k = k if layer.key_norm is None else jax.vmap(jax.vmap(layer.key_norm))(k)
    return k if layer.rotary is None else layer.rotary(k, positions)


def values_of(layer: Any, x: Float[Array, "tokens size"]) -> Array:
    """Values [tokens, kv_heads, value_dim]."""
    return _split(layer.value_proj, x, layer.spec.num_kv_heads)


def output_of(layer: Any, out: Float[Array, "tokens q_heads value_dim"]) -> Array:
    """What the output projection makes of all heads."""
    return jax.vmap(layer.output_proj)(out.reshape(out.shape[0], -1))


def _split(proj: Any, x: Array, heads: int) -> Array:
    return jax.vmap(proj)(x).reshape(x.shape[0], heads, -1)


def require_inputs(layer: Any, query: Any, key_: Any, value: Any, *, is_step: bool) -> tuple[Array, Array, Array]:
    """What queries, keys and values are made of, with the defaults for those that are not given, of right shapes."""
    key_ = query if key_ is None else key_
    value = key_ if value is None else value
    inputs = {"x" if is_step else "query": query, "key_": key_, "value": value}
    require_sizes(inputs, layer.input_sizes, (2,) if is_step else (2, 3))
    if key_.shape[:-1] != value.shape[:-1] or query.shape[:-2] != key_.shape[:-2]:
        raise ValueError(f"key_ and value must be equally long; got {key_.shape} and {value.shape} for {query.shape}.")
    if is_step and key_.shape[0] != query.shape[0]:
        raise ValueError(f"key_ and value must have a row for each row of x, {query.shape[0]}; got {key_.shape[0]}.")
    return query, key_, value


def require_sizes(arrays: Mapping[str, Any], sizes: Sequence[int], ranks: tuple[int, ...] = (2,)) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless each array is [tokens, features] or a batch, of its own size."""
    rank = None
    for (name, x), size in zip(arrays.items(), sizes, strict=False):
        shape = getattr(x, "shape", None)
        if shape is None:
            raise TypeError(f"{name} must be an array; got {type(x).__name__}.")
        rank = len(shape) if rank is None else rank
        if rank not in ranks or len(shape) != rank or shape[-1] != size:
            forms = {2: f"[tokens, {size}]", 3: f"[batch, tokens, {size}]"}
            raise ValueError(f"{name} must be {' or '.join(forms[rank] for rank in ranks)}; got {shape}.")
