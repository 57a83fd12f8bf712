"""What the entry points refuse: every error names the argument, when traced, on any target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.paged_attention.quantization_utils import QuantizedTensor

from paged.compat import page_attention, prefill_page_attention, ragged_page_attention_v2, ragged_page_attention_v3

Q, KV = jnp.ones((3, 4, 8)), jnp.ones((3, 2, 8))
SPLIT, INTER = jnp.ones((2, 6, 4, 8)), jnp.ones((6, 4, 4, 8))
QUANTISED = QuantizedTensor(SPLIT.astype(jnp.int8), jnp.ones((2, 6, 4, 1)))
LENGTHS, TABLES, STARTS = np.array([5, 1, 0]), np.array([[3, 1], [0, -1], [-1, -1]]), np.array([0, 1, 2, 3])


def page(**changes):
    named = {"query": Q, "key_cache": SPLIT, "value_cache": SPLIT, "context_lens": LENGTHS, "block_tables": TABLES}
    return page_attention(**{**named, **changes})


def prefill(query=Q, key_cache=SPLIT, value_cache=SPLIT, context_len=(5,), page_indices=(3, 1), **changes):
    return prefill_page_attention(query, key_cache, value_cache, list(context_len), list(page_indices), **changes)


def v2(**changes):
    named = {"query": Q, "kv_pages": INTER, "context_lens": LENGTHS, "block_tables": TABLES}
    return ragged_page_attention_v2(**{**named, "query_start_loc": STARTS, "num_seqs": 3, **changes})


def v3(**changes):
    named = {"queries": Q, "keys": KV, "values": KV, "kv_pages": jnp.array(INTER), "context_lens": LENGTHS}
    named |= {"block_tables": TABLES.reshape(-1), "query_start_loc": STARTS, "distribution": [0, 0, 3]}
    return ragged_page_attention_v3(**{**named, **changes})


def traced_scale(scale):
    return page(attn_scale=scale)


SHAPES = {
    "query rank": (lambda: page(query=Q[0]), r"query must be \[tokens, heads, head_dim\].*got \(4, 8\)"),
    "query of two steps": (
        lambda: page(query=jnp.ones((3, 2, 4, 8))), r"query must be \[batch, seq, .* = \[\*, 1, \*, \*\]"),
    "query of two prompts": (lambda: prefill(query=jnp.ones((2, 3, 4, 8))), r"query must be \[1, chunk, heads"),
    "query heads": (lambda: page(query=Q[:, :3]), "query has 3 heads, which must be a multiple of the 2 KV heads of "
                    "key_cache; key_cache is .kv_heads, pages, page_size, head_dim., and no other order is guessed"),
    "pages before heads": (lambda: page(key_cache=SPLIT.swapaxes(0, 1), value_cache=SPLIT.swapaxes(0, 1)),
                           "query has 4 heads, .* multiple of the 6 KV heads of key_cache"),
    "key_cache rank": (lambda: page(key_cache=SPLIT[0]), r"key_cache must be \[kv_heads, pages, page_size, head_dim\]"),
    "key_cache dim": (lambda: page(key_cache=SPLIT[..., :4]), r"key_cache must be .* = \[\*, \*, \*, 8\]"),
    "value_cache pages": (lambda: page(value_cache=SPLIT[:, :5]), r"value_cache must be .* as key_cache = \[2, 6, 4"),
    "context_lens": (lambda: page(context_lens=LENGTHS[:2]), r"context_lens must be .*= \[3\]; got \(2,\)"),
    "block_tables": (lambda: page(block_tables=TABLES[:2]), r"block_tables must be \[seqs, max_blocks\] = \[3, \*\]"),
    "context_len": (lambda: prefill(context_len=(5, 6)), r"context_len must be one sequence's.*got \(2,\)"),
    "page_indices": (lambda: prefill(page_indices=[(3, 1)]), r"page_indices must be one sequence's.*got \(1, 2\)"),
    "v2 query": (lambda: v2(query=Q[0]), r"query must be \[tokens, heads, head_dim\]"),
    "v2 query heads": (lambda: v2(query=Q[:, :3]), "query has 3 heads, .* of the 2 KV heads of kv_pages"),
    "v2 pages rank": (lambda: v2(kv_pages=INTER[0]), r"kv_pages must be .*or packed .*got \(4, 4, 8\)"),
    "v2 pages heads": (lambda: v2(kv_pages=INTER[:, :, :3]), "kv_pages must be .*an even number of heads.*3 heads"),
    "v2 pages dim": (lambda: v2(kv_pages=INTER[..., :4]), "kv_pages must have the queries' head_dim of 8, or 128"),
    "v2 lengths": (lambda: v2(context_lens=LENGTHS[None]), r"context_lens must be \[seqs\]"),
    "v2 starts": (lambda: v2(query_start_loc=STARTS[:3]), r"query_start_loc must be .* = \[4\]; got \(3,\)"),
    "v2 tables": (lambda: v2(block_tables=TABLES.reshape(-1)), r"block_tables must be .*= \[3, \*\]"),
    "num_seqs": (lambda: v2(num_seqs=np.array([3, 3])), r"num_seqs must be one number, \[1\] or \[\]; got \(2,\)"),
    "num_seqs over": (lambda: v2(num_seqs=4), r"num_seqs must be in \[0, 3\].*got 4"),
    "num_seqs under": (lambda: v2(num_seqs=np.array([-1])), r"num_seqs must be in \[0, 3\].*got -1"),
    "sinks": (lambda: v2(softmax_aux=jnp.zeros((3, 4))), r"softmax_aux must be \[q_heads\] = \[4\].*got \(3, 4\)"),
    "keys": (lambda: v3(keys=KV[:2]), r"keys must be \[tokens, kv_heads, head_dim\] = \[3, \*, 8\]; got \(2, 2, 8\)"),
    "values": (lambda: v3(values=KV[..., :4]), r"values must be .* = \[3, 2, 8\]; got \(3, 2, 4\)"),
    "keys heads": (lambda: v3(keys=Q, values=Q), "kv_pages must be .*with 2 . 4 heads, keys' 4 twice.*4 heads"),
    "v3 queries": (lambda: v3(queries=Q[:, :3]), "queries has 3 heads"),
    "v3 tables": (lambda: v3(block_tables=TABLES), r"block_tables must be flat.*got \(3, 2\)"),
    "v3 tables width": (lambda: v3(block_tables=np.zeros(7, int)), "a multiple of context_lens' 3; got .7,."),
    "distribution": (lambda: v3(distribution=[3]), r"distribution must be \[decode_end, prefill_end, total\] = \[3\]"),
    "distribution order": (lambda: v3(distribution=[2, 1, 3]), r"distribution must .*not decrease.*\[2, 1, 3\]"),
    "distribution of old": (lambda: v3(distribution=[2, 100, 16]), "at most context_lens' 3.*will do for n live"),
    "scale 1": (lambda: page(attn_scale=np.inf), "attn_scale must be finite; got inf.*leave it out"),
    "scale 2": (lambda: v2(softmax_scale=np.nan), "softmax_scale must be finite; got nan"),
    "cap 1": (lambda: page(attn_logits_soft_cap=0.0), "attn_logits_soft_cap must be positive .*got 0.0.*leave it out"),
    "cap 2": (lambda: v3(logits_soft_cap=-1), "logits_soft_cap must be positive"),
    "window 1": (lambda: page(sliding_window=0), "sliding_window must be at least 1; got 0"),
    "window 2": (lambda: v3(sliding_window=-1), "sliding_window must be at least 1; got -1"),
    "window pair": (lambda: v2(sliding_window=(4, -1)), "sliding_window must be at least 0; got -1"),
    "window three": (lambda: v2(sliding_window=(4, 0, 0)), r"a pair .left, right. of tokens beside it; got .4, 0, 0."),
    "window, no mask": (lambda: v3(sliding_window=(4, 0), use_causal_mask=False), "or under a causal mask a pair"),
    "scale of keys": (lambda: v3(k_scale=0.0), "k_scale must be positive and finite; got 0.0"),
    "scale of queries": (lambda: v3(q_scale=-1.0), "q_scale must be positive and finite; got -1.0"),
    "block sizes": (lambda: v3(m_block_sizes=(64, 0, 1, 1)), "m_block_sizes must be at least 1; got 0"),
    "scales": (lambda: page(key_cache=QUANTISED._replace(scales=jnp.ones((2, 6, 4))), value_cache=QUANTISED),
               r"key_cache.scales must be one scale for each row of its weight = \[2, 6, 4, 1\]; got \(2, 6, 4\)"),
    "mask 1": (lambda: page(mask_value=-1e4), "mask_value=-10000.0 could give hidden keys a weight.*leave it out"),
    "mask 2": (lambda: prefill(mask_value=0.0), "mask_value=0.0 could"),
    "mask 3": (lambda: v2(mask_value=np.nan), "mask_value=nan could"),
    "max_context_len": (lambda: page(max_context_len=0), "max_context_len must be at least 1; got 0"),
    "num_splits": (lambda: page(num_splits=-1), "num_splits must be at least 0; got -1"),
    "blocks 1": (lambda: page(pages_per_compute_block=0), "pages_per_compute_block must be at least 1; got 0"),
    "blocks 2": (lambda: v2(num_kv_pages_per_block=0), "num_kv_pages_per_block must be at least 1"),
    "blocks 3": (lambda: v2(num_queries_per_block=0), "num_queries_per_block must be at least 1"),
    "vmem": (lambda: v3(vmem_limit_bytes=0), "vmem_limit_bytes must be at least 1; got 0"),
    "megacore": (lambda: page(megacore_mode="both"), r"megacore_mode must be one of \(None, 'batch', 'kv_head'\)"),
    "target": (lambda: page(target="cuda"), "target must be one of .*got 'cuda'"),
    "interpret": (lambda: page(target="xla", interpret=True), "interpret=True is for kernels"),
}  # fmt: skip

TYPES = {
    "list": (lambda: page(query=[[1.0]]), "query must be an array; got list"),
    "none": (lambda: v2(kv_pages=None), "kv_pages must be an array; got NoneType"),
    "query dtype": (lambda: page(query=Q.astype(int)), "query must be float16, bfloat16 or float32; got int32"),
    "keys dtype": (lambda: v3(keys=KV.astype(int)), "keys must be float16, bfloat16 or float32; got int32"),
    "quantised": (lambda: page(key_cache=SPLIT.astype(jnp.int8)), "key_cache must be .*got int8. Quantised pages need "
                  "their scales: pass an object with weight, int8, and scales, as JAX's QuantizedTensor"),
    "quantised v3": (lambda: v3(kv_pages=INTER.astype(jnp.float8_e4m3fn)), "kv_pages must be .*float8_e4m3fn. int8 and "
                     "float8 pages need k_scale and v_scale"),
    "quantised rows": (lambda: v3(keys=KV.astype("int8"), values=KV.astype("int8"), kv_pages=INTER.astype("int8")),
                       "kv_pages must be .*int8. int8 and float8 pages need k_scale and v_scale"),
    "one scale": (lambda: v2(kv_pages=INTER.astype(jnp.int8), k_scale=1.0), "int8 and float8 pages need k_scale and v"),
    "one quantised": (lambda: page(key_cache=QUANTISED), "must both be quantised, or neither"),
    "quantised floats": (lambda: page(key_cache=QUANTISED._replace(weight=SPLIT), value_cache=QUANTISED),
                         "key_cache.weight must be int8; got float32"),
    "mixed caches": (lambda: page(value_cache=SPLIT.astype(jnp.bfloat16)), "value_cache must be of key_cache's dtype"),
    "lengths": (lambda: page(context_lens=jnp.ones(3)), "context_lens must be int32; got float32"),
    "tables": (lambda: v2(block_tables=jnp.ones((3, 2))), "block_tables must be int32; got float32"),
    "starts": (lambda: v2(query_start_loc=jnp.ones(4)), "query_start_loc must be int32"),
    "num_seqs": (lambda: v2(num_seqs=jnp.ones(())), "num_seqs must be int32; got float32"),
    "distribution": (lambda: v3(distribution=jnp.ones(3)), "distribution must be int32; got float32"),
    "sinks": (lambda: v2(softmax_aux=jnp.zeros(4, int)), "softmax_aux must be float32; got int32"),
    "window floats": (lambda: v2(sliding_window=(4.0, 0)), "sliding_window must be a Python int; got 4.0"),
    "scale of keys": (lambda: v2(k_scale="1"), "k_scale must be a number; got '1'"),
    "out_dtype": (lambda: v3(out_dtype="int8"), "out_dtype must be float16, bfloat16 or float32; got 'int8'"),
    "no causal": (lambda: v3(use_causal_mask=None), "use_causal_mask must be True or False; got None"),
    "no write": (lambda: v3(update_kv_cache=1), "update_kv_cache must be True or False; got 1"),
    "block sizes": (lambda: v3(m_block_sizes=64), "m_block_sizes must be four sizes of blocks.*got 64"),
    "window float": (lambda: page(sliding_window=4.0), "sliding_window must be a Python int; got 4.0"),
    "compute_dtype": (lambda: v2(compute_dtype="int8"), "compute_dtype must be float16.*got 'int8'"),
    "compute nothing": (lambda: v2(compute_dtype="fast"), "compute_dtype must be .*got 'fast'"),
    "optimized": (lambda: v2(optimized=1), "optimized must be True or False; got 1"),
    "inline_seq_dim": (lambda: page(inline_seq_dim=None), "inline_seq_dim must be True or False; got None"),
    "scale": (lambda: page(attn_scale="1"), "attn_scale must be a number; got '1'"),
    "traced scale": (lambda: jax.jit(traced_scale)(0.5), "attn_scale must be known when JAX traces.*1 / math.sqrt"),
    "traced window": (lambda: jax.jit(lambda w: page(sliding_window=w))(4), "sliding_window must be known when J"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_values_and_shapes_are_refused_by_the_callers_names(name):
    act, text = SHAPES[name]
    with pytest.raises(ValueError, match=text):
        act()


@pytest.mark.parametrize("name", TYPES)
def test_types_and_dtypes_are_refused_by_the_callers_names(name):
    act, text = TYPES[name]
    with pytest.raises(TypeError, match=text):
        act()


def test_shapes_are_refused_when_traced():
    with pytest.raises(ValueError, match="context_lens must be"):
        jax.eval_shape(lambda lengths: page(context_lens=lengths), jax.ShapeDtypeStruct((2,), jnp.int32))


def test_what_is_refused_on_one_target_is_refused_on_all():
    for target in ("auto", "xla", "tpu"):
        with pytest.raises(ValueError, match="num_splits must be at least 0"):
            page(num_splits=-1, target=target)


def test_a_traced_distribution_is_taken_as_it_is():
    out, _ = jax.eval_shape(lambda ends: v3(distribution=ends), jax.ShapeDtypeStruct((3,), jnp.int32))
    assert out.shape == Q.shape
