"""The candidate ``paged``: this library's call on a shape."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paged

from .peers import Call
from .shape import Shape

PAGED = "paged"


def paged_call(shape: Shape) -> Call:
    """What its users would write. Integers are concrete, floats are shapes."""
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
    if shape.num_seqs == 1:
        return paged.RaggedBatch.prefill(lengths[0], tables[0], shape.num_rows)
    return paged.RaggedBatch(lengths, tables, starts)
