"""The walk over tiles that the forward pass and its gradient share: which tiles there are, and what each means.

A tile is one block of query rows, of one sequence, against one block of the pages that it can see.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from paged.spec import Pages

from ..program import Program, Sequences, Terms, Visits, visits_by_scatter
from .blocks import Block

# Up to this many rows, keys are the left operand of the product: XLA:CPU then need not repack the larger side. And up
# to as many, keeping the scores of several blocks is cheap (measured: benchmarks/xla_cpu).
FEW_ROWS = 32


class Operands(NamedTuple):
    """Everything traced: what gradients flow to, and the integers that say where it lies."""

    q: Float[Array, "tokens q_heads head_dim"]
    pages: Pages
    constants: Any
    seqs: Sequences
    is_member: Bool[Array, " seqs"]


class Tile(NamedTuple):
    """A block of visited pages: where they lie, and the position of each key. The last block repeats a page."""

    ids: Int[Array, " pages_per_block"]
    j: Int[Array, "1 1 keys"]
    is_visit: Bool[Array, "1 1 keys"]


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """The static facts of a walk: the program and its terms, query rows a block, pages a block, such blocks a step of
    the softmax, blocks of rows at once.

    Query heads that share a KV head and the rows of a block are one axis, ``group_rows``, heads first.
    """

    program: Program
    terms: Terms
    rows: int
    pages_per_block: int
    blocks_per_step: int
    lanes: int

    @property
    def has_buffers(self) -> bool:
        """Whether tiles are put into a buffer: on XLA:CPU, where keys and values don't take turns within a step."""
        is_several = self.blocks_per_step > 1 and self.pages_per_block > 1
        return is_several and self.lanes == 1 and jax.default_backend() == "cpu"

    def fold(self, x: Float[Array, "rows q_heads dim"]) -> Float[Array, "kv_heads group_rows dim"]:
        """Rows of all query heads, as rows of KV heads."""
        split = x.reshape(self.rows, self.program.num_kv_heads, self.program.group, -1)
        return jnp.moveaxis(split, 0, 2).reshape(self.program.num_kv_heads, self.program.group * self.rows, -1)

    def unfold(self, x: Float[Array, "kv_heads group_rows dim"]) -> Float[Array, "rows q_heads dim"]:
        """The inverse of `fold`."""
        split = x.reshape(self.program.num_kv_heads, self.program.group, self.rows, -1)
        return jnp.moveaxis(split, 2, 0).reshape(self.rows, self.program.num_q_heads, -1)

    def visits(self, block: Block, operands: Operands) -> Visits:
        """The pages the block visits."""
        pages, table = operands.pages, operands.seqs.tables[block.seq]
        p0, p1 = block.position_range
        size = pages.layout.page_size
        return visits_by_scatter(self.program, p0, p1, block.length, table, size, pages.num_pages)

    def num_tiles(self, visits: Visits) -> Int[Array, ""]:
        """How many blocks of pages the visits make."""
        return -(-visits.count // self.pages_per_block)

    def over_tiles(self, first: Any, last: Any, visits: Visits, step: Callable[..., Any], start: Any) -> Any:
        """Fold ``carry = step(i, carry, is_masked)`` over the visits' blocks of pages in ``[first, last)``.

        Blocks of pages that are visible in full come first, and with ``is_masked`` False: they need no mask.
        """
        masked = jnp.clip(visits.num_full // self.pages_per_block, first, last)
        carry = jax.lax.fori_loop(first, masked, functools.partial(step, is_masked=False), start)
        return jax.lax.fori_loop(masked, last, functools.partial(step, is_masked=True), carry)

    def tile(self, step: Any, visits: Visits, page_size: int) -> Tile:
        """Block number ``step`` of the visited pages."""
        slot = step * self.pages_per_block + jnp.arange(self.pages_per_block)
        is_visit = slot < visits.count
        slot = jnp.minimum(slot, jnp.maximum(visits.count - 1, 0))
        j = visits.index[slot][:, None] * page_size + jnp.arange(page_size)
        return Tile(visits.page[slot], j.reshape(1, 1, -1), jnp.repeat(is_visit, page_size).reshape(1, 1, -1))

    def visible(self, tile: Tile, block: Block, constants: Any) -> Bool[Array, "1 group_rows keys"]:
        """Which pairs of the tile are visible."""
        p, is_row = self.positions(block), jnp.tile(block.is_row, self.program.group).reshape(1, -1, 1)
        return self.terms.visible(constants, p, tile.j, block.length) & tile.is_visit & is_row

    def scores(
        self, q: Array, k: Array, constants: Any, p: Int[Array, "1 group_rows 1"], j: Int[Array, "1 1 keys"]
    ) -> Float[Array, "kv_heads group_rows keys"]:
        """The tile's scores before the mask, from folded queries and the tile's keys, both float32."""
        products = jnp.einsum("hrd,hkd->hrk", q * self.program.scale, k, precision="highest")
        return self.terms.scores(constants, products, p, j, self.heads)

    def scores_keys_left(
        self, q: Array, k: Array, constants: Any, p: Int[Array, "1 group_rows 1"], j: Int[Array, "1 1 keys"]
    ) -> Float[Array, "kv_heads group_rows keys"]:
        """`scores`, with the product in the form that is fastest on CPU when rows are few; not for differentiation."""
        if q.shape[1] > FEW_ROWS:
            return self.scores(q, k, constants, p, j)
        products = jnp.einsum("hkd,hrd->hkr", k, q * self.program.scale, precision="highest")
        # Without the barrier XLA swaps the operands back.
        products = jnp.swapaxes(jax.lax.optimization_barrier(products), 1, 2)
        return self.terms.scores(constants, products, p, j, self.heads)

    def positions(self, block: Block) -> Int[Array, "1 group_rows 1"]:
        """The position of each row of a tile."""
        return jnp.tile(block.position, self.program.group).reshape(1, -1, 1)

    @property
    def heads(self) -> Int[Array, "kv_heads group_rows 1"]:
        """The query head of each row of a tile."""
        head = jnp.arange(self.program.num_q_heads).reshape(self.program.num_kv_heads, self.program.group)
        return jnp.repeat(head, self.rows, axis=1)[..., None]
