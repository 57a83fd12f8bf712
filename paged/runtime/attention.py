"""`PagedAttention`: a whole attention layer, with projections, rotary embedding and a paged cache as Equinox state."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from paged.lower import Schedule, Sequences, dense_attention
from paged.spec import AttentionSpec, PageLayout, Pages, RaggedBatch

from .cache import PagedCache
from .rotary import Rotary


class PagedAttention(eqx.Module):
    """Self-attention that remembers its keys and values in pages; for models that have ``eqx.nn.MultiheadAttention``.

    ``y, state = layer(x, batch, state)`` serves; ``layer.dense(x)`` is the same function of the same parameters for
    training, without a cache; ``layer.attend_pages`` is the pure core for ``jax.lax.scan`` over stacked layers.

    Projections are named as in ``eqx.nn.MultiheadAttention``: ``query_proj``, ``key_proj``, ``value_proj``,
    ``output_proj``. Where the spec has sinks the layer owns them, as ``sinks`` float32[q_heads], learnt from 0.
    With ``qk_norm``, queries and keys are RMS-normalised a head before the rotary embedding (Qwen 3,
    arXiv:2505.09388; Gemma 3, arXiv:2503.19786).

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, window=16)
    >>> layout = PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
    >>> layer, state = eqx.nn.make_with_state(PagedAttention)(
    ...     spec, layout, num_pages=8, embed_dim=32, rotary=Rotary(8), key=jax.random.key(0))
    >>> x = jax.random.normal(jax.random.key(1), (5, 32))
    >>> y, state = layer(x, RaggedBatch.prefill(length=5, block_table=[3, 1], query_rows=5), state)
    >>> bool(jnp.allclose(y, layer.dense(x[None])[0], atol=1e-5))
    True
    """

    query_proj: eqx.nn.Linear
    key_proj: eqx.nn.Linear
    value_proj: eqx.nn.Linear
    output_proj: eqx.nn.Linear
    query_norm: eqx.nn.RMSNorm | None
    key_norm: eqx.nn.RMSNorm | None
    sinks: Float[Array, " q_heads"] | None
    rotary: Rotary | None
    cache: PagedCache

    def __init__(
        self,
        spec: AttentionSpec,
        layout: PageLayout,
        num_pages: int,
        embed_dim: int,
        *,
        rotary: Rotary | None = None,
        qk_norm: bool = False,
        qk_norm_eps: float = 1e-6,
        use_query_bias: bool = False,
        use_key_bias: bool = False,
        use_value_bias: bool = False,
        use_output_bias: bool = False,
        target: str = "auto",
        schedule: Schedule | None = None,
        check: bool = True,
        dtype: Any = jnp.float32,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `spec`: what the attention means; its heads and head_dim size the projections.
        - `layout`, `num_pages`: the cache's pages. `layout.dtype` may differ from `dtype`.
        - `embed_dim`: features of a token, in and out.
        - `rotary`: a `Rotary` of the spec's head_dim, or None for no position embedding.
        - `qk_norm`, `qk_norm_eps`: RMS-normalise queries and keys a head, with learnt weights.
        - `use_query_bias`, `use_key_bias`, `use_value_bias`, `use_output_bias`: biases of the projections.
        - `target`, `schedule`, `check`: as for `PagedCache`.
        - `dtype`: of the parameters.
        - `key`: a PRNG key for the parameters. (Keyword only argument.)

        Raises ``ValueError`` where the rotary embedding, the layout and the spec do not fit together.
        """
        if rotary is not None and rotary.head_dim != spec.head_dim:
            raise ValueError(
                f"rotary.head_dim must equal spec.head_dim = {spec.head_dim}; got {rotary.head_dim}. To turn a part of "
                "the head, use Rotary(head_dim, rotary_dim=...)."
            )
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        q_dim, k_dim = spec.num_q_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        v_dim, o_dim = spec.num_kv_heads * layout.value_dim, spec.num_q_heads * layout.value_dim
        self.query_proj = eqx.nn.Linear(embed_dim, q_dim, use_query_bias, dtype, key=q_key)
        self.key_proj = eqx.nn.Linear(embed_dim, k_dim, use_key_bias, dtype, key=k_key)
        self.value_proj = eqx.nn.Linear(embed_dim, v_dim, use_value_bias, dtype, key=v_key)
        self.output_proj = eqx.nn.Linear(o_dim, embed_dim, use_output_bias, dtype, key=o_key)
        self.query_norm = _rms_norm(spec.head_dim, qk_norm_eps, dtype) if qk_norm else None
        self.key_norm = _rms_norm(spec.head_dim, qk_norm_eps, dtype) if qk_norm else None
        self.sinks = jnp.zeros(spec.num_q_heads, jnp.float32) if spec.sinks else None
        self.rotary = rotary
        self.cache = PagedCache(spec, layout, num_pages, target=target, schedule=schedule, check=check)

    @property
    def spec(self) -> AttentionSpec:
        """What this layer's attention means."""
        return self.cache.attend.spec

    @property
    def layout(self) -> PageLayout:
        """How this layer's pages lie in memory."""
        return self.cache.attend.layout

    def __call__(
        self, x: Float[Array, "tokens embed_dim"], batch: RaggedBatch, state: eqx.nn.State
    ) -> tuple[Float[Array, "tokens embed_dim"], eqx.nn.State]:
        """Attend with the rows of a batch, after adding their keys and values to the cache.

        Row ``i`` of a sequence with ``n`` rows has the position ``lengths - n + i``, for the mask and the rotary
        embedding alike. Rows of no sequence, and those that see no key, come out as the output projection of 0.
        """
        y, pages = self.attend_pages(x, batch, state.get(self.cache.index))
        return y, state.set(self.cache.index, pages)

    def attend_pages(
        self, x: Float[Array, "tokens embed_dim"], batch: RaggedBatch, pages: Pages
    ) -> tuple[Float[Array, "tokens embed_dim"], Pages]:
        """The pure core of a call: the pages passed and returned instead of state.

        Layers that are built together by ``eqx.filter_vmap`` have their parameters and, in the state, their pages
        stacked on a leading axis; ``jax.lax.scan`` over both runs them one after the other.
        """
        self._require_features(x, "[tokens, embed_dim]", 2)
        tokens = x.shape[0]
        _, positions, _ = Sequences.of(batch, tokens, self.layout.page_size).positions(tokens)
        q, k, v = self._project(x, positions)
        out, pages = self.cache.attend_pages(q, k, v, batch, pages, self.sinks)
        return jax.vmap(self.output_proj)(out.reshape(tokens, -1)), pages

    def dense(self, x: Float[Array, "batch tokens embed_dim"]) -> Float[Array, "batch tokens embed_dim"]:
        """The training-time twin: whole sequences at positions ``0 .. tokens - 1``, no cache, differentiable.

        Equals serving the same tokens, up to rounding and to what the pages' dtype rounds of keys and values.
        """
        self._require_features(x, "[batch, tokens, embed_dim]", 3)
        positions = jnp.arange(x.shape[1])
        q, k, v = jax.vmap(lambda row: self._project(row, positions))(x)
        out = dense_attention(self.spec, q, k, v, self.sinks)
        return jax.vmap(jax.vmap(self.output_proj))(out.reshape(*x.shape[:2], -1))

    def _project(self, x: Array, positions: Int[Array, " tokens"]) -> tuple[Array, Array, Array]:
        spec, tokens = self.spec, x.shape[0]
        q = jax.vmap(self.query_proj)(x).reshape(tokens, spec.num_q_heads, -1)
        k = jax.vmap(self.key_proj)(x).reshape(tokens, spec.num_kv_heads, -1)
        v = jax.vmap(self.value_proj)(x).reshape(tokens, spec.num_kv_heads, -1)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = jax.vmap(jax.vmap(self.query_norm))(q), jax.vmap(jax.vmap(self.key_norm))(k)
        if self.rotary is not None:
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        return q, k, v

    def _require_features(self, x: Array, shape: str, rank: int) -> None:
        embed_dim = self.query_proj.in_features
        if x.ndim != rank or x.shape[-1] != embed_dim:
            raise ValueError(f"x must be {shape} with embed_dim = {embed_dim}; got {x.shape}.")


def _rms_norm(head_dim: int, eps: float, dtype: Any) -> eqx.nn.RMSNorm:
    return eqx.nn.RMSNorm(head_dim, eps, use_weight=True, use_bias=False, dtype=dtype)
