"""Facts about the public functions that `paged.compat` stands for: their parameters, in order, with their defaults.

A signature is written as Python writes it: names after ``*`` are keyword-only, and those before ``/`` positional only.
Defaults are written as their ``repr``; a dtype is written by its name.
"""

import ast
from typing import NamedTuple


class Parameter(NamedTuple):
    """One parameter: its kind is "positional only", "positional" or "keyword"; without a default it is required."""

    name: str
    kind: str
    default: str | None


class Signature(NamedTuple):
    """A public function of another library, and the entry point of `paged.compat` that stands for it."""

    peer: str
    version: str
    entry: str
    function: str
    text: str

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters in order."""
        arguments = ast.parse(f"lambda {self.text}: 0", mode="eval").body.args  # pyright: ignore
        first = [("positional only", a) for a in arguments.posonlyargs] + [("positional", a) for a in arguments.args]
        defaults = [None] * (len(first) - len(arguments.defaults)) + arguments.defaults
        rest = [("keyword", a) for a in arguments.kwonlyargs]
        said = zip(first + rest, defaults + arguments.kw_defaults, strict=True)
        return tuple(Parameter(a.arg, kind, None if d is None else ast.unparse(d)) for (kind, a), d in said)


# ejkernel's kernels have the same parameters on all of its platforms; the path named here is the one for XLA.
# EasyDeL's rows are calls: the arguments that its layers pass, under the names that ejkernel's operations give them.
SIGNATURES = (
    Signature(
        "JAX",
        "0.10.2 and 0.12.0",
        "page_attention",
        "jax.experimental.pallas.ops.tpu.paged_attention.paged_attention",
        "q, k_pages, v_pages, lengths, page_indices, *, mask_value=-2.381976426469702e+38, attn_logits_soft_cap=None, "
        "pages_per_compute_block, megacore_mode=None, inline_seq_dim=True",
    ),
    Signature(
        "JAX",
        "0.10.2 and 0.12.0",
        "ragged_page_attention_v2",
        "jax.experimental.pallas.ops.tpu.ragged_paged_attention.ragged_paged_attention",
        "q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, *, sm_scale=1.0, sliding_window=None, "
        "soft_cap=None, mask_value=-2.381976426469702e+38, k_scale=None, v_scale=None, num_kv_pages_per_block=None, "
        "num_queries_per_block=None, vmem_limit_bytes=None",
    ),
    Signature(
        "ejkernel kernels",
        "0.0.80.3",
        "page_attention",
        "ejkernel.kernels._xla.page_attention",
        "query, key_cache, value_cache, context_lens, block_tables, attn_scale=None, max_context_len=None, "
        "num_splits=0, *, mask_value=-2.381976426469702e+38, attn_logits_soft_cap=None, pages_per_compute_block=None, "
        "megacore_mode=None, inline_seq_dim=True, sliding_window=None, num_warps=4, num_stages=3",
    ),
    Signature(
        "ejkernel kernels",
        "0.0.80.3",
        "prefill_page_attention",
        "ejkernel.kernels._xla.prefill_page_attention",
        "query, key_cache, value_cache, context_len, page_indices, *, softmax_scale=None, "
        "mask_value=-2.381976426469702e+38, attn_logits_soft_cap=None, sliding_window=None, block_k=None, "
        "num_warps=None, num_stages=None",
    ),
    Signature(
        "ejkernel kernels",
        "0.0.80.3",
        "ragged_page_attention_v2",
        "ejkernel.kernels._xla.ragged_page_attention_v2",
        "queries, kv_pages, context_lens, block_tables, query_start_loc, num_seqs, *, softmax_scale=None, "
        "logits_soft_cap=None, compute_dtype=bfloat16, optimized=False, sliding_window=None, softmax_aux=None, "
        "mask_value=None, num_kv_pages_per_block=None, num_queries_per_block=None, vmem_limit_bytes=None, "
        "num_warps=None, num_stages=None",
    ),
    Signature(
        "ejkernel kernels",
        "0.0.80.3",
        "ragged_page_attention_v3",
        "ejkernel.kernels._xla.ragged_page_attention_v3",
        "queries, keys, values, kv_cache, kv_lens, block_tables, query_start_loc, distribution, softmax_aux=None, *, "
        "softmax_scale=1.0, sliding_window=None, logits_soft_cap=None, q_scale=None, k_scale=None, v_scale=None, "
        "chunk_prefill_size=None, num_kv_pages_per_block=None, num_queries_per_block=None, vmem_limit_bytes=None",
    ),
    Signature(
        "ejkernel operations",
        "0.0.80.3",
        "page_attention",
        "ejkernel.modules.operations.page_attention",
        "query, key_cache, value_cache, context_lens, block_tables, /, *, attn_scale=None, max_context_len=None, "
        "num_splits=0, mask_value=-2.381976426469702e+38, attn_logits_soft_cap=None, pages_per_compute_block=None, "
        "megacore_mode=None, inline_seq_dim=True, sliding_window=None, platform=None, cfg=None",
    ),
    Signature(
        "ejkernel operations",
        "0.0.80.3",
        "prefill_page_attention",
        "ejkernel.modules.operations.prefill_page_attention",
        "query, key_cache, value_cache, context_len, page_indices, /, *, softmax_scale=None, "
        "mask_value=-2.381976426469702e+38, attn_logits_soft_cap=None, sliding_window=None, platform=None, cfg=None",
    ),
    Signature(
        "ejkernel operations",
        "0.0.80.3",
        "ragged_page_attention_v2",
        "ejkernel.modules.operations.ragged_page_attention_v2",
        "queries, kv_pages, context_lens, block_tables, query_start_loc, num_seqs, softmax_aux=None, /, *, "
        "softmax_scale=None, logits_soft_cap=None, compute_dtype=bfloat16, optimized=False, sliding_window=None, "
        "mask_value=None, vmem_limit_bytes=None, platform=None, cfg=None, mesh=None, in_specs=None, out_specs=None",
    ),
    Signature(
        "ejkernel operations",
        "0.0.80.3",
        "ragged_page_attention_v3",
        "ejkernel.modules.operations.ragged_page_attention_v3",
        "queries, keys, values, kv_cache, kv_lens, block_tables, query_start_loc, distribution, softmax_aux=None, /, "
        "*, softmax_scale=1.0, sliding_window=None, logits_soft_cap=None, q_scale=None, k_scale=None, v_scale=None, "
        "vmem_limit_bytes=None, platform=None, cfg=None, mesh=None, in_specs=None, out_specs=None",
    ),
    Signature(
        "tpu-inference",
        "commit b8692ff",
        "ragged_page_attention_v2",
        "tpu_inference.kernels.ragged_paged_attention.v2.kernel.ragged_paged_attention",
        "q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, *, sm_scale=1.0, sliding_window=None, "
        "soft_cap=None, mask_value=-2.381976426469702e+38, k_scale=None, v_scale=None, num_kv_pages_per_block=None, "
        "num_queries_per_block=None, vmem_limit_bytes=None",
    ),
    Signature(
        "tpu-inference",
        "commit b8692ff",
        "ragged_page_attention_v3",
        "tpu_inference.kernels.ragged_paged_attention.v3.kernel.ragged_paged_attention",
        "queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, *, use_causal_mask=True, "
        "update_kv_cache=True, skip_kv_mask=False, sm_scale=1.0, sliding_window=None, soft_cap=None, out_dtype=None, "
        "mask_value=None, q_scale=None, k_scale=None, v_scale=None, chunk_prefill_size=None, d_block_sizes=None, "
        "p_block_sizes=None, m_block_sizes=None, vmem_limit_bytes=None, debug_mode=False, disable_bounds_checks=True, "
        "disable_semaphore_checks=True",
    ),
    Signature(
        "tpu-inference",
        "commit b8692ff",
        "ragged_page_attention_v3",
        "tpu_inference.kernels.ragged_paged_attention.v3.kernel_hd64.ragged_paged_attention_hd64",
        "queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, attention_sink=None, *, "
        "sm_scale=1.0, sliding_window=None, soft_cap=None, mask_value=-2.381976426469702e+38, q_scale=None, "
        "k_scale=None, v_scale=None, chunk_prefill_size=None, num_kv_pages_per_block=None, "
        "num_queries_per_block=None, vmem_limit_bytes=None, debug_mode=False",
    ),
    Signature(
        "sglang-jax",
        "commit cddbf6f",
        "ragged_page_attention_v3",
        "sgl_jax.srt.kernels.ragged_paged_attention.ragged_paged_attention.ragged_paged_attention",
        "queries, keys, values, kv_cache_fused, kv_lens, page_indices, cu_q_lens, cu_kv_lens, distribution, "
        "custom_mask, *, causal=1, sm_scale=1.0, sliding_window=None, soft_cap=None, "
        "mask_value=-2.381976426469702e+38, q_scale=None, k_scale=None, v_scale=None, xai_temperature_len=None, "
        "softmax_dtype=None, chunk_prefill_size=None, num_kv_pages_per_block=None, num_queries_per_block=None, "
        "vmem_limit_bytes=None",
    ),
    Signature(
        "sglang-jax",
        "commit cddbf6f",
        "ragged_page_attention_v3",
        "sgl_jax.srt.kernels.ragged_paged_attention.ragged_paged_attention_v3.ragged_paged_attention",
        "queries, keys, values, kv_cache_fused, kv_lens, page_indices, cu_q_lens, cu_kv_lens, distribution, "
        "custom_mask, attention_sink=None, *, causal=1, sm_scale=1.0, sliding_window=None, soft_cap=None, "
        "mask_value=-2.381976426469702e+38, q_scale=None, k_scale=None, v_scale=None, xai_temperature_len=None, "
        "softmax_dtype=None, chunk_prefill_size=None, d_block_sizes=None, p_block_sizes=None, m_block_sizes=None, "
        "vmem_limit_bytes=None, out_dtype=None, skip_kv_mask=False, disable_semaphore_checks=True, debug_mode=False, "
        "mask_aligned_to_cu_kv=False",
    ),
    Signature(
        "EasyDeL",
        "commit 090a03b, with ejkernel 0.0.78",
        "ragged_page_attention_v2",
        "the call of easydel.operations.kernels.ragged_page_attention, version 2",
        "queries, kv_pages, context_lens, block_tables, query_start_loc, num_seqs, softmax_aux, /, *, softmax_scale, "
        "logits_soft_cap, vmem_limit_bytes, optimized, compute_dtype, mask_value, sliding_window, cfg, platform, "
        "in_specs, out_specs, mesh",
    ),
    Signature(
        "EasyDeL",
        "commit 090a03b, with ejkernel 0.0.78",
        "ragged_page_attention_v3",
        "the call of easydel.operations.kernels.ragged_page_attention, version 3",
        "queries, keys, values, kv_cache, kv_lens, block_tables, query_start_loc, distribution, softmax_aux, /, *, "
        "softmax_scale, logits_soft_cap, vmem_limit_bytes, sliding_window, cfg, platform, in_specs, out_specs, mesh",
    ),
)

# The fields of the object that ejkernel calls `cfg`, besides `platform` and `backend`.
CFG_FIELDS = {
    "page_attention": ("num_splits", "pages_per_compute_block", "num_warps", "num_stages"),
    "prefill_page_attention": ("block_k", "num_warps", "num_stages"),
    "ragged_page_attention_v2": ("num_kv_pages_per_block", "num_queries_per_block", "num_warps", "num_stages"),
    "ragged_page_attention_v3": (
        "chunk_prefill_size",
        "num_kv_pages_per_block",
        "num_queries_per_block",
        "num_warps",
        "num_stages",
    ),
}
