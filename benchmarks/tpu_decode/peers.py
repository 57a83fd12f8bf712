"""Peers, where they can be imported: never a dependency, and a reason in the table where they cannot."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.tpu import Call
from benchmarks.tpu.peers import array, jax_ragged, refuse, rpa_v3, rpa_v3_hd64

from .shapes import Shape

_PAGES_A_BLOCK = 16  # of JAX's paged_attention, which has no default
_LONG_BLOCK, _SHORT_BLOCK = 1024, 256  # KV tokens per block of RPA v3: the best that were tried


def _jax_paged(shape: Shape) -> Call:
    refuse(shape, "window", "sinks")
    attention = importlib.import_module("jax.experimental.pallas.ops.tpu.paged_attention").paged_attention
    pool = array(shape.kv_heads, shape.pool_pages, shape.page_size, shape.head_dim)
    attend = functools.partial(
        attention, pages_per_compute_block=_PAGES_A_BLOCK, attn_logits_soft_cap=shape.soft_cap, inline_seq_dim=True
    )
    scale = shape.head_dim**-0.5  # which its callers multiply queries with
    return (
        lambda q, k, v, lengths, tables: attend(q * scale, k, v, lengths, tables),
        (
            array(shape.num_seqs, shape.q_heads, shape.head_dim),
            pool,
            pool,
            np.asarray(shape.lengths, np.int32),
            shape.tables(),
        ),
        (),
    )


def _read_only(shape: Shape, **extra: Any) -> Call:
    """By default it also writes the new token into the cache, and takes blocks as long as a sequence up to 16 MiB."""
    return rpa_v3(shape, update_kv_cache=False, **extra)


def _read_only_tuned(shape: Shape) -> Call:
    block = _SHORT_BLOCK if max(shape.lengths) < _LONG_BLOCK else _LONG_BLOCK
    return _read_only(shape, d_block_sizes=(1, block, 1, block))


def _hd64_tuned(shape: Shape) -> Call:
    """By default its blocks are 2048 or 4096 tokens, also under a window."""
    return rpa_v3_hd64(shape, num_kv_pages_per_block=_SHORT_BLOCK // shape.page_size, num_queries_per_block=1)


BUILDERS: dict[str, Callable[[Shape], Call]] = {
    "JAX paged_attention": _jax_paged,
    "JAX ragged_paged_attention": jax_ragged,
    "tpu-inference RPA v3": rpa_v3,
    "tpu-inference RPA v3, read only": _read_only,
    "tpu-inference RPA v3, read only, tuned": _read_only_tuned,
    "tpu-inference RPA v3 hd64": rpa_v3_hd64,
    "tpu-inference RPA v3 hd64, tuned": _hd64_tuned,
}
WRITING = [name for name in BUILDERS if "RPA v3" in name and "read only" not in name]
HEAD_64 = [name for name in BUILDERS if "hd64" in name]
