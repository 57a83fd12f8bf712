"""The XLA lowering: blocks of query rows, each over the pages it can see, by gather and online softmax.

The forward pass and its gradient walk the same tiles. A tile is one block of query rows (of one sequence) against
one block of its visible pages; `Tiles` says where it lies, gathers its keys and values, and evaluates the program's
terms on it. The forward pass folds tiles into a running softmax, so scores of a whole row never exist. The gradient
recomputes each tile's weights from the saved log-sum-exp (Dao et al., arXiv:2205.14135, algorithm 4), so nothing
that grows with tokens x length is kept between the passes.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from paged.spec import AttentionState, Pages

from ..closures import TileTerms
from ..program import Program
from ..sequences import Sequences
from ..softmax import Running, select_values
from ..visits import Visits, visible_pages
from . import tiles
from .blocks import Block, Blocks


class Operands(NamedTuple):
    """Everything traced: what gradients flow to, and the integers that say where it lies."""

    q: Float[Array, "tokens q_heads head_dim"]
    pages: Pages
    constants: Any
    seqs: Sequences
    is_member: Bool[Array, " seqs"]


class Tile(NamedTuple):
    """One block of query rows against one block of pages. Query heads of a KV head and rows are one axis, ``rows``."""

    ids: Int[Array, " pages_per_block"]
    j: Int[Array, "1 1 keys"]
    is_visible: Bool[Array, "1 rows keys"]
    is_full: Bool[Array, ""]


@dataclasses.dataclass(frozen=True, eq=False)
class Tiles:
    """The static facts of a pass over tiles, and what every tile needs of them."""

    program: Program
    terms: TileTerms
    rows: int
    pages_per_block: int

    @property
    def heads(self) -> Int[Array, "kv_heads rows 1"]:
        """The query head of each row of a tile."""
        head = jnp.arange(self.program.num_q_heads).reshape(self.program.num_kv_heads, self.program.group, 1)
        return jnp.broadcast_to(head, (*head.shape[:2], self.rows)).reshape(self.program.num_kv_heads, -1, 1)

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
        layout = pages.layout
        p0, p1 = block.position_range
        return visible_pages(self.program, p0, p1, block.length, table, layout.page_size, pages.num_pages)

    def steps(self, visits: Visits) -> Int[Array, ""]:
        """How many blocks of pages the visits make."""
        return -(-visits.count // self.pages_per_block)

    def tile(self, step: Any, block: Block, visits: Visits, operands: Operands) -> Tile:
        """The tile of one block of visited pages. The last block repeats its last page, invisibly."""
        size = operands.pages.layout.page_size
        slot = step * self.pages_per_block + jnp.arange(self.pages_per_block)
        is_visit = slot < visits.count
        slot = jnp.minimum(slot, jnp.maximum(visits.count - 1, 0))
        j0 = visits.index[slot] * size
        coverage = self.program.coverage(*block.position_range, j0, j0 + size, block.length)
        j = (j0[:, None] + jnp.arange(size)).reshape(1, 1, -1)
        in_visit = jnp.repeat(is_visit, size).reshape(1, 1, -1)
        p = jnp.tile(block.position, self.program.group).reshape(1, -1, 1)
        is_row = jnp.tile(block.is_row, self.program.group).reshape(1, -1, 1)
        is_visible = self.terms.mask(operands.constants, p, j) & (j < block.length) & in_visit & is_row
        return Tile(visits.page[slot], j, is_visible, jnp.all(coverage.full & is_visit) & block.is_row[-1])

    def scores(self, q: Array, k: Array, constants: Any, p: Array, j: Array) -> Float[Array, "kv_heads rows keys"]:
        """The tile's scores before the mask, from folded queries and the tile's keys, both float32."""
        s = self.program.scale * jnp.einsum("hrd,hkd->hrk", q, k, precision="highest")
        return self.terms.scores(constants, s, p, j, self.heads)

    def positions(self, block: Block) -> Int[Array, "1 rows 1"]:
        """The position of each row of a tile."""
        return jnp.tile(block.position, self.program.group).reshape(1, -1, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(walk: Tiles, operands: Operands) -> AttentionState:
    """State of the members' rows, float32; rows of no member are empty. Every gradient is finite."""
    tokens, dim = operands.q.shape[0], operands.pages.layout.value_dim
    blocks = Blocks.of(operands.seqs, operands.is_member, walk.rows)

    def attend_block(which, state):
        block = blocks.block(which, walk.rows)
        out, lse = _attend_block(walk, block, operands)
        row = jnp.where(block.is_row, block.row, tokens)
        return AttentionState(
            state.out.at[row].set(walk.unfold(out), mode="drop"),
            state.lse.at[row].set(walk.unfold(lse[..., None])[..., 0], mode="drop"),
        )

    heads = walk.program.num_q_heads
    empty = AttentionState(jnp.zeros((tokens, heads, dim)), jnp.full((tokens, heads), -jnp.inf))
    return jax.lax.fori_loop(0, blocks.count, attend_block, empty)


