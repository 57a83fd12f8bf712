"""Entry points over a cache of one array, keys on even heads and values on odd ones: ragged batches."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from paged.lower import Axes

from . import arrays
from .arrays import AnyArray
from .caches import RAGGED_ORDERS, order_of
from .devices import Devices
from .hints import Hints
from .names import WORDS, knows
from .number import flag
from .ragged_steps import attend, update
from .static import More, Options


@knows(WORDS["ragged_page_attention_v2"])
def ragged_page_attention_v2(
    query: Float[Array, "*tokens q_heads head_dim"],
    kv_pages: Shaped[Array, "pages page_size *heads lanes"],
    context_lens: Int[AnyArray, " seqs"] | Sequence[Any],
    block_tables: Int[AnyArray, "seqs pages_per_seq"] | Sequence[Any],
    query_start_loc: Int[AnyArray, " seqs_plus_1"] | Sequence[Any],
    num_seqs: Int[AnyArray, "..."] | Sequence[Any] | int | np.integer,
    softmax_aux: Float[Array, "..."] | None = None,
    *,
    softmax_scale: float | None = None,
    logits_soft_cap: float | None = None,
    compute_dtype: Any = jnp.bfloat16,
    optimized: bool = False,
    sliding_window: int | tuple[int, int] | None = None,
    mask_value: float | None = None,
    num_kv_pages_per_block: int | None = None,
    num_queries_per_block: int | None = None,
    vmem_limit_bytes: int | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    cache_order: str | None = None,
    target: str = "auto",
    interpret: Any = False,
    mesh: Mesh | None = None,
    axes: Axes | None = None,
    in_specs: Any = None,
    out_specs: Any = None,
) -> Float[Array, "*tokens q_heads head_dim"]:
    """Causal attention of a ragged batch over pages that hold this step's keys and values already.

    **Arguments:**

    - `query`: rows of all sequences, one after the other, or ``[batch, seq, q_heads, head_dim]``.
    - `kv_pages`: pages with keys on even heads and values on odd ones, or packed; see `ragged_page_attention_v3`.
    - `context_lens`: how many tokens each sequence has, this step's included.
    - `block_tables`: token ``j`` of sequence ``s`` lies in page ``block_tables[s, j // page_size]``. Entries that no
      visible token needs may hold anything.
    - `query_start_loc`: sequence ``s`` owns the rows ``query_start_loc[s] : query_start_loc[s + 1]``, its last tokens.
    - `num_seqs`: the first ``num_seqs`` sequences are live.
    - `softmax_aux`: sinks, learnt logits in the denominator. ``[q_heads]`` and ``[kv_heads, group]`` are one sink of
      each query head. ``[n]`` are ``n`` sinks of every head, ``[kv_heads, n]`` are ``n`` sinks of every head of a
      group, and they add up. `paged.lower` accepts only ``[q_heads]`` and ``[q_heads, n]``.
    - `softmax_scale`: scale of scores. None: ``1 / sqrt(head_dim)``.
    - `logits_soft_cap`: scores become ``cap * tanh(score / cap)``, before the mask. None: no cap.
    - `compute_dtype`: float32 computes products and weights in float32 even where queries and pages are narrower. Other
      dtypes change nothing: products are never narrower than queries and pages, and the softmax is float32.
    - `optimized`: not needed. It chose between two implementations, and here there is one.
    - `sliding_window`: how many tokens a query sees, its own included; or a pair of how many to its left and right.
      None: all.
    - `mask_value`: not needed. Values that could change a result are refused.
    - `num_kv_pages_per_block`, `num_queries_per_block`: hints about the kernel for sequences of several rows, on TPUs.
      The nearest schedule runs, and `explain` says which. Any schedule gives the same attention; None leaves it to
      `paged`.
    - `vmem_limit_bytes`: a hint, on TPUs: the vector memory that kernels may use. None: what the chip has.
    - `k_scale`, `v_scale`: numbers that keys and values of the pages are multiplied by. None: 1, for pages of floats;
      int8 and float8 pages need both.
    - `cache_order`: ``"interleaved"``, as above, or ``"joined"``, see `ragged_page_attention_v3`.
    - `target`, `interpret`: see `paged.lower`.
    - `mesh`, `axes`, `in_specs`, `out_specs`: many devices, see `paged.compat`.

    **Returns:** the output in the query's shape and dtype, 0 in rows of no sequence and in rows that see no key.

    Raises ``ValueError`` or ``TypeError``, when traced, naming the argument.

    >>> kv_pages, query = jnp.ones((8, 4, 2 * 2, 16)), jnp.ones((5, 4, 16))
    >>> ragged_page_attention_v2(query, kv_pages, [6, 2], [[3, 1], [0, -1]], [0, 3, 4], 2).shape
    (5, 4, 16)
    """
    flag("optimized", optimized)
    named = {"query": query, "kv_pages": kv_pages, "context_lens": context_lens, "block_tables": block_tables}
    named |= {"query_start_loc": query_start_loc, "num_seqs": num_seqs}
    options = Options.of(
        target,
        interpret,
        ("softmax_scale", softmax_scale),
        ("logits_soft_cap", logits_soft_cap),
        sliding_window,
        mask_value,
        Hints.of_ragged(vmem_limit_bytes, num_kv_pages_per_block, num_queries_per_block),
        compute_dtype=compute_dtype,
        devices=Devices.of(mesh, axes, in_specs, out_specs, **named, softmax_aux=softmax_aux),
        cache_order=order_of(cache_order, RAGGED_ORDERS),
        more=More.of(k_scale=k_scale, v_scale=v_scale),
    )
    given = arrays.as_arrays(**named)
    _require_known_num_seqs(given[-1], given[2])
    return attend(options, *given, _sinks(softmax_aux))


@knows(WORDS["ragged_page_attention_v3"])
def ragged_page_attention_v3(
    queries: Float[Array, "*tokens q_heads head_dim"],
    keys: Shaped[Array, "*tokens kv_heads head_dim"],
    values: Shaped[Array, "*tokens kv_heads head_dim"],
    kv_pages: Shaped[Array, "pages page_size *heads lanes"],
    context_lens: Int[AnyArray, " seqs"] | Sequence[Any],
    block_tables: Int[AnyArray, " seqs_times_pages_per_seq"] | Sequence[Any],
    query_start_loc: Int[AnyArray, " seqs_plus_1"] | Sequence[Any],
    distribution: Int[AnyArray, "3"] | Sequence[Any],
    softmax_aux: Float[Array, "..."] | None = None,
    *,
    softmax_scale: float | None = None,
    logits_soft_cap: float | None = None,
    sliding_window: int | tuple[int, int] | None = None,
    vmem_limit_bytes: int | None = None,
    mask_value: float | None = None,
    use_causal_mask: bool = True,
    update_kv_cache: bool = True,
    out_dtype: Any = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    num_kv_pages_per_block: int | None = None,
    num_queries_per_block: int | None = None,
    m_block_sizes: tuple[int, int, int, int] | None = None,
    cache_order: str | None = None,
    target: str = "auto",
    interpret: Any = False,
    mesh: Mesh | None = None,
    axes: Axes | None = None,
    in_specs: Any = None,
    out_specs: Any = None,
) -> tuple[Float[Array, "*tokens q_heads head_dim"], Shaped[Array, "pages page_size *heads lanes"]]:
    """Write the keys and values of a ragged batch into its pages, then attend causally.

    ``kv_pages`` is donated: the array that was passed is gone afterwards. Inside of another ``jax.jit``, donate it
    there.

    **Arguments:**

    - `queries`, `keys`, `values`: rows of all sequences, one after the other, or ``[batch, seq, heads, head_dim]``.
    - `kv_pages`: pages ``[pages, page_size, 2 * kv_heads, D']``, keys on even heads and values on odd ones; or packed,
      ``[pages, page_size, 2 * kv_heads / pack, pack, D']``, which are the same bytes. ``D'`` is ``head_dim``, or the
      next multiple of 128, padded with zeros.
    - `context_lens`: how many tokens each sequence has, this step's included.
    - `block_tables`: the table rows of all sequences, one after the other. Token ``j`` of sequence ``s`` lies in page
      ``block_tables[s * pages_per_seq + j // page_size]``. Entries that no visible token needs may hold anything.
    - `query_start_loc`: sequence ``s`` owns the rows ``query_start_loc[s] : query_start_loc[s + 1]``, its last tokens.
    - `distribution`: ``[decode_end, prefill_end, total]``. Only ``total``, the number of live sequences, is needed. The
      three must not decrease or exceed the number of sequences, which is checked where their values are known.
    - `softmax_aux`: sinks, in the shapes of `ragged_page_attention_v2`.
    - `softmax_scale`: scale of scores. None: ``1 / sqrt(head_dim)``.
    - `logits_soft_cap`: scores become ``cap * tanh(score / cap)``, before the mask. None: no cap.
    - `sliding_window`, `vmem_limit_bytes`, `num_kv_pages_per_block`, `num_queries_per_block`, `mask_value`: see
      `ragged_page_attention_v2`.
    - `m_block_sizes`: a hint, of which the first numbers count: query rows, and tokens, of a block. The last two say
      how another kernel divides its blocks.
    - `use_causal_mask`: False lets every query see all tokens of its sequence.
    - `update_kv_cache`: False writes nothing: the pages hold this step's tokens already. `keys` and `values` are then
      looked at for their shapes alone.
    - `out_dtype`: the dtype of the output. None: the queries'.
    - `q_scale`: not needed, because queries are not quantised here.
    - `k_scale`, `v_scale`: numbers that keys and values of the pages are multiplied by. None: 1, for pages of floats;
      int8 and float8 pages need both. `keys` and `values` for such pages are floats, which are divided by the scales
      and rounded, or numbers in the dtype of the pages, which are written as they are.
    - `cache_order`: ``"interleaved"``, as above; or ``"joined"``, ``[pages, page_size, kv_heads / pack, pack, 128]``
      with the key and the value of one head, 64 numbers each, side by side. None is for what the shapes say; where
      they fit both it raises.
    - `target`, `interpret`: see `paged.lower`.
    - `mesh`, `axes`, `in_specs`, `out_specs`: many devices, see `paged.compat`.

    **Returns:** ``(out, kv_pages)``. ``out`` has the queries' shape, and is 0 in rows of no sequence and in
    rows that see no key. ``kv_pages`` has the shape that was passed.

    Raises ``ValueError`` or ``TypeError``, when traced, naming the argument.

    >>> kv_pages, q, kv = jnp.zeros((8, 4, 2 * 2, 16)), jnp.ones((4, 4, 16)), jnp.ones((4, 2, 16))
    >>> out, kv_pages = ragged_page_attention_v3(q, kv, kv, kv_pages, [3, 1], [3, 1, 0, -1], [0, 3, 4], [0, 0, 2])
    >>> out.shape, float(kv_pages[3, :3].min())
    ((4, 4, 16), 1.0)
    """
    scale, soft_cap = ("softmax_scale", softmax_scale), ("logits_soft_cap", logits_soft_cap)
    named = {"queries": queries, "keys": keys, "values": values, "kv_pages": kv_pages, "context_lens": context_lens}
    named |= {"block_tables": block_tables, "query_start_loc": query_start_loc, "distribution": distribution}
    devices = Devices.of(mesh, axes, in_specs, out_specs, **named, softmax_aux=softmax_aux)
    options = Options.of(
        target,
        interpret,
        scale,
        soft_cap,
        sliding_window,
        mask_value,
        Hints.of_ragged(vmem_limit_bytes, num_kv_pages_per_block, num_queries_per_block, m_block_sizes),
        devices=devices,
        cache_order=order_of(cache_order, RAGGED_ORDERS),
        more=More.of(q_scale, k_scale, v_scale, out_dtype, use_causal_mask, update_kv_cache),
    )
    given = arrays.as_arrays(**named)
    _require_ends(given[-1], given[4])
    return update(options, *given, _sinks(softmax_aux))


def _require_known_num_seqs(num_seqs: Any, context_lens: Any) -> None:
    """Check the value of ``num_seqs`` where it is known. `attend` checks its shape and dtype."""
    if not isinstance(num_seqs, np.ndarray | np.integer) or num_seqs.size != 1 or num_seqs.dtype.kind not in "iu":
        return
    if len(context_lens.shape) == 1 and not 0 <= int(num_seqs.reshape(())) <= context_lens.shape[0]:
        raise ValueError(
            f"num_seqs must be in [0, {context_lens.shape[0]}], the number of context_lens; got "
            f"{int(num_seqs.reshape(()))}."
        )


def _require_ends(distribution: Any, context_lens: Any) -> None:
    """Check the values of ``distribution`` where they are known. `update` checks its shape and dtype."""
    if isinstance(distribution, jax.core.Tracer | jax.ShapeDtypeStruct):
        return
    if distribution.shape != (3,) or distribution.dtype.kind not in "iu" or len(context_lens.shape) != 1:
        return
    decode_end, prefill_end, total = np.asarray(distribution).tolist()
    if not 0 <= decode_end <= prefill_end <= total <= context_lens.shape[0]:
        raise ValueError(
            "distribution must be [decode_end, prefill_end, total], ends of ranges of sequences, which do not decrease "
            f"and are at most context_lens' {context_lens.shape[0]}; got {[decode_end, prefill_end, total]}. [0, 0, n] "
            "will do for n live sequences of any kind."
        )


def _sinks(softmax_aux: Any) -> Any:
    if softmax_aux is None or hasattr(softmax_aux, "shape"):
        return softmax_aux
    return np.asarray(softmax_aux, np.float32)
