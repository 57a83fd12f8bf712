"""The candidates of this library: what its users write for a step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paged

from .peers import Call
from .shape import Shape

PAGED, PAGED_UPDATE, PAGED_WRITE = "paged", "paged, update", "paged, write alone"
OWN = (PAGED, PAGED_UPDATE, PAGED_WRITE)
WRITING = (PAGED_UPDATE, PAGED_WRITE)


def paged_call(shape: Shape, candidate: str = PAGED) -> Call:
    """``attend(q, pages, batch)``, ``attend.update(q, k, v, pages, batch)`` or ``paged.write(k, v, pages, batch)``.

    Pages that are written are donated. Integers are concrete, floats are shapes.
    """
    spec = paged.AttentionSpec(
        num_q_heads=shape.q_heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        causal=not shape.is_opaque,
        mask=paged.Where(_sees) if shape.is_opaque else None,
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
    calls: dict[str, Callable[..., Any]] = {
        PAGED: lambda pages, batch, sinks, q, k, v: attend(q, pages, batch, *sinks),
        PAGED_UPDATE: lambda pages, batch, sinks, q, k, v: attend.update(q, k, v, pages, batch, *sinks),
        PAGED_WRITE: lambda pages, batch, sinks, q, k, v: paged.write(k, v, pages, batch, "tpu"),
    }
    call = calls[candidate]

    def function(pages: Any, sinks: Any, lengths: Any, tables: Any, starts: Any, q: Any, k: Any, v: Any) -> Any:
        return call(pages, _batch(shape, lengths, tables, starts), sinks, q, k, v)

    pool = [jax.ShapeDtypeStruct(dims, layout.dtype) for dims in layout.array_shapes(shape.pool_pages)]
    sinks = [jax.ShapeDtypeStruct((shape.q_heads,), jnp.float32)] if shape.has_sinks else []
    integers = (np.asarray(shape.lengths, np.int32), shape.tables(), shape.query_starts())
    q, new = (
        jax.ShapeDtypeStruct((shape.num_rows, heads, shape.head_dim), jnp.bfloat16)
        for heads in (shape.q_heads, shape.kv_heads)
    )
    donated = (0,) if candidate in WRITING else ()
    return function, (layout.wrap(*pool), sinks, *integers, q, new, new), donated


def _sees(p: Any, j: Any) -> Any:
    """The causal mask, as a user's own predicate."""
    return j <= p


def _batch(shape: Shape, lengths: Any, tables: Any, starts: Any) -> paged.RaggedBatch:
    """The batch as its caller would make it: what is static about the rows is told."""
    if shape.is_decode:
        return paged.RaggedBatch.decode(lengths, tables)
    if shape.num_seqs == 1:
        return paged.RaggedBatch.prefill(lengths[0], tables[0], shape.num_rows)
    return paged.RaggedBatch(lengths, tables, starts)
