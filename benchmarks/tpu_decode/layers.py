"""Layers of attention, one after the other, as a builder for `benchmarks.tpu.static`: what each layer costs.

The results of a layer are the queries of the next one, and all write the same keys and values: so whatever runs around
the kernels is attention's own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paged
from benchmarks.tpu import Call

from .shapes import SHAPES


def build(shape: str, layers: int, form: str) -> Call:
    """``layers`` calls of ``attend.update``.

    ``form`` is ``"scan"``, with the pages of all layers in one pool, or ``"unrolled"``, with a pool for each layer.
    """
    found = SHAPES[shape]
    spec = paged.AttentionSpec(num_q_heads=found.q_heads, num_kv_heads=found.kv_heads, head_dim=found.head_dim)
    layout = paged.PageLayout(page_size=found.page_size, num_kv_heads=found.kv_heads, head_dim=found.head_dim)
    attend = paged.lower(spec, layout, target="tpu")
    is_scan, num_pages = {"scan": True, "unrolled": False}[form], sum(-(-n // found.page_size) for n in found.lengths)

    def pool(pages: int) -> paged.Pages:
        return layout.wrap(*(jax.ShapeDtypeStruct(dims, layout.dtype) for dims in layout.array_shapes(pages)))

    def scanned(pages: Any, lengths: Any, tables: Any, q: Any, new: Any) -> Any:
        plan = attend.plan(q, pool(num_pages), paged.RaggedBatch.decode(lengths, tables))  # as a `LayerStack` makes it

        def layer(i: Any, carry: Any) -> Any:
            q, pages = carry
            return attend.update(q, new, new, pages, plan.for_layer(i, num_pages, layers))

        return jax.lax.fori_loop(0, layers, layer, (q, pages))

    def unrolled(pools: Any, lengths: Any, tables: Any, q: Any, new: Any) -> Any:
        batch, written = paged.RaggedBatch.decode(lengths, tables), []
        for pages in pools:
            q, pages = attend.update(q, new, new, pages, batch)
            written.append(pages)
        return q, written

    q, new = (
        jax.ShapeDtypeStruct((found.num_seqs, heads, found.head_dim), jnp.bfloat16)
        for heads in (found.q_heads, found.kv_heads)
    )
    tables = np.random.default_rng(0).permutation(num_pages).astype(np.int32).reshape(found.num_seqs, -1)
    pages = pool(layers * num_pages) if is_scan else [pool(num_pages) for _ in range(layers)]
    args = (pages, np.asarray(found.lengths, np.int32), tables, q, new)
    return scanned if is_scan else unrolled, args, (0,)
