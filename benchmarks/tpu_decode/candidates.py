"""The candidates: each a builder from a shape to ``(function, arguments)``, which is what the tool compiles.

Integer arguments, lengths and tables, are concrete, because the tool runs the kernel's scalar program with them; float
arguments are shapes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paged

from . import peers
from .ceiling import ceiling
from .shapes import SHAPES, Shape

CEILING, PAGED = "ceiling", "paged"
TWO_CORES = ("v4", "v5p")  # generations whose two cores are one JAX device

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def names() -> list[str]:
    """Every candidate, the ceiling first."""
    return [CEILING, PAGED, *peers.BUILDERS]


def is_for(candidate: str, shape: Shape) -> bool:
    """Whether a row says something: a kernel made for one head size is left out of the other shapes' tables."""
    return candidate not in peers.HEAD_64 or shape.head_dim == 64


def build(candidate: str, shape: str, generation: str) -> Call:
    """What the tool calls, in a process of its own."""
    found = SHAPES[shape]
    if candidate == CEILING:
        return ceiling(found, 2 if generation in TWO_CORES else 1)
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
    q = jax.ShapeDtypeStruct((shape.num_seqs, shape.q_heads, shape.head_dim), jnp.bfloat16)
    pool = [jax.ShapeDtypeStruct(dims, layout.dtype) for dims in layout.array_shapes(shape.pool_pages)]
    sinks = [jax.ShapeDtypeStruct((shape.q_heads,), jnp.float32)] if shape.has_sinks else []

    def function(lengths: Any, tables: Any, q: Any, pool: Any, sinks: Any) -> Any:
        return attend(q, layout.wrap(*pool), paged.RaggedBatch.decode(lengths, tables), *sinks)

    return function, (np.asarray(shape.lengths, np.int32), shape.tables(), q, pool, sinks)
