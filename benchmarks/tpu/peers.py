"""Peers that take batches of any rows, and what their calls have in common."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .peer_modules import tpu_inference
from .shape import Shape

Call = tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]  # function, arguments, which of them are donated
_CACHE = (3,)  # where tpu-inference's kernels take the pages, which they write in place
_RAGGED_VMEM_BYTES = 56 << 20  # of JAX's ragged kernel, whose own blocks don't fit its own limit on v5e and v5p


def array(*dims: int) -> jax.ShapeDtypeStruct:
    """A bfloat16 argument."""
    return jax.ShapeDtypeStruct(dims, jnp.bfloat16)


def refuse(shape: Shape, *lacking: str) -> None:
    """Say which terms the peer lacks, rather than measure it on another attention."""
    has = {"window": shape.window is not None, "sinks": shape.has_sinks}
    lacks = [term for term in lacking if has[term]]
    if lacks:
        raise NotImplementedError(f"the peer takes no {' and no '.join(lacks)}")


def jax_ragged(shape: Shape) -> Call:
    """JAX's ``ragged_paged_attention``."""
    refuse(shape, "sinks")
    module = importlib.import_module("jax.experimental.pallas.ops.tpu.ragged_paged_attention")
    attend = functools.partial(module.ragged_paged_attention, **_terms(shape), vmem_limit_bytes=_RAGGED_VMEM_BYTES)
    return (
        lambda *arrays: attend(*arrays),
        (
            array(shape.num_rows, shape.q_heads, shape.head_dim),
            array(shape.pool_pages, shape.page_size, 2 * shape.kv_heads, shape.head_dim),
            np.asarray(shape.lengths, np.int32),
            shape.tables(),
            shape.query_starts(),
            np.array([shape.num_seqs], np.int32),
        ),
        (),
    )


def rpa_v3(shape: Shape, **extra: Any) -> Call:
    """tpu-inference's, as its users call it: a kernel for the decode rows and one for the rest, which also write."""
    refuse(shape, "sinks")
    module = tpu_inference("kernel")
    attend = functools.partial(module.ragged_paged_attention, **_terms(shape), **extra)
    return lambda *arrays: attend(*arrays), _with_new_tokens(shape, module), _CACHE


def rpa_v3_hd64(shape: Shape, **extra: Any) -> Call:
    """tpu-inference's for heads of 64. It also writes the new tokens."""
    module = tpu_inference("kernel_hd64")
    attend = functools.partial(module.ragged_paged_attention_hd64, **_terms(shape), **extra)
    sinks = (jax.ShapeDtypeStruct((shape.q_heads,), jnp.float32),) if shape.has_sinks else ()
    return lambda *arrays: attend(*arrays), (*_with_new_tokens(shape, module), *sinks), _CACHE


def _terms(shape: Shape) -> dict[str, Any]:
    """A shape's score terms as the ragged kernels name them."""
    return {"sm_scale": shape.head_dim**-0.5, "sliding_window": shape.window, "soft_cap": shape.soft_cap}


def _with_new_tokens(shape: Shape, module: Any) -> tuple[Any, ...]:
    """Arguments of tpu-inference's kernels, which take this step's keys and values and write them as they attend."""
    rows, seqs = shape.rows, shape.num_seqs
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
