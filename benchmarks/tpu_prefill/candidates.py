"""The candidates: each a builder from a shape to ``(function, arguments)``, which is what the tool compiles.

Integer arguments, lengths, starts and tables, are concrete, because the tool runs the kernel's scalar program with
them; float arguments are shapes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paged

from . import peers
from .shapes import SHAPES, Shape

PAGED = "paged"

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def names() -> list[str]:
    """Every candidate, ours first."""
    return [PAGED, *peers.BUILDERS]


def is_for(candidate: str, shape: Shape) -> bool:
    """Whether a row says something: kernels for one kind of batch or head are left out of the others' tables."""
    if candidate in peers.HEAD_64:
        return shape.head_dim == 64
    return len(shape.seqs) == 1 or candidate not in peers.ONE_CHUNK


def build(candidate: str, shape: str, generation: str) -> Call:
    """What the tool calls, in a process of its own. No candidate needs to be told the generation: it is the device."""
    del generation
    found = SHAPES[shape]
    return _paged(found) if candidate == PAGED else peers.BUILDERS[candidate](found)


def _paged(shape: Shape) -> Call:
    spec = paged.AttentionSpec(
        num_q_heads=shape.q_heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        window=shape.window,
        soft_cap=shape.soft_cap,
        sinks=shape.has_sinks,
    )
    layout = paged.PageLayout(
        page_size=shape.page_size,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        order="joined" if shape.head_dim % 128 else "packed",
    )
    attend = paged.lower(spec, layout, target="tpu")
    q = jax.ShapeDtypeStruct((shape.num_rows, shape.q_heads, shape.head_dim), jnp.bfloat16)
    pool = [jax.ShapeDtypeStruct(dims, layout.dtype) for dims in layout.array_shapes(shape.pool_pages)]
    sinks = [jax.ShapeDtypeStruct((shape.q_heads,), jnp.float32)] if shape.has_sinks else []

    def function(lengths: Any, tables: Any, starts: Any, q: Any, pool: Any, sinks: Any) -> Any:
        return attend(q, layout.wrap(*pool), _batch(shape, lengths, tables, starts), *sinks)

    return function, (np.asarray(shape.lengths, np.int32), shape.tables(), shape.query_starts(), q, pool, sinks)


def _batch(shape: Shape, lengths: Any, tables: Any, starts: Any) -> paged.RaggedBatch:
    """The batch as its caller would make it: what is static about the rows is told."""
    if shape.is_decode:
        return paged.RaggedBatch.decode(lengths, tables)
    if len(shape.seqs) == 1:
        return paged.RaggedBatch.prefill(lengths[0], tables[0], shape.num_rows)
    return paged.RaggedBatch(lengths, tables, starts)
