"""A decoder of SmolLM-135M's shape, whose layers are a list or a `LayerStack`."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from paged.runtime import LayerStack, PagedAttention, Rotary
from paged.spec import AttentionSpec, PageLayout, RaggedBatch

WIDTH, HIDDEN, PAGE_SIZE = 576, 1536, 16
SPEC = AttentionSpec(num_q_heads=9, num_kv_heads=3, head_dim=64)


class Block(eqx.Module):
    """Pre-norm attention and a gated perceptron, each with a residual."""

    attention_norm: eqx.nn.RMSNorm
    attention: PagedAttention
    mlp_norm: eqx.nn.RMSNorm
    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, num_pages: int, dtype: Any, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        layout = PageLayout(page_size=PAGE_SIZE, num_kv_heads=SPEC.num_kv_heads, head_dim=SPEC.head_dim, dtype=dtype)
        self.attention = PagedAttention(
            SPEC, layout, num_pages, WIDTH, rotary=Rotary(SPEC.head_dim), check=False, dtype=dtype, key=keys[0]
        )
        self.attention_norm, self.mlp_norm = (eqx.nn.RMSNorm(WIDTH, use_bias=False, dtype=dtype) for _ in range(2))
        self.gate = eqx.nn.Linear(WIDTH, HIDDEN, use_bias=False, dtype=dtype, key=keys[1])
        self.up = eqx.nn.Linear(WIDTH, HIDDEN, use_bias=False, dtype=dtype, key=keys[2])
        self.down = eqx.nn.Linear(HIDDEN, WIDTH, use_bias=False, dtype=dtype, key=keys[3])

    def __call__(
        self, x: Float[Array, "tokens width"], batch: RaggedBatch, state: eqx.nn.State
    ) -> tuple[Float[Array, "tokens width"], eqx.nn.State]:
        y, state = self.attention(jax.vmap(self.attention_norm)(x), batch, state)
        return self._mlp(x + y), state

    def dense(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        x = x + self.attention.dense(jax.vmap(jax.vmap(self.attention_norm))(x))
        return jax.vmap(self._mlp)(x)

    def _mlp(self, x: Float[Array, "tokens width"]) -> Float[Array, "tokens width"]:
        def one(token: Array) -> Array:
            token = self.mlp_norm(token)
            return self.down(jax.nn.silu(self.gate(token)) * self.up(token))

        return x + jax.vmap(one)(x)


class Listed(eqx.Module):
    """The layers one after the other in Python."""

    layers: list[Block]

    def __init__(self, layers: list[Block]):
        self.layers = layers

    def __call__(self, x: Array, batch: RaggedBatch, state: eqx.nn.State) -> tuple[Array, eqx.nn.State]:
        for layer in self.layers:
            x, state = layer(x, batch, state)
        return x, state

    def dense(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer.dense(x)
        return x


def model(how: str, num_layers: int, num_pages: int, dtype: Any) -> tuple[Any, eqx.nn.State]:
    """The layers as a ``"list"``, a ``"stack"`` or a stack ``"apart"``, with the same parameters, and their state."""
    keys = jax.random.split(jax.random.key(0), num_layers)

    def listed() -> Listed:
        return Listed([Block(num_pages, dtype, key) for key in keys])

    def stacked() -> LayerStack:
        return LayerStack.make(lambda key: Block(num_pages, dtype, key), keys)

    layers, state = eqx.nn.make_with_state(listed if how == "list" else stacked)()
    return (layers.apart() if isinstance(layers, LayerStack) and how == "apart" else layers), state


def inputs(slots: int, rows: int, length: int, dtype: Any) -> tuple[Array, RaggedBatch, int]:
    """Features and a batch of ``slots`` sequences of ``rows`` rows each, and how many pages they need."""
    per_seq = -(-length // PAGE_SIZE)
    tables = jax.random.permutation(jax.random.key(1), slots * per_seq).astype(jnp.int32).reshape(slots, per_seq)
    batch = RaggedBatch.decode(jnp.full(slots, length, jnp.int32), tables, query_rows=rows)
    return jax.random.normal(jax.random.key(2), (slots * rows, WIDTH), dtype), batch, slots * per_seq
