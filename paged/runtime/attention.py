"""`PagedAttention`: an attention layer with projections, rotary embedding, and pages in Equinox state."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from paged.lower import Plan, Schedule, Step, dense_attention
from paged.spec import (
    AttentionSpec,
    GroupedBatch,
    PageLayout,
    Pages,
    RaggedBatch,
    as_bool,
    as_float,
    batch_for,
    require_positive_int,
)

from .cache import PagedCache
from .calibration import CalibratingPages
from .rotary import Rotary


class PagedAttention(eqx.Module):
    """Self-attention that keeps its keys and values in pages, in place of ``eqx.nn.MultiheadAttention``.

    * ``y, state = layer(x, batch, state)`` serves, from pages in the state.
    * ``layer.dense(x)`` trains: the same function of the same parameters, without pages.
    * ``layer.attend_pages(x, pages, batch)`` serves with pages passed and returned.

    A model of many layers runs them as a `LayerStack`.

    Projections have the names of ``eqx.nn.MultiheadAttention``: ``query_proj``, ``key_proj``, ``value_proj``,
    ``output_proj``. Where the spec has sinks the layer owns them: ``sinks`` float32[q_heads], learnt from 0. With
    ``qk_norm`` the queries and keys of each head are RMS-normalised before the rotary embedding (Qwen 3,
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
        interpret: Any = False,
        k_scale: Any = None,
        v_scale: Any = None,
        dtype: Any = jnp.float32,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `spec`: what the attention means. Its heads and head_dim size the projections.
        - `layout`: how the pages lie in memory. Its dtype may differ from the parameters'.
        - `num_pages`: how many pages the state holds.
        - `embed_dim`: features of a token, in and out.
        - `rotary`: a `Rotary` of the spec's head_dim, or None for no position embedding.
        - `qk_norm`: whether the queries and keys of each head are RMS-normalised, with learnt weights.
        - `qk_norm_eps`: what the norm adds to the mean square before it takes the root.
        - `use_query_bias`, `use_key_bias`, `use_value_bias`, `use_output_bias`: whether that projection has a bias.
        - `target`, `schedule`, `check`, `interpret`, `k_scale`, `v_scale`: see `PagedCache`; ``check`` is True by
          default.
        - `dtype`: dtype of the parameters.
        - `key`: a PRNG key, from which the parameters are drawn.

        Raises ``ValueError`` where the rotary embedding, the layout and the spec do not fit together, and ``TypeError``
        for a flag that is no bool and a number that is none.
        """
        if rotary is not None and rotary.head_dim != spec.head_dim:
            raise ValueError(
                f"rotary.head_dim must equal spec.head_dim = {spec.head_dim}; got {rotary.head_dim}. To turn a part of "
                "the head, use Rotary(head_dim, rotary_dim=...)."
            )
        require_positive_int("embed_dim", embed_dim)
        flags = {"qk_norm": qk_norm, "use_query_bias": use_query_bias, "use_key_bias": use_key_bias}
        flags |= {"use_value_bias": use_value_bias, "use_output_bias": use_output_bias}
        for name, value in flags.items():
            as_bool(name, value)
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        q_dim, k_dim = spec.num_q_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        v_dim, o_dim = spec.num_kv_heads * layout.value_dim, spec.num_q_heads * layout.value_dim
        self.query_proj = eqx.nn.Linear(embed_dim, q_dim, use_query_bias, dtype, key=q_key)
        self.key_proj = eqx.nn.Linear(embed_dim, k_dim, use_key_bias, dtype, key=k_key)
        self.value_proj = eqx.nn.Linear(embed_dim, v_dim, use_value_bias, dtype, key=v_key)
        self.output_proj = eqx.nn.Linear(o_dim, embed_dim, use_output_bias, dtype, key=o_key)
        self.query_norm = _rms_norm(spec.head_dim, as_float("qk_norm_eps", qk_norm_eps), dtype) if qk_norm else None
        self.key_norm = _rms_norm(spec.head_dim, as_float("qk_norm_eps", qk_norm_eps), dtype) if qk_norm else None
        self.sinks = jnp.zeros(spec.num_q_heads, jnp.float32) if spec.sinks else None
        self.rotary = rotary
        how: dict[str, Any] = {"target": target, "schedule": schedule, "check": check, "interpret": interpret}
        self.cache = PagedCache(spec, layout, num_pages, **how, k_scale=k_scale, v_scale=v_scale)

    @property
    def spec(self) -> AttentionSpec:
        """What this layer's attention means."""
        return self.cache.attend.spec

    @property
    def layout(self) -> PageLayout:
        """How this layer's pages lie in memory."""
        return self.cache.attend.layout

    def __call__(
        self, x: Float[Array, "tokens embed_dim"], batch: Step, state: eqx.nn.State
    ) -> tuple[Float[Array, "tokens embed_dim"], eqx.nn.State]:
        """Add the keys and values of a step's rows to the pages, then attend.

        Row ``i`` of a sequence with ``n`` rows has the position ``lengths - n + i``, for the mask and for the rotary
        embedding.

        **Arguments:**

        - `x`: features of this step's tokens, one row per token of the batch.
        - `batch`: whose rows these are, and where the tokens of their sequences lie: of a `GroupedBatch`, in the table
          of this spec's group. Or the step's `plan`.
        - `state`: the state that holds the pages. Donate it to ``jax.jit``, and they are updated in place.

        **Returns:** the output, and the new state. A row of no sequence and a row that sees no key give what the output
        projection makes of 0.

        Raises ``ValueError`` unless ``x`` is [tokens, embed_dim], and with ``check`` for values of the batch.
        """
        y, pages = self.attend_pages(x, state.get(self.cache.index), batch)
        return y, state.set(self.cache.index, pages)

    def attend_pages(
        self, x: Float[Array, "tokens embed_dim"], pages: Pages | CalibratingPages, batch: Step
    ) -> tuple[Float[Array, "tokens embed_dim"], Any]:
        """A call with pages passed and returned instead of state.

        For a loop of your own over many layers, keep the pages of all of them in one pool, carry it, and give each
        layer ``batch.for_layer(i, num_pages, num_layers)``: see `RaggedBatch.for_layer`. Pages that ``jax.lax.scan``
        runs over (``xs`` and ``ys``) are copied into the loop and out of it at every step. `LayerStack` does all this.
        """
        self._require_features(x, "[tokens, embed_dim]", 2)
        tokens = x.shape[0]
        q, k, v = self._project(x, self.cache.positions(batch, tokens))
        out, pages = self.cache.attend_pages(q, k, v, pages, batch, self.sinks)
        return jax.vmap(self.output_proj)(out.reshape(tokens, -1)), pages

    def plan(
        self, x: Float[Array, "tokens embed_dim"], pages: Pages | CalibratingPages, batch: RaggedBatch | GroupedBatch
    ) -> Plan:
        """Compute once what all layers like this one compute from a step's batch alone.

        The layers of a model that have this layer's mask, page layout and query dtype accept the plan in place of the
        batch: `__call__` and `attend_pages`. A model whose layers have several masks makes one plan for each. See
        `paged.Plan`.

        **Arguments:**

        - `x`, `pages`, `batch`: as for `attend_pages`. Of ``x`` and ``pages`` only shapes and dtypes matter. With
          ``check`` the values of the batch are checked here, and not in the layers.

        **Returns:** the plan. Raises as a call does.

        >>> layout = PageLayout(page_size=2, num_kv_heads=1, head_dim=4)
        >>> spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=4)
        >>> layer, state = eqx.nn.make_with_state(PagedAttention)(spec, layout, 4, 8, key=jax.random.key(0))
        >>> pages, x = state.get(layer.cache.index), jnp.ones((2, 8))
        >>> plan = layer.plan(x, pages, RaggedBatch.decode(lengths=[3, 1], block_tables=[[3, 1], [2, -1]]))
        >>> layer.attend_pages(x, pages, plan)[0].shape
        (2, 8)
        """
        self._require_features(x, "[tokens, embed_dim]", 2)
        positions = jax.ShapeDtypeStruct(x.shape[:1], jnp.int32)
        q, _, _ = eqx.filter_eval_shape(self._project, x, positions)
        attend, own = self.cache.attend, batch_for(self.spec, batch)
        return pages.plan(attend, q, own) if isinstance(pages, CalibratingPages) else attend.plan(q, pages, own)

    def dense(
        self,
        x: Float[Array, "batch tokens embed_dim"],
        *,
        segments: Int[Array, "batch tokens"] | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> Float[Array, "batch tokens embed_dim"]:
        """Attend over whole sequences without pages, for training: differentiable.

        Equals serving the same tokens, up to rounding and up to what the pages' dtype rounds of keys and values, where
        no row sees a key that a later step writes. A causal mask sees none; `paged.check` with ``final_lengths`` asks
        any mask.

        **Arguments:**

        - `x`: features of whole sequences, whose tokens are at positions ``0 .. tokens - 1``.
        - `segments`, `values`: as in `paged.dense_attention`: documents that are packed into one row, and the numbers
          that the spec names. A rotary embedding turns by positions in the row: only differences matter to it.

        **Returns:** the output, in the shape of ``x``.

        Raises ``ValueError`` unless ``x`` is [batch, tokens, embed_dim].
        """
        self._require_features(x, "[batch, tokens, embed_dim]", 3)
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)
        q, k, v = jax.vmap(lambda row: self._project(row, positions))(x)
        out = dense_attention(self.spec, q, k, v, self.sinks, segments=segments, values=values)
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
