"""`PagedAttention`: an attention layer with projections, rotary embedding, and pages in Equinox state."""

from collections.abc import Mapping
from typing import Any, overload

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from paged.lower import Plan, Schedule, Step
from paged.spec import (
    AttentionSpec,
    Causal,
    GroupedBatch,
    Mask,
    PageLayout,
    Pages,
    RaggedBatch,
    as_bool,
    as_float,
    batch_for,
    require_positive_int,
)

from ._dense import dense
from ._heads import ProcessHeads, heads_of, keys_of, output_of, queries_of, require_inputs, require_sizes, values_of
from ._multihead import parts_of, require_rotary, spec_of
from .cache import PagedCache
from .calibration import CalibratingPages
from .rotary import Rotary


class PagedAttention(eqx.Module):
    """Attention that keeps its keys and values in pages, in place of ``eqx.nn.MultiheadAttention``.

    * ``y, state = layer(x, batch, state)`` serves, from pages in the state. So does ``layer.serve``.
    * ``layer(query, key_, value, mask)`` trains, as a ``MultiheadAttention`` is called: the same function of the same
      parameters, without pages. So does ``layer.dense``; ``layer.dense(x)`` is ``layer.dense(x, x, x)``.
    * ``state = layer.write(context, batch, state)``, then ``y = layer.read(x, batch, state)`` is cross-attention.
    * ``layer.attend_pages(x, pages, batch)`` serves with pages passed and returned.

    `from_multihead` makes one of a ``MultiheadAttention``, and `paged.convert` does so in a whole model. A model of
    many layers runs them as a `LayerStack`.

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
    dropout: eqx.nn.Dropout | None
    query_norm: eqx.nn.RMSNorm | None
    key_norm: eqx.nn.RMSNorm | None
    sinks: Float[Array, " q_heads"] | None
    rotary: Rotary | None
    cache: PagedCache
    input_sizes: tuple[int, int, int] = eqx.field(static=True)  # features of a query, a key and a value

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
        dropout_p: float = 0.0,
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
        - `dropout_p`: which part of the attention's weights `dense` drops where it trains, given a key.
        - `target`, `schedule`, `check`, `interpret`, `k_scale`, `v_scale`: see `PagedCache`; ``check`` is True by
          default.
        - `dtype`: dtype of the parameters.
        - `key`: a PRNG key, from which the parameters are drawn.

        Raises ``ValueError`` where the rotary embedding, the layout and the spec do not fit together, and ``TypeError``
        for a flag that is no bool and a number that is none.
        """
        require_rotary(rotary, spec.head_dim)
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
        self.dropout = eqx.nn.Dropout(as_float("dropout_p", dropout_p)) if dropout_p else None
        self.query_norm = _rms_norm(spec.head_dim, as_float("qk_norm_eps", qk_norm_eps), dtype) if qk_norm else None
        self.key_norm = _rms_norm(spec.head_dim, as_float("qk_norm_eps", qk_norm_eps), dtype) if qk_norm else None
        self.sinks = jnp.zeros(spec.num_q_heads, jnp.float32) if spec.sinks else None
        self.rotary = rotary
        how: dict[str, Any] = {"target": target, "schedule": schedule, "check": check, "interpret": interpret}
        self.cache = PagedCache(spec, layout, num_pages, **how, k_scale=k_scale, v_scale=v_scale)
        self.input_sizes = embed_dim, embed_dim, embed_dim

    @classmethod
    def from_multihead(
        cls,
        mha: eqx.nn.MultiheadAttention,
        layout: PageLayout,
        num_pages: int,
        mask: Mask = Causal(),  # noqa: B008, a frozen declaration
        *,
        rotary: Rotary | None = None,
        **how: Any,
    ) -> "PagedAttention":
        """A layer with the four projections and the dropout of a ``MultiheadAttention``: its arrays, in its order.

        **Arguments:**

        - `mha`: the ``MultiheadAttention``. Its leaves are the first leaves of the layer, and there are no others that
          a checkpoint or an optimiser sees.
        - `layout`: with the ``MultiheadAttention``'s ``num_heads`` as ``num_kv_heads``, its ``qk_size`` as ``head_dim``
          and its ``vo_size`` as ``value_dim``.
        - `num_pages`: how many pages the state holds.
        - `mask`: which keys a query sees. `Causal` for the layers of a decoder, which `check_layer` proves; a
          cross-attention has `Everything`.
        - `rotary`: a `Rotary`, for a model that turns queries and keys by ``process_heads``, which it then leaves out.
        - `how`: ``target``, ``schedule``, ``check``, ``interpret``, ``k_scale``, ``v_scale``, see `PagedCache`.

        **Returns:** the layer. Call this inside of what ``eqx.nn.make_with_state`` is given, or use `paged.convert`.

        Raises ``ValueError`` that names what cannot be served: a subclass, stacked weights, float64, a layout of other
        sizes.

        >>> mha = eqx.nn.MultiheadAttention(num_heads=2, query_size=8, key=jax.random.key(0))
        >>> layout = PageLayout(page_size=2, num_kv_heads=2, head_dim=4, dtype=jnp.float32)
        >>> layer, state = eqx.nn.make_with_state(PagedAttention.from_multihead)(mha, layout, num_pages=4)
        >>> x = jax.random.normal(jax.random.key(1), (3, 8))
        >>> y, state = layer(x, RaggedBatch.prefill(length=3, block_table=[3, 1], query_rows=3), state)
        >>> trained = mha(x, x, x, mask=jnp.tril(jnp.ones((3, 3), bool)))
        >>> bool(jnp.allclose(y, trained, atol=1e-5)), bool(jnp.allclose(layer(x, x, x), trained, atol=1e-5))
        (True, True)
        """
        cache = PagedCache(spec_of(mha, layout, mask, rotary), layout, num_pages, **how)
        layer = object.__new__(cls)  # as a pytree is unflattened: `__init__` would draw parameters
        for name, part in {**parts_of(mha), "rotary": rotary, "cache": cache}.items():
            object.__setattr__(layer, name, part)
        return layer

    @property
    def spec(self) -> AttentionSpec:
        """What this layer's attention means."""
        return self.cache.attend.spec

    @property
    def layout(self) -> PageLayout:
        """How this layer's pages lie in memory."""
        return self.cache.attend.layout

    @property
    def embed_dim(self) -> int:
        """Features of a token, as queries are made of them."""
        return self.input_sizes[0]

    @overload
    def __call__(self, x: Array, batch: Step, state: eqx.nn.State, **how: Any) -> tuple[Array, eqx.nn.State]: ...

    @overload
    def __call__(self, query: Array, key_: Array, value: Array, mask: Array | None = None, **how: Any) -> Array: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`serve` where the second argument is a batch, and else `dense`: ``MultiheadAttention``'s own call."""
        is_step = "batch" in kwargs or (len(args) > 1 and isinstance(args[1], Step))
        return self.serve(*args, **kwargs) if is_step else self.dense(*args, **kwargs)

    def serve(
        self,
        x: Float[Array, "tokens query_size"],
        batch: Step,
        state: eqx.nn.State,
        *,
        key_: Float[Array, "tokens key_size"] | None = None,
        value: Float[Array, "tokens value_size"] | None = None,
        process_heads: ProcessHeads | None = None,
    ) -> tuple[Float[Array, "tokens output_size"], eqx.nn.State]:
        """Add the keys and values of a step's rows to the pages, then attend. Nothing is dropped.

        Row ``i`` of a sequence with ``n`` rows has the position ``lengths - n + i``, for the mask and for the rotary
        embedding.

        **Arguments:**

        - `x`: features of this step's tokens, one row per token of the batch.
        - `batch`: whose rows these are, and where the tokens of their sequences lie: of a `GroupedBatch`, in the table
          of this spec's group. Or the step's `plan`.
        - `state`: the state that holds the pages. Donate it to ``jax.jit``, and they are updated in place.
        - `key_`, `value`: features that keys and values are made of, where it is not ``x``: of the same tokens.
        - `process_heads`: as in `dense`. It needs an argument ``positions``.

        **Returns:** the output, and the new state. A row of no sequence and a row that sees no key give what the output
        projection makes of 0.

        Raises ``ValueError`` for features of other sizes, and with ``check`` for values of the batch.
        """
        inputs: dict[str, Any] = {"key_": key_, "value": value, "process_heads": process_heads}
        y, pages = self.attend_pages(x, state.get(self.cache.index), batch, **inputs)
        return y, state.set(self.cache.index, pages)

    def attend_pages(
        self,
        x: Float[Array, "tokens query_size"],
        pages: Pages | CalibratingPages,
        batch: Step,
        *,
        key_: Float[Array, "tokens key_size"] | None = None,
        value: Float[Array, "tokens value_size"] | None = None,
        process_heads: ProcessHeads | None = None,
    ) -> tuple[Float[Array, "tokens output_size"], Any]:
        """`serve` with pages passed and returned instead of state.

        For a loop of your own over many layers, keep the pages of all of them in one pool, carry it, and give each
        layer ``batch.for_layer(i, num_pages, num_layers)``: see `RaggedBatch.for_layer`. Pages that ``jax.lax.scan``
        runs over (``xs`` and ``ys``) are copied into the loop and out of it at every step. `LayerStack` does all this.
        """
        inputs = require_inputs(self, x, key_, value, is_step=True)
        positions = self.cache.positions(batch, x.shape[0])
        heads = heads_of(self, inputs, positions, positions, process_heads, is_step=True)
        out, pages = self.cache.attend_pages(*heads, pages, batch, self.sinks)
        return output_of(self, out), pages

    def write(
        self,
        key_: Float[Array, "tokens key_size"],
        batch: RaggedBatch,
        state: eqx.nn.State,
        *,
        value: Float[Array, "tokens value_size"] | None = None,
    ) -> eqx.nn.State:
        """Write keys and values into the pages, once for each sequence, for `read`: of an encoder's output, say.

        **Arguments:**

        - `key_`: features that keys are made of, one row per token of the batch.
        - `batch`: whose rows these are. Its tables are those of what is attended to, with a pool of their own.
        - `state`: the state that holds the pages.
        - `value`: features that values are made of, ``key_`` by default.

        **Returns:** the new state. Raises as `serve`, and ``ValueError`` inside of a `LayerStack`.
        """
        value = key_ if value is None else value
        require_sizes({"key_": key_, "value": value}, self.input_sizes[1:])
        k, v = keys_of(self, key_, self.cache.positions(batch, key_.shape[0])), values_of(self, value)
        pages = self.cache.write_pages(k, v, state.get(self.cache.index), batch)
        return state.set(self.cache.index, pages)

    def read(
        self, x: Float[Array, "tokens query_size"], batch: RaggedBatch, state: eqx.nn.State
    ) -> Float[Array, "tokens output_size"]:
        """Attend over what `write` has written, and write nothing: cross-attention.

        **Arguments:**

        - `x`: features of the rows that attend.
        - `batch`: how many rows each sequence has, and the lengths and tables of what they attend to. Sequences may
          share pages, and have more rows than there are tokens.
        - `state`: the state that holds the pages.

        **Returns:** the output. Raises as `serve`, and ``ValueError`` inside of a `LayerStack`.
        """
        require_sizes({"x": x}, self.input_sizes)
        q = queries_of(self, x, self.cache.positions(batch, x.shape[0]))
        return output_of(self, self.cache.read_pages(q, state.get(self.cache.index), batch, self.sinks))

    def plan(
        self, x: Float[Array, "tokens query_size"], pages: Pages | CalibratingPages, batch: RaggedBatch | GroupedBatch
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
        require_sizes({"x": x}, self.input_sizes)
        q = eqx.filter_eval_shape(queries_of, self, x, jax.ShapeDtypeStruct(x.shape[:1], jnp.int32))
        attend, own = self.cache.attend, batch_for(self.spec, batch)
        return pages.plan(attend, q, own) if isinstance(pages, CalibratingPages) else attend.plan(q, pages, own)

    def dense(
        self,
        query: Float[Array, "*batch tokens query_size"],
        key_: Float[Array, "*batch length key_size"] | None = None,
        value: Float[Array, "*batch length value_size"] | None = None,
        mask: Bool[Array, "..."] | None = None,
        *,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
        process_heads: ProcessHeads | None = None,
        segments: Int[Array, "*batch length"] | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> Float[Array, "*batch tokens output_size"]:
        """Attend over whole sequences without pages, for training: differentiable.

        Equals ``eqx.nn.MultiheadAttention``, given an array that says what this layer's `Mask` says, up to rounding;
        with dropout too, for the same key. A row that sees no key gives what the output projection makes of 0.

        Equals serving the same tokens, up to rounding and up to what the pages' dtype rounds of keys and values, where
        no row sees a key that a later step writes. A causal mask sees none; `paged.check` with ``final_lengths`` asks
        any mask.

        **Arguments:**

        - `query`: features of whole sequences, one [tokens, query_size] or a batch of them. The last token is at the
          position of the last key.
        - `key_`, `value`: features that keys and values are made of, at positions ``0 .. length - 1``. By default
          ``query``, and ``key_``.
        - `mask`: bools, False where a query does not see a key that the layer's `Mask` shows: [tokens, length] or
          [heads, tokens, length]; for a batch [tokens, length] or [batch, heads, tokens, length], where heads may be 1.
          A step of serving has no such array: declare what it says as the layer's `Mask`.
        - `key`: a PRNG key for the dropout. For a batch it is split, one for each sequence.
        - `inference`: whether nothing is dropped. By default as the dropout says, see ``eqx.nn.inference_mode``.
        - `process_heads`: ``process_heads(q, k, v)`` of one sequence's heads, [tokens, heads, dim], returns others of
          these shapes. One with an argument ``positions`` is given the position of each row, i32[tokens].
        - `segments`, `values`: as in `paged.dense_attention`: documents that are packed into one row, and the numbers
          that the spec names. A rotary embedding turns by positions in the row: only differences matter to it.

        **Returns:** the output, one row per query. Raises ``ValueError`` for features of other sizes, and
        ``RuntimeError`` where there is no key to drop by.
        """
        how: dict[str, Any] = {"process_heads": process_heads, "segments": segments, "values": values}
        return dense(self, query, key_, value, mask, key=key, inference=inference, **how)


def _rms_norm(head_dim: int, eps: float, dtype: Any) -> eqx.nn.RMSNorm:
    return eqx.nn.RMSNorm(head_dim, eps, use_weight=True, use_bias=False, dtype=dtype)
