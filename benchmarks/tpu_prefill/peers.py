"""Peers, where they can be imported: never a dependency, and a reason in the table where they cannot."""

import functools
import importlib
from collections.abc import Callable

import numpy as np

from benchmarks.tpu import Call
from benchmarks.tpu.peers import array, jax_ragged, refuse, rpa_v3, rpa_v3_hd64

from .shapes import Shape


def _ejkernel(shape: Shape) -> Call:
    """One chunk, a multiple of the page. With more than one KV head it hangs, so only what it issues is counted."""
    refuse(shape, "sinks")
    attention = importlib.import_module("ejkernel.kernels._pallas.tpu.prefill_page_attention").prefill_page_attention
    pool = array(shape.kv_heads, shape.pool_pages, shape.page_size, shape.head_dim)
    attend = functools.partial(attention, attn_logits_soft_cap=shape.soft_cap, sliding_window=shape.window)
    return (
        lambda q, k, v, length, table: attend(q, k, v, length, table),
        (
            array(shape.num_rows, shape.q_heads, shape.head_dim),
            pool,
            pool,
            np.asarray(shape.lengths, np.int32),
            shape.tables()[0],
        ),
        (),
    )


BUILDERS: dict[str, Callable[[Shape], Call]] = {
    "JAX ragged_paged_attention": jax_ragged,
    "tpu-inference RPA v3": rpa_v3,
    "tpu-inference RPA v3 hd64": rpa_v3_hd64,
    "ejkernel prefill_page_attention": _ejkernel,
}
WRITING = ("tpu-inference RPA v3", "tpu-inference RPA v3 hd64")
HEAD_64 = ("tpu-inference RPA v3 hd64",)
ONE_CHUNK = ("ejkernel prefill_page_attention",)