def _attend_block(walk: Tiles, block: Block, operands: Operands) -> tuple[Array, Array]:
    """One block of query rows over all the pages it visits."""
    q = walk.fold(operands.q[block.row].astype(jnp.float32))
    visits, p = walk.visits(block, operands), walk.positions(block)

    def step(i, running):
        tile = walk.tile(i, block, visits, operands)
        k, v = tiles.gather(operands.pages, tile.ids)
        s = walk.scores(q, k, operands.constants, p, tile.j)
        s, v = jax.lax.cond(tile.is_full, lambda s, v: (s, v), functools.partial(_hide, tile.is_visible), s, v)
        return running.step(s, v)

    start = Running.start(walk.program.num_kv_heads, q.shape[1], operands.pages.layout.value_dim)
    return jax.lax.fori_loop(0, walk.steps(visits), step, start).finish()


def _hide(is_visible: Array, s: Array, v: Array) -> tuple[Array, Array]:
    return jnp.where(is_visible, s, -jnp.inf), select_values(is_visible, v)


def _forward(walk: Tiles, operands: Operands):
    state = attend(walk, operands)
    return state, (operands, state)


def _backward(walk: Tiles, saved: tuple[Operands, AttentionState], cotangent: AttentionState):
    operands, state = saved
    blocks = Blocks.of(operands.seqs, operands.is_member, walk.rows)
    is_differentiable = not operands.pages.layout.is_quantised
    pools = tuple(jnp.zeros(a.shape, jnp.float32) for a in operands.pages.arrays if is_differentiable)
    zeros = jax.tree.map(lambda c: jnp.zeros(c.shape, c.dtype), operands.constants)

    def block_gradient(which, carry):
        q_gradient, pools, constants = carry
        block = blocks.block(which, walk.rows)
        q, pools, constants = _block_gradient(walk, block, operands, state, cotangent, pools, constants)
        row = jnp.where(block.is_row, block.row, operands.q.shape[0])
        return q_gradient.at[row].set(walk.unfold(q), mode="drop"), pools, constants

    start = (jnp.zeros(operands.q.shape, jnp.float32), pools, zeros)
    q, pools, constants = jax.lax.fori_loop(0, blocks.count, block_gradient, start)
    pages = None
    if is_differentiable:
        cast = tuple(pool.astype(array.dtype) for pool, array in zip(pools, operands.pages.arrays, strict=True))
        pages = Pages(cast, None, None, operands.pages.layout)
    constants = jax.tree.map(lambda c: c if jnp.issubdtype(c.dtype, jnp.inexact) else None, constants)
    return (Operands(q.astype(operands.q.dtype), pages, constants, None, None),)  # pyright: ignore


def _block_gradient(walk: Tiles, block: Block, operands: Operands, state, cotangent, pools, constants):
    """One block's gradients: of its queries, and added to those of the pools and constants."""
    at_rows = functools.partial(_rows_of, walk, block)
    q, out, out_gradient = at_rows(operands.q), at_rows(state.out), at_rows(cotangent.out)
    lse, lse_gradient = at_rows(state.lse[..., None]), at_rows(cotangent.lse[..., None])
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
    # d loss / d s_j = w_j (<d out, v_j> - <d out, out> + d lse): the softmax's Jacobian, and lse's.
    common = lse_gradient - jnp.sum(out_gradient * out, axis=-1, keepdims=True)
    visits, p = walk.visits(block, operands), walk.positions(block)

    def step(i, carry):
        q_gradient, pools, constants = carry
        tile = walk.tile(i, block, visits, operands)
        k, v = (select_values(tile.is_visible, x) for x in tiles.gather(operands.pages, tile.ids))
        s, pull = jax.vjp(lambda q, k, c: walk.scores(q, k, c, p, tile.j), q, k, operands.constants)
        weights = jnp.where(tile.is_visible, jnp.exp(s - lse), 0.0)
        v_gradient = jnp.einsum("hrk,hrd->hkd", weights, out_gradient, precision="highest")
        w_gradient = jnp.einsum("hrd,hkd->hrk", out_gradient, v, precision="highest")
        s_gradient = jnp.where(weights > 0, weights * (w_gradient + common), 0.0)
        q_step, k_gradient, c_step = pull(s_gradient)
        if pools:
            pools = tiles.scatter_add(operands.pages.layout, pools, tile.ids, k_gradient, v_gradient)
        return q_gradient + q_step, pools, _accumulate(constants, c_step)

    return jax.lax.fori_loop(0, walk.steps(visits), step, (jnp.zeros_like(q), pools, constants))


def _rows_of(walk: Tiles, block: Block, x: Float[Array, "tokens q_heads dim"]) -> Array:
    """The block's rows of an array, folded; 0 for rows that are not the block's."""
    rows = jnp.where(block.is_row[:, None, None], x[block.row].astype(jnp.float32), 0.0)
    return walk.fold(rows)


def _accumulate(total: Any, step: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b if jnp.issubdtype(a.dtype, jnp.inexact) else a, total, step)


attend.defvjp(_forward, _backward)
