"""`Experts`: a perceptron of many experts, of which each token uses a few, as gpt-oss has them (arXiv:2508.10925)."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .config import Config, ExpertsConfig


def draw(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
    """New weights: normal, with a standard deviation of 0.02."""
    return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


class Router(eqx.Module):
    """Which experts a token uses, and with which weights: a softmax over the logits of those that it uses."""

    weight: Float[Array, "experts features"]
    bias: Float[Array, " experts"]
    per_token: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "rows features"]) -> tuple[Int[Array, "rows used"], Float[Array, "rows used"]]:
        logits = x @ self.weight.astype(x.dtype).T + self.bias.astype(x.dtype)[None]
        top, experts = jax.lax.top_k(logits, self.per_token)
        return experts, jax.nn.softmax(top, axis=-1)


class Experts(eqx.Module):
    """Gated perceptrons of which a router picks a few for each token.

    The gate and what it gates lie at even and odd outputs of one product. There are two ways to compute the same, which
    differ by rounding:

    - ``how = "ragged"``: rows are sorted by expert, and ``jax.lax.ragged_dot`` multiplies each with its own expert.
    - ``how = "dense"``: every expert computes every row. It suits few experts, and experts that a mesh shares out.
    """

    router: Router
    gate_up_proj: Float[Array, "experts features twice_inner"]
    gate_up_proj_bias: Float[Array, "experts twice_inner"]
    down_proj: Float[Array, "experts inner features"]
    down_proj_bias: Float[Array, "experts features"]
    facts: ExpertsConfig = eqx.field(static=True)

    def __init__(self, config: Config, dtype: Any, key: PRNGKeyArray):
        facts = config.experts
        assert facts is not None
        keys = jax.random.split(key, 3)
        count, size, inner = facts.num_experts, config.hidden_size, config.intermediate_size
        self.router = Router(draw(keys[0], (count, size), dtype), jnp.zeros(count, dtype), facts.per_token)
        self.gate_up_proj = draw(keys[1], (count, size, 2 * inner), dtype)
        self.gate_up_proj_bias = jnp.zeros((count, 2 * inner), dtype)
        self.down_proj = draw(keys[2], (count, inner, size), dtype)
        self.down_proj_bias = jnp.zeros((count, size), dtype)
        self.facts = facts

    def __call__(self, x: Float[Array, "*rows features"]) -> Float[Array, "*rows features"]:
        rows = x.reshape(-1, x.shape[-1])
        experts, weights = self.router(rows)
        run = self._ragged if self.facts.how == "ragged" else self._dense
        return run(rows, experts, weights).reshape(x.shape)

    def _ragged(self, x: Array, experts: Array, weights: Array) -> Array:
        used, count = self.facts.per_token, self.facts.num_experts
        order = jnp.argsort(experts.reshape(-1), stable=True)
        expert = experts.reshape(-1)[order]
        sizes = jnp.zeros(count, jnp.int32).at[expert].add(1)
        up = jax.lax.ragged_dot(x[order // used], self.gate_up_proj.astype(x.dtype), sizes)
        inner = self._gate(up + self.gate_up_proj_bias.astype(x.dtype)[expert])
        down = jax.lax.ragged_dot(inner, self.down_proj.astype(x.dtype), sizes)
        down = (down + self.down_proj_bias.astype(x.dtype)[expert]) * weights.reshape(-1)[order][:, None]
        return jnp.zeros_like(x).at[order // used].add(down)

    def _dense(self, x: Array, experts: Array, weights: Array) -> Array:
        rows = jnp.arange(x.shape[0])[:, None]
        of_expert = jnp.zeros((x.shape[0], self.facts.num_experts), x.dtype).at[rows, experts].set(weights)
        up = jnp.einsum("rf,efi->eri", x, self.gate_up_proj.astype(x.dtype))
        inner = self._gate(up + self.gate_up_proj_bias.astype(x.dtype)[:, None])
        down = jnp.einsum("eri,eif->erf", inner, self.down_proj.astype(x.dtype))
        down = down + self.down_proj_bias.astype(x.dtype)[:, None]
        return jnp.einsum("erf,re->rf", down, of_expert)

    def _gate(self, both: Array) -> Array:
        """``(u + 1) g sigmoid(alpha g)``, with both bounded, the gate from above only."""
        limit = self.facts.limit
        gate, up = jnp.minimum(both[..., ::2], limit), jnp.clip(both[..., 1::2], -limit, limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.facts.alpha * gate)
