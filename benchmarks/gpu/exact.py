"""What a call must give, for some of its rows, in float64 on the host."""

from typing import Any

import numpy as np

import paged

from .shapes import PAGE, Shape

# Relative to the largest output: bfloat16 rounds the result to 8 bits, and a kernel its weights too.
TOLERANCE = 2.0**-6


def error_of(shape: Shape, out: Any, q: Any, pages: paged.Pages, slots: tuple[int, ...] = (0, -1)) -> float:
    """The largest error of the outputs of some sequences, relative to the largest output."""
    pool, out, q = (np.asarray(x).astype(np.float64) for x in (pages.arrays[0], out, q))
    worst, largest = 0.0, 0.0
    for slot in (shape.slots + s if s < 0 else s for s in slots):
        rows = slice(slot * shape.rows, (slot + 1) * shape.rows)
        want = _attention(shape, q[rows], pool[shape.tables[slot]])
        worst = max(worst, float(np.abs(out[rows] - want).max()))
        largest = max(largest, float(np.abs(want).max()))
    return worst / largest


def _attention(shape: Shape, q: np.ndarray, pages: np.ndarray) -> np.ndarray:
    """Of ``q [rows, q_heads, dim]`` over ``pages [pages, 2, kv_heads, PAGE, dim]``."""
    k, v = (np.moveaxis(x, 1, 0).reshape(shape.kv_heads, -1, shape.head_dim) for x in (pages[:, 0], pages[:, 1]))
    p = np.arange(shape.tokens - shape.rows, shape.tokens)[:, None]
    j = np.arange(len(pages) * PAGE)[None]
    is_seen = (j <= p) & (j < shape.tokens) & (True if shape.window is None else p - j < shape.window)
    grouped = q.reshape(shape.rows, shape.kv_heads, -1, shape.head_dim)
    s = np.einsum("thgd,hjd->hgtj", grouped, k) / np.sqrt(shape.head_dim)
    s = np.where(is_seen, s, -np.inf)
    weights = np.exp(s - s.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hgtj,hjd->thgd", weights, v).reshape(shape.rows, shape.q_heads, shape.head_dim)
