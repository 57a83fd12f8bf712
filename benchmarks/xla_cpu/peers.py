"""Peers, where they can be imported: never a dependency, and a reason in the table where they cannot."""

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .inputs import HEAD_DIM, KV_HEADS, Inputs, dense
from .measure import Candidate, compiled

_TOLERANCE = 0.05  # of outputs near 0.1 to 1: a peer that is further off computes something else

Maker = Callable[[], Candidate]


def accept(makers: dict[str, Maker], expected: Any) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The peers that could be made and agree with ``expected``, and for each of the others why not."""
    candidates, reasons = {}, {}
    for name, make in makers.items():
        try:
            candidate = make()
            got = _as_numpy(candidate.call())
        except ImportError as error:
            reasons[name] = f"not importable: {error}"
        except Exception as error:  # a peer that fails is a row of the table, whatever it raises
            reasons[name] = f"fails: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
        else:
            distance = float(np.max(np.abs(got - _as_numpy(expected))))
            if distance < _TOLERANCE:
                candidates[name] = candidate
            else:
                reasons[name] = f"differs from the others by {distance:.2g}"
    return candidates, reasons


def decode(inputs: Inputs) -> dict[str, Maker]:
    """Decode by others, over the same packed pages brought into the form that each likes best."""
    return {
        "ejkernel page_attention (XLA)": functools.partial(_ejkernel_page, inputs),
        "ejkernel ragged v2 (XLA)": functools.partial(_ejkernel_ragged, inputs),
        "torch SDPA, dense cache": functools.partial(_torch_decode, inputs),
    }


def prefill(inputs: Inputs, chunk: int) -> dict[str, Maker]:
    """Prefill by others, over dense keys and values."""
    return {
        "jax.nn.dot_product_attention, dense": functools.partial(_jax_prefill, inputs, chunk),
        "torch SDPA, dense": functools.partial(_torch_prefill, inputs, chunk),
    }


def _ejkernel_page(inputs: Inputs) -> Candidate:
    page_attention = importlib.import_module("ejkernel.kernels._xla").page_attention
    kv, batch = inputs.pages.arrays[0], inputs.batch
    # Pages first, [pages, heads, page_size, dim]: it takes this order as it is and transposes the other.
    k, v = kv[:, 0], kv[:, 1]
    tables = jnp.maximum(batch.block_tables, 0)
    return compiled(lambda *args: page_attention(*args), inputs.q, k, v, batch.lengths, tables)


def _ejkernel_ragged(inputs: Inputs) -> Candidate:
    attention = importlib.import_module("ejkernel.kernels._xla").ragged_page_attention_v2
    kv, batch = inputs.pages.arrays[0], inputs.batch
    pages = jnp.stack([jnp.swapaxes(kv[:, which], 1, 2) for which in (0, 1)], axis=3)
    pages = pages.reshape(*pages.shape[:2], 2 * KV_HEADS, HEAD_DIM)
    tables = jnp.maximum(batch.block_tables, 0)
    rows = (batch.lengths, tables, batch.query_starts, jnp.reshape(batch.num_seqs, (1,)))
    attend = functools.partial(attention, softmax_scale=HEAD_DIM**-0.5, compute_dtype=inputs.q.dtype)
    return compiled(lambda *args: attend(*args), inputs.q, pages, *rows)


def _torch() -> Any:
    torch = importlib.import_module("torch")
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return torch


def _torch_sdpa(q: jax.Array, k: jax.Array, v: jax.Array, mask: np.ndarray | None) -> Callable[[], Any]:
    torch = _torch()
    dtype = getattr(torch, q.dtype.name)
    q, k, v = (torch.from_numpy(np.array(x.astype(jnp.float32))).to(dtype) for x in (q, k, v))
    is_visible = None if mask is None else torch.from_numpy(mask)
    attend = torch.nn.functional.scaled_dot_product_attention

    def call() -> Any:
        with torch.no_grad():
            return attend(q, k, v, attn_mask=is_visible, enable_gqa=True)

    return call


def _torch_decode(inputs: Inputs) -> Candidate:
    k, v = dense(inputs)
    lengths = np.asarray(inputs.batch.lengths)
    mask = None if (lengths == k.shape[2]).all() else (np.arange(k.shape[2]) < lengths[:, None])[:, None, None]
    attend = _torch_sdpa(inputs.q[:, :, None], k, v, mask)
    return Candidate(lambda: attend()[:, :, 0])


def _torch_prefill(inputs: Inputs, chunk: int) -> Candidate:
    k, v = dense(inputs)
    attend = _torch_sdpa(jnp.swapaxes(inputs.q, 0, 1)[None], k, v, _offset_causal(chunk, k.shape[2]))
    return Candidate(lambda: attend()[0].transpose(0, 1))


def _jax_prefill(inputs: Inputs, chunk: int) -> Candidate:
    k, v = (jnp.swapaxes(x, 1, 2) for x in dense(inputs))
    mask = jnp.asarray(_offset_causal(chunk, k.shape[1]))[None, None]

    def attend(q, k, v, mask):
        return jax.nn.dot_product_attention(q[None], k, v, mask=mask)[0]

    return compiled(attend, inputs.q, k, v, mask)


def _offset_causal(chunk: int, length: int) -> np.ndarray:
    return np.arange(length) <= np.arange(length - chunk, length)[:, None]


def _as_numpy(x: Any) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32)) if isinstance(x, jax.Array) else x.float().numpy()
