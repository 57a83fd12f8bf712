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

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def _jax_ragged(shape: Shape) -> Call:
    refuse(shape, "sinks")
    module = importlib.import_module("jax.experimental.pallas.ops.tpu.ragged_paged_attention")
    attend = functools.partial(module.ragged_paged_attention, **terms(shape), vmem_limit_bytes=RAGGED_VMEM_BYTES)
    return lambda *arrays: attend(*arrays), (
        array(shape.num_rows, shape.q_heads, shape.head_dim),
        array(shape.pool_pages, shape.page_size, 2 * shape.kv_heads, shape.head_dim),
        np.asarray(shape.lengths, np.int32),
        shape.tables(),
        shape.query_starts(),
        np.array([len(shape.seqs)], np.int32),
    )


def _tpu_inference(shape: Shape) -> Call:
    """As its users call it: a kernel for the decode rows and one for the rest, which also write the new tokens."""
    refuse(shape, "sinks")
    module = tpu_inference("kernel")
    attend = functools.partial(module.ragged_paged_attention, **terms(shape))
    return lambda *arrays: attend(*arrays), _with_new_tokens(shape, module)


def _tpu_inference_hd64(shape: Shape) -> Call:
    """It also writes the new tokens."""
    module = tpu_inference("kernel_hd64")
    attend = functools.partial(module.ragged_paged_attention_hd64, **terms(shape))
    sinks = (jax.ShapeDtypeStruct((shape.q_heads,), jnp.float32),) if shape.has_sinks else ()
    return lambda *arrays: attend(*arrays), (*_with_new_tokens(shape, module), *sinks)


def _with_new_tokens(shape: Shape, module: Any) -> tuple[Any, ...]:
    """Arguments of tpu-inference's kernels, which take this step's keys and values and write them as they attend."""
    rows, seqs = shape.rows, len(shape.seqs)
    num_decode = next((i for i, count in enumerate(rows) if count > 1), seqs)
    if 1 in rows[num_decode:]:
        raise NotImplementedError("the peer wants decode rows before all others")
    cache = module.get_kv_cache_shape(
        shape.pool_pages, shape.page_size, shape.kv_heads, shape.head_dim, jnp.dtype(jnp.bfloat16)
    )
    new = array(shape.num_rows, shape.kv_heads, shape.head_dim)
    return (
        array(shape.num_rows, shape.q_heads, shape.head_dim),
        new,
        new,
        array(*cache),
        np.asarray(shape.lengths, np.int32),
        shape.tables().reshape(-1),
        shape.query_starts(),
        np.array([num_decode, num_decode, seqs], np.int32),  # no chunks of a static size
    )


def _ejkernel(shape: Shape) -> Call:
    """One chunk, a multiple of the page. With more than one KV head it hangs, so only what it issues is counted."""
    refuse(shape, "sinks")
    attention = importlib.import_module("ejkernel.kernels._pallas.tpu.prefill_page_attention").prefill_page_attention
    pool = array(shape.kv_heads, shape.pool_pages, shape.page_size, shape.head_dim)
    attend = functools.partial(attention, attn_logits_soft_cap=shape.soft_cap, sliding_window=shape.window)
    return lambda q, k, v, length, table: attend(q, k, v, length, table), (
        array(shape.num_rows, shape.q_heads, shape.head_dim),
        pool,
        pool,
        np.asarray(shape.lengths, np.int32),
        shape.tables()[0],
    )


BUILDERS: dict[str, Callable[[Shape], Call]] = {
    "JAX ragged_paged_attention": _jax_ragged,
    "tpu-inference RPA v3": _tpu_inference,
    "tpu-inference RPA v3 hd64": _tpu_inference_hd64,
    "ejkernel prefill_page_attention": _ejkernel,
}
HEAD_64 = ("tpu-inference RPA v3 hd64",)
ONE_CHUNK = ("ejkernel prefill_page_attention",)
