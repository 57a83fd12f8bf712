"""Peers, where they can be imported: never a dependency, and a reason in the table where they cannot."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tpu.peer_modules import RAGGED_VMEM_BYTES, array, refuse, terms, tpu_inference

from .shapes import Shape

_PAGES_A_BLOCK = 16  # of JAX's paged_attention, which has no default
_LONG_BLOCK, _SHORT_BLOCK = 1024, 256  # KV tokens a block of RPA v3: the best that were tried

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def _jax_paged(shape: Shape) -> Call:
    refuse(shape, "window", "sinks")
    attention = importlib.import_module("jax.experimental.pallas.ops.tpu.paged_attention").paged_attention
    pool = array(shape.kv_heads, shape.pool_pages, shape.page_size, shape.head_dim)
    attend = functools.partial(
        attention, pages_per_compute_block=_PAGES_A_BLOCK, attn_logits_soft_cap=shape.soft_cap, inline_seq_dim=True
    )
    return lambda q, k, v, lengths, tables: attend(q, k, v, lengths, tables), (
        array(shape.num_seqs, shape.q_heads, shape.head_dim),
        pool,
        pool,
        np.asarray(shape.lengths, np.int32),
        shape.tables(),
    )


def _jax_ragged(shape: Shape) -> Call:
    refuse(shape, "sinks")
    module = importlib.import_module("jax.experimental.pallas.ops.tpu.ragged_paged_attention")
    attend = functools.partial(module.ragged_paged_attention, **terms(shape), vmem_limit_bytes=RAGGED_VMEM_BYTES)
    return lambda *arrays: attend(*arrays), (
        array(shape.num_seqs, shape.q_heads, shape.head_dim),
        array(shape.pool_pages, shape.page_size, 2 * shape.kv_heads, shape.head_dim),
        np.asarray(shape.lengths, np.int32),
        shape.tables(),
        np.arange(shape.num_seqs + 1, dtype=np.int32),
        np.array([shape.num_seqs], np.int32),
    )


def _tpu_inference(shape: Shape, *, is_read_only: bool = False, is_tuned: bool = False) -> Call:
    """By default it also writes the new token into the cache, and takes blocks as long as a sequence up to 16 MiB."""
    refuse(shape, "sinks")
    module = tpu_inference("kernel")
    cache = module.get_kv_cache_shape(
        shape.pool_pages, shape.page_size, shape.kv_heads, shape.head_dim, jnp.dtype(jnp.bfloat16)
    )
    extra: dict[str, Any] = {"update_kv_cache": False} if is_read_only else {}
    if is_tuned:
        block = _SHORT_BLOCK if max(shape.lengths) < _LONG_BLOCK else _LONG_BLOCK
        extra["d_block_sizes"] = (1, block, 1, block)
    attend = functools.partial(module.ragged_paged_attention, **terms(shape), **extra)
    return lambda *arrays: attend(*arrays), _with_new_tokens(shape, cache)


def _tpu_inference_hd64(shape: Shape, *, is_tuned: bool = False) -> Call:
    """By default its blocks are 2048 or 4096 tokens, also under a window; and it writes the new token."""
    module = tpu_inference("kernel_hd64")
    cache = module.get_kv_cache_shape(
        shape.pool_pages, shape.page_size, shape.kv_heads, shape.head_dim, jnp.dtype(jnp.bfloat16)
    )
    pages = _SHORT_BLOCK // shape.page_size
    extra = {"num_kv_pages_per_block": pages, "num_queries_per_block": 1} if is_tuned else {}
    attend = functools.partial(module.ragged_paged_attention_hd64, **terms(shape), **extra)
    sinks = (jax.ShapeDtypeStruct((shape.q_heads,), jnp.float32),) if shape.has_sinks else ()
    return lambda *arrays: attend(*arrays), (*_with_new_tokens(shape, cache), *sinks)


BUILDERS: dict[str, Callable[[Shape], Call]] = {
    "JAX paged_attention": _jax_paged,
    "JAX ragged_paged_attention": _jax_ragged,
    "tpu-inference RPA v3": _tpu_inference,
    "tpu-inference RPA v3, read only": functools.partial(_tpu_inference, is_read_only=True),
    "tpu-inference RPA v3, read only, tuned": functools.partial(_tpu_inference, is_read_only=True, is_tuned=True),
    "tpu-inference RPA v3 hd64": _tpu_inference_hd64,
    "tpu-inference RPA v3 hd64, tuned": functools.partial(_tpu_inference_hd64, is_tuned=True),
}
HEAD_64 = [name for name in BUILDERS if "hd64" in name]


def _with_new_tokens(shape: Shape, cache: tuple[int, ...]) -> tuple[Any, ...]:
    """Arguments of tpu-inference's kernels, which take this step's keys and values and write them as they attend."""
    seqs = shape.num_seqs
    new = array(seqs, shape.kv_heads, shape.head_dim)
    return (
        array(seqs, shape.q_heads, shape.head_dim),
        new,
        new,
        array(*cache),
        np.asarray(shape.lengths, np.int32),
        shape.tables().reshape(-1),
        np.arange(seqs + 1, dtype=np.int32),
        np.array([seqs, seqs, seqs], np.int32),  # all of them decode
    )
