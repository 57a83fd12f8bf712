"""A small decoder-only transformer around `PagedAttention`: one set of weights, trained densely, served from pages."""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from paged.runtime import LayerStack, PagedAttention, Rotary
from paged.spec import AttentionSpec, PageLayout, RaggedBatch


class Block(eqx.Module):
    """Pre-norm attention and a two-layer perceptron, each with a residual."""

    attention_norm: eqx.nn.RMSNorm
    attention: PagedAttention
    mlp_norm: eqx.nn.RMSNorm
    mlp_in: eqx.nn.Linear
    mlp_out: eqx.nn.Linear

    def __init__(self, spec: AttentionSpec, layout: PageLayout, num_pages: int, width: int, *, key: PRNGKeyArray):
        attention_key, in_key, out_key = jax.random.split(key, 3)
        rotary = Rotary(spec.head_dim)
        self.attention = PagedAttention(spec, layout, num_pages, width, rotary=rotary, key=attention_key)
        self.attention_norm, self.mlp_norm = eqx.nn.RMSNorm(width), eqx.nn.RMSNorm(width)
        self.mlp_in = eqx.nn.Linear(width, 4 * width, use_bias=False, key=in_key)
        self.mlp_out = eqx.nn.Linear(4 * width, width, use_bias=False, key=out_key)

    def __call__(
        self, x: Float[Array, "tokens width"], batch: RaggedBatch, state: eqx.nn.State
    ) -> tuple[Float[Array, "tokens width"], eqx.nn.State]:
        """Serve: the tokens of one step, through the paged cache."""
        y, state = self.attention(jax.vmap(self.attention_norm)(x), batch, state)
        return self._mlp(x + y), state

    def dense(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Train: whole sequences, without a cache."""
        x = x + self.attention.dense(jax.vmap(jax.vmap(self.attention_norm))(x))
        return jax.vmap(self._mlp)(x)

    def _mlp(self, x: Float[Array, "tokens width"]) -> Float[Array, "tokens width"]:
        def one(token):
            return self.mlp_out(jax.nn.gelu(self.mlp_in(self.mlp_norm(token))))

        return x + jax.vmap(one)(x)


class LanguageModel(eqx.Module):
    """Tokens to logits. Layers take their specs in turn, so that a window on alternate layers is two specs."""

    embedding: eqx.nn.Embedding
    blocks: LayerStack
    norm: eqx.nn.RMSNorm
    head: eqx.nn.Linear

    def __init__(
        self,
        specs: tuple[AttentionSpec, ...],
        layout: PageLayout,
        num_pages: int,
        *,
        vocabulary: int,
        width: int,
        depth: int,
        key: PRNGKeyArray,
    ):
        def block_of(spec: AttentionSpec) -> Callable[[PRNGKeyArray], Block]:
            return lambda key: Block(spec, layout, num_pages, width, key=key)

        embedding_key, head_key, blocks_key = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(weight=0.02 * jax.random.normal(embedding_key, (vocabulary, width)))
        self.blocks = LayerStack.make([block_of(spec) for spec in specs], jax.random.split(blocks_key, depth))
        self.norm = eqx.nn.RMSNorm(width)
        self.head = eqx.nn.Linear(width, vocabulary, use_bias=False, key=head_key)

    def __call__(
        self, tokens: Int[Array, " tokens"], batch: RaggedBatch, state: eqx.nn.State
    ) -> tuple[Float[Array, "tokens vocabulary"], eqx.nn.State]:
        """Logits of one step's tokens, and the state with their keys and values in its pages."""
        x, state = self.blocks(jax.vmap(self.embedding)(tokens), batch, state)
        return jax.vmap(self._logits)(x), state

    def dense(self, tokens: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens vocabulary"]:
        """Logits at every position of whole sequences, recomputed without a cache."""
        x = self.blocks.dense(jax.vmap(jax.vmap(self.embedding))(tokens))
        return jax.vmap(jax.vmap(self._logits))(x)

    def _logits(self, x: Float[Array, " width"]) -> Float[Array, " vocabulary"]:
        return self.head(self.norm(x))
