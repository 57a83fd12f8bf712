"""What the calls are timed beside: a copy of the same bytes, cuDNN and FlashInfer.

A peer that is not installed, or that refuses a shape, is a row with its reason.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .shapes import PAGE, Shape


def copy_of(size: int) -> Callable[[], Any]:
    """A call that reads and writes ``size`` bytes in all."""
    x = jnp.zeros(max(1, size // 8), jnp.int32)
    add = jax.jit(lambda x: x + 1)
    return lambda: add(x)


def cudnn(shape: Shape) -> Callable[[], Any]:
    """cuDNN's attention by `jax.nn.dot_product_attention`: of keys and values that lie densely, without pages."""
    dense = (shape.slots, shape.tokens, shape.kv_heads, shape.head_dim)
    q = jnp.ones((shape.slots, shape.rows, shape.q_heads, shape.head_dim), jnp.bfloat16)
    k, v = jnp.ones(dense, jnp.bfloat16), jnp.ones(dense, jnp.bfloat16)
    # Its causal mask is aligned at the first row. One row of the end sees everything, so that it needs no mask.
    if shape.rows > 1 or shape.window is not None:
        raise ValueError("its masks are not aligned at the end of the sequence")
    attend = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn"))
    return lambda: attend(q, k, v)


def flashinfer(shape: Shape) -> Callable[[], Any]:
    """FlashInfer's decode over the same pages, by torch."""
    missing = [name for name in ("torch", "flashinfer") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"not installed: {', '.join(missing)}")
    if shape.rows > 1:
        raise ValueError("only decode is timed")
    torch, library = importlib.import_module("torch"), importlib.import_module("flashinfer")
    device = {"device": "cuda"}
    per_seq = shape.tokens // PAGE
    pool = (shape.num_pages, 2, shape.kv_heads, PAGE, shape.head_dim)
    pages = torch.randn(pool, dtype=torch.bfloat16, **device)
    q = torch.randn((shape.slots, shape.q_heads, shape.head_dim), dtype=torch.bfloat16, **device)
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(torch.empty(2**28, dtype=torch.uint8, **device), "HND")
    starts = torch.arange(0, (shape.slots + 1) * per_seq, per_seq, dtype=torch.int32, **device)
    tables = torch.as_tensor(np.ascontiguousarray(shape.tables.reshape(-1)), **device)
    last = torch.full((shape.slots,), PAGE, dtype=torch.int32, **device)
    heads = (shape.q_heads, shape.kv_heads, shape.head_dim, PAGE)
    window = -1 if shape.window is None else shape.window - 1
    wrapper.plan(starts, tables, last, *heads, q_data_type=torch.bfloat16, window_left=window)

    def call() -> Any:
        out = wrapper.run(q, pages)
        torch.cuda.synchronize()
        return out

    return call


PEERS: dict[str, Callable[[Shape], Callable[[], Any]]] = {"cuDNN, dense": cudnn, "FlashInfer": flashinfer}
