"""The calls that are checked and timed, and their arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paged

PAGE = 16


@dataclasses.dataclass(frozen=True)
class Shape:
    """``slots`` sequences of ``tokens`` tokens, the last ``rows`` of which are this step's.

    ``writes`` is of a call that writes the step's keys and values before it attends.
    """

    name: str
    slots: int
    tokens: int
    rows: int = 1
    window: int | None = None
    writes: bool = False
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def spec(self) -> paged.AttentionSpec:
        """The attention."""
        return paged.AttentionSpec(
            num_q_heads=self.q_heads, num_kv_heads=self.kv_heads, head_dim=self.head_dim, window=self.window
        )

    @property
    def layout(self) -> paged.PageLayout:
        """The pages: bfloat16, packed."""
        return paged.PageLayout(page_size=PAGE, num_kv_heads=self.kv_heads, head_dim=self.head_dim)

    @property
    def num_pages(self) -> int:
        """Pages of the pool: those of the sequences, and no others."""
        return self.slots * self.tokens // PAGE

    @property
    def bytes_visible(self) -> int:
        """Bytes of keys and values that some row sees. Each is read at least once."""
        seen = self.tokens if self.window is None else min(self.tokens, self.window + self.rows - 1)
        return self.slots * seen * self.kv_heads * self.head_dim * 2 * 2

    @property
    def tables(self) -> np.ndarray:
        """Block tables: every page of the pool once, in random order."""
        order = np.random.default_rng(0).permutation(self.num_pages)
        return order.reshape(self.slots, -1).astype(np.int32)

    @property
    def batch(self) -> paged.RaggedBatch:
        """The step."""
        return paged.RaggedBatch.decode(np.full(self.slots, self.tokens), self.tables, query_rows=self.rows)

    def abstract(self) -> tuple[Any, Any, paged.Pages]:
        """Queries, new keys (as values), and pages, by shape alone."""
        shape = lambda heads: jax.ShapeDtypeStruct((self.slots * self.rows, heads, self.head_dim), jnp.bfloat16)
        pools = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in self.layout.array_shapes(self.num_pages))
        return shape(self.q_heads), shape(self.kv_heads), self.layout.wrap(*pools)

    def arrays(self) -> tuple[Any, Any, paged.Pages]:
        """The same, filled with normal numbers on the device."""
        q, kv, pages = self.abstract()
        keys = jax.random.split(jax.random.key(0), 3)
        make = lambda key, like: jax.random.normal(key, like.shape, like.dtype)
        return make(keys[0], q), make(keys[1], kv), self.layout.wrap(*(make(keys[2], x) for x in pages.arrays))


SHAPES = (
    Shape("decode, 16 x 4096", 16, 4096),
    Shape("decode, 256 x 1024", 256, 1024),
    Shape("decode, 16 x 4096, window 128", 16, 4096, window=128),
    Shape("prefill, 512 rows of 4096", 1, 4096, rows=512),
    Shape("write and decode, 16 x 4096", 16, 4096, writes=True),
)
