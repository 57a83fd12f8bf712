"""Peers, where they can be imported: never a dependency, and a reason in the table where they cannot."""

import functools
import importlib
import importlib.util
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .shapes import Shape

_PAGES_A_BLOCK = 16  # of JAX's paged_attention, which has no default
_RAGGED_VMEM_BYTES = 56 << 20  # of JAX's ragged kernel, whose own blocks don't fit its own limit on v5e and v5p
_LONG_BLOCK, _SHORT_BLOCK = 1024, 256  # KV tokens a block of RPA v3: the best that were tried
_TPU_INFERENCE = "tpu_inference.kernels.ragged_paged_attention.v3"
# What tpu-inference calls the chips; its tables of block sizes go by these names.
_DEVICE_NAMES = {"TPU v5 lite": "TPU v5e", "TPU v6 lite": "TPU v6e", "TPU7x": "TPU v7"}

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def _jax_paged(shape: Shape) -> Call:
    _refuse(shape, "window", "sinks")
    attention = importlib.import_module("jax.experimental.pallas.ops.tpu.paged_attention").paged_attention
    pool = _array(shape.kv_heads, shape.pool_pages, shape.page_size, shape.head_dim)
    attend = functools.partial(
        attention, pages_per_compute_block=_PAGES_A_BLOCK, attn_logits_soft_cap=shape.soft_cap, inline_seq_dim=True
    )
    return lambda q, k, v, lengths, tables: attend(q, k, v, lengths, tables), (
        _array(shape.num_seqs, shape.q_heads, shape.head_dim),
        pool,
        pool,
        np.asarray(shape.lengths, np.int32),
        shape.tables(),
    )


def _jax_ragged(shape: Shape) -> Call:
    _refuse(shape, "sinks")
    module = importlib.import_module("jax.experimental.pallas.ops.tpu.ragged_paged_attention")
    attend = functools.partial(module.ragged_paged_attention, **_terms(shape), vmem_limit_bytes=_RAGGED_VMEM_BYTES)
    return lambda *arrays: attend(*arrays), (
        _array(shape.num_seqs, shape.q_heads, shape.head_dim),
        _array(shape.pool_pages, shape.page_size, 2 * shape.kv_heads, shape.head_dim),
        np.asarray(shape.lengths, np.int32),
        shape.tables(),
        np.arange(shape.num_seqs + 1, dtype=np.int32),
        np.array([shape.num_seqs], np.int32),
    )


def _tpu_inference(shape: Shape, *, is_read_only: bool = False, is_tuned: bool = False) -> Call:
    """By default it also writes the new token into the cache, and takes blocks as long as a sequence up to 16 MiB."""
    _refuse(shape, "sinks")
    module = _tpu_inference_module("kernel")
    cache = module.get_kv_cache_shape(
        shape.pool_pages, shape.page_size, shape.kv_heads, shape.head_dim, jnp.dtype(jnp.bfloat16)
    )
    extra: dict[str, Any] = {"update_kv_cache": False} if is_read_only else {}
    if is_tuned:
        block = _SHORT_BLOCK if max(shape.lengths) < _LONG_BLOCK else _LONG_BLOCK
        extra["d_block_sizes"] = (1, block, 1, block)
    attend = functools.partial(module.ragged_paged_attention, **_terms(shape), **extra)
    return lambda *arrays: attend(*arrays), _with_new_tokens(shape, cache)


def _tpu_inference_hd64(shape: Shape, *, is_tuned: bool = False) -> Call:
    """By default its blocks are 2048 or 4096 tokens, also under a window; and it writes the new token."""
    module = _tpu_inference_module("kernel_hd64")
    cache = module.get_kv_cache_shape(
        shape.pool_pages, shape.page_size, shape.kv_heads, shape.head_dim, jnp.dtype(jnp.bfloat16)
    )
    pages = _SHORT_BLOCK // shape.page_size
    extra = {"num_kv_pages_per_block": pages, "num_queries_per_block": 1} if is_tuned else {}
    attend = functools.partial(module.ragged_paged_attention_hd64, **_terms(shape), **extra)
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
    new = _array(seqs, shape.kv_heads, shape.head_dim)
    return (
        _array(seqs, shape.q_heads, shape.head_dim),
        new,
        new,
        _array(*cache),
        np.asarray(shape.lengths, np.int32),
        shape.tables().reshape(-1),
        np.arange(seqs + 1, dtype=np.int32),
        np.array([seqs, seqs, seqs], np.int32),  # all of them decode
    )


def _terms(shape: Shape) -> dict[str, Any]:
    return {"sm_scale": shape.head_dim**-0.5, "sliding_window": shape.window, "soft_cap": shape.soft_cap}


def _refuse(shape: Shape, *terms: str) -> None:
    """Say which terms the peer lacks, rather than measure it on another attention."""
    has = {"window": shape.window is not None, "sinks": shape.has_sinks}
    lacks = [term for term in terms if has[term]]
    if lacks:
        raise NotImplementedError(f"the peer takes no {' and no '.join(lacks)}")


def _array(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.bfloat16)


def _tpu_inference_module(name: str) -> Any:
    """A kernel's module, found in the installed package without running the package, which would want vLLM.

    The kernels need two names of it beside their own folder: a logger and the device's name.
    """
    if "tpu_inference" not in sys.modules:
        found = importlib.util.find_spec("tpu_inference")
        if found is None or found.submodule_search_locations is None:
            raise ModuleNotFoundError("not importable: `pip install --no-deps tpu-inference`")
        package = types.ModuleType("tpu_inference")
        package.__path__ = list(found.submodule_search_locations)
        logger, utils = (types.ModuleType(f"tpu_inference.{part}") for part in ("logger", "utils"))
        vars(logger)["init_logger"] = _Logger
        vars(utils)["get_device_name"] = _device_name
        for module in (package, logger, utils):
            sys.modules[module.__name__] = module
    return importlib.import_module(f"{_TPU_INFERENCE}.{name}")


class _Logger(logging.Logger):
    """A logger with the two methods that vLLM adds."""

    warning_once = logging.Logger.warning
    info_once = logging.Logger.info


def _device_name(num_devices: int | None = None) -> str:
    kind = jax.devices()[0].device_kind
    name = str(_DEVICE_NAMES.get(kind, kind))
    return name if num_devices is None else f"{name}-{num_devices}"
