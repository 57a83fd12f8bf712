"""The parts of a `Decoder`: small Equinox modules that are called with rows of features."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from paged.lower import MULTIPLIES_WHILE_READING, Step, dense_attention
from paged.runtime import PagedCache, Rotary
from paged.spec import PageLayout

from .config import Config, LayerConfig
from .experts import Experts, draw

_ACTIVATIONS: Mapping[str, Any] = MappingProxyType(
    {
        "silu": jax.nn.silu,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_pytorch_tanh": jax.nn.gelu,
        "relu": jax.nn.relu,
    }
)


class RMSNorm(eqx.Module):
    """Features divided by the root of their mean square, in float32, times weights (arXiv:1910.07467).

    `offset` is added to the stored weights: 1 in Gemma's models, whose weights are stored as differences from 1.
    """

    weight: Float[Array, " features"]
    eps: float = eqx.field(static=True)
    offset: float = eqx.field(static=True)

    def __init__(self, size: int, config: Config, dtype: Any):
        self.weight = jnp.full(size, 1.0 - config.norm_offset, dtype)
        self.eps, self.offset = config.norm_eps, config.norm_offset

    def __call__(self, x: Float[Array, "*rows features"]) -> Float[Array, "*rows features"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        leading = (1,) * (x.ndim - 1)
        if self.offset:
            weight = self.weight.astype(jnp.float32) + self.offset
            return (wide * weight.reshape(*leading, -1)).astype(x.dtype)
        return self.weight.astype(x.dtype).reshape(*leading, -1) * wide.astype(x.dtype)


def product(
    x: Float[Array, "*rows features"], weight: Float[Array, "*outputs features"]
) -> Float[Array, "*rows_and_outputs"]:
    """Each row of ``x`` times each row of ``weight``.

    With few rows XLA:CPU multiplies faster where the weight comes first (measured for 16 rows and SmolLM2-135M's
    weights, on one core: 96 against 72 GFLOP/s). So there the weight comes first, and the result is transposed, which
    is small. With many rows of float32 they come first (72 rows: 163 against 134 GFLOP/s).

    For one row the product takes as long as it takes to read the weight. A weight that is a part of a stack is copied
    before XLA:CPU multiplies with it, unless it multiplies while it reads. It does so for one row that is short, and a
    weight that is transposed (`MULTIPLIES_WHILE_READING`). Of a longer row it would make a transposed copy.
    """
    rows = x.size // x.shape[-1]  # symbolic in an exported program
    has_many_rows = isinstance(rows, int) and rows >= _MANY_ROWS and x.dtype == jnp.float32
    is_short = x.size == x.shape[-1] and x.size * weight.dtype.itemsize < _SHORT_ROW and weight.ndim == 2

    def weight_first(x: Array, weight: Array) -> Array:
        y = jax.lax.dot_general(weight, x, (((weight.ndim - 1,), (x.ndim - 1,)), ((), ())))
        y = jax.lax.optimization_barrier(y)  # or XLA would see that the rows could come first
        outputs, rows = range(weight.ndim - 1), range(weight.ndim - 1, y.ndim)
        return jnp.transpose(y, (*rows, *outputs))

    def one_row(x: Array, weight: Array) -> Array:
        x = jax.lax.optimization_barrier(x)  # or what makes it would be computed again for every output
        return x @ weight.T

    def rows_first(x: Array, weight: Array) -> Array:
        return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (weight.ndim - 1,)), ((), ())))

    few_rows = one_row if is_short and MULTIPLIES_WHILE_READING else weight_first
    on_cpu = rows_first if has_many_rows else few_rows
    return jax.lax.platform_dependent(x, weight, cpu=on_cpu, default=rows_first)


_SHORT_ROW = 16 * 1024  # bytes: XLA:CPU's own limit
_MANY_ROWS = 48  # with so many both orders take as long


class Projection(eqx.Module):
    """A linear map, whose outputs may have several axes: ``weight`` is [*outputs, features].

    A checkpoint's matrix [outputs, features] is such a weight as it is. Axes of the outputs let one product serve
    several purposes, and let a mesh share out the one that counts KV heads.

    XLA multiplies with a matrix. Of a weight of more axes XLA:CPU makes one in every call, transposed: a decode step of
    SmolLM2-135M took 2.5 times as long (measured). So the axes of the outputs are one while it multiplies: unless a
    mesh shares out an inner one of them (``is_matrix = False``), which would then have to be gathered.
    """

    weight: Float[Array, "*outputs features"]
    bias: Float[Array, "*outputs"] | None
    is_matrix: bool = eqx.field(static=True)

    def __init__(
        self,
        outputs: tuple[int, ...],
        features: int,
        has_bias: bool,
        dtype: Any,
        key: PRNGKeyArray,
        is_matrix: bool = True,
    ):
        self.weight = draw(key, (*outputs, features), dtype)
        self.bias = jnp.zeros(outputs, dtype) if has_bias else None
        self.is_matrix = is_matrix

    def __call__(self, x: Float[Array, "*rows features"]) -> Float[Array, "*rows_and_outputs"]:
        outputs, features = self.weight.shape[:-1], self.weight.shape[-1]
        weight = self.weight.astype(x.dtype)
        weight = weight.reshape(-1, features) if self.is_matrix else weight
        return self.with_bias(product(x, weight).reshape(*x.shape[:-1], *outputs))

    def with_bias(self, y: Float[Array, "*rows_and_outputs"]) -> Float[Array, "*rows_and_outputs"]:
        """``y`` and the bias, if there is one."""
        if self.bias is None:
            return y
        return y + self.bias.astype(y.dtype).reshape((1,) * (y.ndim - self.bias.ndim) + self.bias.shape)


class TurnedProjection(eqx.Module):
    """A `Projection` of float32 whose weight is [features, outputs], to serve on a CPU: all rows come first.

    With XLA:CPU no number of rows is slower than in the other layout. There 8 rows take up to 1.4 times as long with
    JAX 0.12, and 40 rows 1.25 times with JAX 0.10 (measured, SmolLM2-135M's layers on one core).
    """

    weight: Float[Array, "*layers features outputs"]
    plain: Projection  # without its weight
    outputs: tuple[int, ...] = eqx.field(static=True)

    @classmethod
    def of(cls, stack: Any) -> Any:
        """A projection of stacked layers, turned if it is one of float32; anything else as it is."""
        if not isinstance(stack, Projection) or not stack.is_matrix or stack.weight.dtype != jnp.float32:
            return stack
        layers, *outputs, features = stack.weight.shape
        weight = jnp.swapaxes(stack.weight.reshape(layers, -1, features), 1, 2)
        return cls(weight, eqx.tree_at(lambda plain: plain.weight, stack, None), tuple(outputs))

    def back(self) -> Projection:
        """The projection of stacked layers from which this one was made."""
        layers, features, _ = self.weight.shape
        weight = jnp.swapaxes(self.weight, 1, 2).reshape(layers, *self.outputs, features)
        return eqx.tree_at(lambda plain: plain.weight, self.plain, weight, is_leaf=lambda x: x is None)

    def __call__(self, x: Float[Array, "*rows features"]) -> Float[Array, "*rows_and_outputs"]:
        y = jax.lax.dot_general(x, self.weight.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))
        return self.plain.with_bias(y.reshape(*x.shape[:-1], *self.outputs))


class Attention(eqx.Module):
    """Queries, keys and values by one product, pages, and the output projection.

    The product's outputs are ordered by KV head: for each, its query heads, its key, its value.
    """

    qkv_proj: Projection  # [kv_heads, group + 2, head_dim]
    o_proj: Projection
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    sinks: Float[Array, " q_heads"] | None
    rotary: Rotary | None
    cache: PagedCache

    def __init__(
        self, config: Config, layer: LayerConfig, layout: PageLayout, num_pages: int, how: Any, dtype: Any, key: Any
    ):
        spec, keys = config.spec(layer), jax.random.split(key, 2)
        heads = spec.num_kv_heads, spec.group + 2, spec.head_dim
        self.qkv_proj = Projection(heads, config.hidden_size, config.has_qkv_bias, dtype, keys[0])
        features = spec.num_q_heads * spec.head_dim
        self.o_proj = Projection((config.hidden_size,), features, config.has_output_bias, dtype, keys[1])
        self.q_norm = RMSNorm(spec.head_dim, config, dtype) if config.has_qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, config, dtype) if config.has_qk_norm else None
        self.sinks = jnp.zeros(spec.num_q_heads, dtype) if spec.sinks else None
        self.rotary = layer.rotary
        self.cache = PagedCache(spec, layout, num_pages, **how)

    def project(self, x: Float[Array, "tokens features"], positions: Int[Array, " tokens"]) -> tuple[Array, ...]:
        """Queries [tokens, q_heads, head_dim], keys and values [tokens, kv_heads, head_dim], as pages hold them."""
        spec = self.cache.attend.spec
        qkv = self.qkv_proj(x)
        q = qkv[:, :, : spec.group].reshape(x.shape[0], spec.num_q_heads, spec.head_dim)
        k, v = qkv[:, :, spec.group], qkv[:, :, spec.group + 1]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        return q, k, v

    def __call__(
        self, x: Float[Array, "tokens features"], batch: Step, state: eqx.nn.State
    ) -> tuple[Float[Array, "tokens features"], eqx.nn.State]:
        q, k, v = self.project(x, self.cache.positions(batch, x.shape[0]))
        out, state = self.cache(q, k, v, batch, state, self.sinks)
        return self.o_proj(out.reshape(x.shape[0], -1)), state

    def dense(self, x: Float[Array, "batch tokens features"]) -> Float[Array, "batch tokens features"]:
        """Whole sequences, without pages."""
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)
        q, k, v = jax.vmap(lambda row: self.project(row, positions))(x)
        out = dense_attention(self.cache.attend.spec, q, k, v, self.sinks)
        return self.o_proj(out.reshape(*x.shape[:2], -1))


class MLP(eqx.Module):
    """A gated perceptron, with the gate and what it gates by one product (arXiv:2002.05202)."""

    gate_up_proj: Projection  # [2, intermediate_size]
    down_proj: Projection
    activation: str = eqx.field(static=True)

    def __init__(self, config: Config, is_shared: bool, dtype: Any, key: PRNGKeyArray):
        up, down = jax.random.split(key, 2)
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Projection((2, inner), size, config.has_mlp_bias, dtype, up, is_matrix=not is_shared)
        self.down_proj = Projection((size,), inner, config.has_mlp_bias, dtype, down)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "*rows features"]) -> Float[Array, "*rows features"]:
        both = self.gate_up_proj(x)
        return self.down_proj(_ACTIVATIONS[self.activation](both[..., 0, :]) * both[..., 1, :])


class DecoderLayer(eqx.Module):
    """Attention and a perceptron, each with a residual, with norms before them, and after them in Gemma's models.

    The norms have the names that checkpoints have for them. Without norms after, ``post_attention_layernorm`` is the
    one before the perceptron.
    """

    input_layernorm: RMSNorm
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    pre_feedforward_layernorm: RMSNorm | None
    mlp: MLP | Experts
    post_feedforward_layernorm: RMSNorm | None

    def __init__(
        self, config: Config, layer: LayerConfig, layout: PageLayout, num_pages: int, how: Any, dtype: Any, key: Any
    ):
        attention, mlp = jax.random.split(key, 2)
        norm = lambda: RMSNorm(config.hidden_size, config, dtype)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm = norm() if config.has_four_norms else None
        self.post_feedforward_layernorm = norm() if config.has_four_norms else None
        self.self_attn = Attention(config, layer, layout, num_pages, how, dtype, attention)
        is_shared = how["mesh"] is not None
        self.mlp = MLP(config, is_shared, dtype, mlp) if config.experts is None else Experts(config, dtype, mlp)

    def __call__(
        self, x: Float[Array, "tokens features"], batch: Step, state: eqx.nn.State
    ) -> tuple[Float[Array, "tokens features"], eqx.nn.State]:
        y, state = self.self_attn(self.input_layernorm(x), batch, state)
        return self._rest(x, y), state

    def dense(self, x: Float[Array, "batch tokens features"]) -> Float[Array, "batch tokens features"]:
        """Whole sequences, without pages."""
        return self._rest(x, self.self_attn.dense(self.input_layernorm(x)))

    def _rest(self, x: Array, attended: Array) -> Array:
        """The layer's output from its input and what its attention gave."""
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
