"""Rows of all query heads as the caller has them, on their way to tiles of the decode kernel and back.

A tile meets the query heads of a KV head as whole registers of 8 rows. In the caller's arrays the heads of a row follow
one another. A group of 3, for example, begins at rows 0, 3, 6 and so on, and only 32-bit rows can be read from any row
on. So every row passes through memory of float32, with a row for each head. A tile reads whole registers from its first
head on::

    row 0    head 0 of KV head 0      tile 0 reads rows 0 to 7, of which rows 0 to 2 are its own
    row 1    head 1 of KV head 0
    row 2    head 2 of KV head 0
    row 3    head 0 of KV head 1      tile 1 reads rows 3 to 10, of which rows 3 to 5 are its own
    ...

Rows that are not a tile's own are worked on beside them, and their results are dropped. So it does not matter that rows
past the last head, which the last tile reads, hold anything.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ..chips import SUBLANES
from ..pages import Views
from ..references import Ref


@dataclasses.dataclass(frozen=True)
class Apart:
    """How the rows of a sequence lie in memory of its own, f32[stages, query_rows, rows, lanes].

    * ``views``: its ``group`` are the rows that a tile reads for each KV head.
    * ``group``: query heads of a KV head.
    """

    views: Views
    group: int

    @staticmethod
    def of(views: Views, group: int) -> "Apart | None":
        """How rows are laid out for views; None where the heads of a KV head lie as tiles read them."""
        return None if views.group == group else Apart(views, group)

    @property
    def q_heads(self) -> int:
        """Query heads of a row."""
        return self.views.layout.num_kv_heads * self.group

    @property
    def rows(self) -> int:
        """Rows of memory for a query row: those that the last KV head's tile reads are there too."""
        return -(-(self.q_heads - self.group + self.views.group) // SUBLANES) * SUBLANES

    def scratch(self, stages: int) -> Any:
        """The memory's shape."""
        lanes = max(self.views.layout.head_dim, self.views.layout.value_dim)
        return pltpu.VMEM((stages, self.views.query_rows, self.rows, lanes), jnp.float32)

    def put(self, memory: Ref, stage: Any, q: Ref) -> None:
        """Lay out the queries ``[query_rows, q_heads, head_dim]`` of a sequence."""
        for row in range(self.views.query_rows):
            x = q[row].astype(jnp.float32)
            memory[stage, row, pl.ds(0, self.q_heads), pl.ds(0, self.views.layout.head_dim)] = x

    def queries(self, memory: Ref, stage: Any, tile: int) -> Float[Array, "tile_rows dim"]:
        """The rows of queries that a tile of keys is multiplied with."""
        lanes = pl.ds(0, self.views.layout.head_dim)
        parts = [memory[stage, row, pl.ds(first, self.views.group), lanes] for row, first in self._first_rows_of(tile)]
        return self.views.operand(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0))

    def store(self, memory: Ref, stage: Any, tile: int, x: Float[Array, "tile_rows dim"]) -> None:
        """Store a tile's results in place of its own queries."""
        x, lanes = self.views.in_value_lanes(x), pl.ds(0, self.views.layout.value_dim)
        for i, (row, first) in enumerate(self._first_rows_of(tile)):
            own = x[i * self.views.group : i * self.views.group + self.group]
            memory[stage, row, pl.ds(first, self.group), lanes] = own

    def take(self, memory: Ref, stage: Any, out: Ref) -> None:
        """Put the results of all tiles into ``out`` ``[query_rows, q_heads, value_dim]``."""
        lanes = pl.ds(0, self.views.layout.value_dim)
        for row in range(self.views.query_rows):
            out[row] = memory[stage, row, pl.ds(0, self.q_heads), lanes].astype(out.dtype)

    def _first_rows_of(self, tile: int) -> Iterator[tuple[int, int]]:
        """In the order of a tile's rows: each query row with the first head of each KV head of the tile."""
        heads = self.views.heads_per_tile
        for row in range(self.views.query_rows):
            for head in range(tile * heads, (tile + 1) * heads):
                yield row, head * self.group
