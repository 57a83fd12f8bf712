"""Random arrays to tune with: full sequences over a pool in random physical order."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from paged.spec import AttentionSpec, PageLayout, Pages, RaggedBatch, as_bool, require_positive_int

# Only so many pages are drawn at random, and repeated: drawing a large pool would take long.
_FEW_PAGES = 64


class Arrays(NamedTuple):
    """The arguments of an attention."""

    q: Array
    pages: Pages
    batch: RaggedBatch
    sinks: Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a step.

    * ``slots``: how many sequences there are.
    * ``context``: tokens of each sequence, this step's included.
    * ``query_rows``: query rows of each sequence.
    * ``max_context``: tokens that a block table has room for; at least ``context``.
    * ``is_mixed``: only the first sequence has ``query_rows`` rows, and the others have one.
    """

    slots: int
    context: int
    query_rows: int = 1
    max_context: int = 0
    is_mixed: bool = False

    def __post_init__(self):
        for name in ("slots", "context", "query_rows"):
            require_positive_int(name, getattr(self, name))
        require_positive_int("max_context", self.max_context, 0)
        object.__setattr__(self, "is_mixed", as_bool("is_mixed", self.is_mixed))
        if self.query_rows > self.context:
            raise ValueError(f"query_rows={self.query_rows} are more than the context={self.context} tokens they end.")

    @property
    def rows(self) -> list[int]:
        """Query rows of each sequence."""
        return [self.query_rows] + [1 if self.is_mixed else self.query_rows] * (self.slots - 1)


def synthetic(spec: AttentionSpec, layout: PageLayout, shape: Shape, q_dtype: Any = None) -> Arrays:
    """Random arrays of a shape. ``q_dtype`` is the pages' dtype by default, and bfloat16 over quantised pages.

    >>> spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=8)
    >>> layout = PageLayout(page_size=4, num_kv_heads=1, head_dim=8)
    >>> arrays = synthetic(spec, layout, Shape(slots=2, context=7, query_rows=3, is_mixed=True))
    >>> arrays.q.shape, arrays.batch.block_tables.shape, arrays.batch.query_starts.tolist(), arrays.pages.num_pages
    ((4, 2, 8), (2, 2), [0, 3, 4], 4)
    """
    size = layout.page_size
    held, width = -(-shape.context // size), -(-max(shape.context, shape.max_context) // size)
    rng = np.random.default_rng(0)
    tables = np.full((shape.slots, width), -1, np.int32)
    tables[:, :held] = rng.permutation(shape.slots * held).reshape(shape.slots, held)
    lengths = np.full(shape.slots, shape.context, np.int32)
    starts = np.concatenate([[0], np.cumsum(shape.rows)]).astype(np.int32)
    batch = RaggedBatch(lengths, tables, starts, query_rows=None if shape.is_mixed else shape.query_rows)
    dtype = q_dtype or (jnp.bfloat16 if layout.is_quantised else layout.dtype)
    q = jax.random.normal(jax.random.key(0), (int(starts[-1]), spec.num_q_heads, spec.head_dim)).astype(dtype)
    sinks = jnp.zeros(spec.num_q_heads) if spec.sinks else None
    return Arrays(q, _pool(layout, shape.slots * held, rng), batch, sinks)


def _pool(layout: PageLayout, num_pages: int, rng: np.random.Generator) -> Pages:
    scale = layout.scale_shape(num_pages)
    arrays = []
    for shape in layout.array_shapes(min(num_pages, _FEW_PAGES)):
        few = rng.standard_normal(shape, np.float32) * (40 if layout.is_quantised else 1)
        few = jnp.asarray(np.clip(few, -127, 127)).astype(layout.dtype)
        which = jnp.arange(num_pages) % few.shape[layout.page_axis]
        arrays.append(jax.jit(lambda few, which: jnp.take(few, which, axis=layout.page_axis))(few, which))
    scales = [None if scale is None else jnp.full(scale, 1 / 40) for _ in range(2)]
    return layout.wrap(*arrays, k_scale=scales[0], v_scale=scales[1])
