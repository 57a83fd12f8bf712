"""The XLA lowering's gradient: the tiles of the forward pass once more, with weights recomputed from the log-sum-exp.

Nothing that grows with tokens x length is kept between the passes (Dao et al., arXiv:2205.14135, algorithm 4). JAX
differentiates the program's score operations, one tile at a time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from paged.spec import AttentionState

from ..jax_version import vary_alike, varying_axes
from ..program import select_values
from . import tiles
from .blocks import RowBlock
from .walk import Operands, Parts, Walk


def backward(walk: Walk, operands: Operands, state: AttentionState, cotangent: AttentionState, like: Parts) -> Parts:
    """Gradients of the operands of `attend`, whose result ``state`` is: of the parts that are in ``like``."""
    moved = Parts.of(operands, like).constants
    _require_alike(operands.q, moved)
    row_blocks = operands.row_blocks
    pools = tuple(jnp.zeros(a.shape, jnp.float32) for a in operands.pages.arrays if like.arrays)
    zeros = jax.tree.map(lambda c: jnp.zeros(c.shape, c.dtype), moved)

    def add_row_block(which, carry):
        q_gradient, pools, constants = carry
        row_block = row_blocks.block(operands.seqs, which, walk.rows)
        q, pools, constants = _row_block_gradient(walk, row_block, operands, state, cotangent, moved, pools, constants)
        row = jnp.where(row_block.is_row, row_block.row, operands.q.shape[0])
        return q_gradient.at[row].set(walk.unfold(q), mode="drop"), pools, constants

    _, start = vary_alike(operands, (jnp.zeros(operands.q.shape, jnp.float32), pools, zeros))
    q, pools, constants = jax.lax.fori_loop(0, row_blocks.count, add_row_block, start)
    cast = tuple(pool.astype(array.dtype) for pool, array in zip(pools, operands.pages.arrays, strict=False))
    return Parts(q.astype(operands.q.dtype), cast, constants).only(like)


def _row_block_gradient(walk: Walk, row_block: RowBlock, operands: Operands, state, cotangent, moved, pools, constants):
    """The gradient of one row block's queries; and those of pools and constants, with the row block's part added."""
    at_rows = functools.partial(walk.rows_of, row_block)
    q, out, out_gradient = at_rows(operands.q), at_rows(state.out), at_rows(cotangent.out)
    lse, lse_gradient = at_rows(state.lse[..., None]), at_rows(cotangent.lse[..., None])
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
    # d loss / d s_j = w_j (<d out, v_j> - <d out, out> + d lse): the softmax's Jacobian, and lse's.
    common = lse_gradient - jnp.sum(out_gradient * out, axis=-1, keepdims=True)
    visits, p = walk.visits(row_block, operands), walk.positions(row_block)

    def scores(q, k, moved, j):
        constants = Parts(None, (), moved).put_constants(operands.constants)
        return walk.scores(q, k, constants, p, j, row_block.numbers)

    def step(i, carry, is_masked):
        q_gradient, pools, constants = carry
        page_block = walk.page_block(i, visits, row_block, operands.pages.layout.page_size)
        k, v = tiles.gather(operands.pages, page_block.ids, i)
        if is_masked:
            is_visible = walk.visible(page_block, row_block, operands.constants)
            k, v = select_values(is_visible, k), select_values(is_visible, v)
        s, pull = jax.vjp(lambda q, k, moved: scores(q, k, moved, page_block.j), q, k, moved)
        weights = jnp.exp(s - lse)
        if is_masked:
            weights = jnp.where(is_visible, weights, 0.0)  # pyright: ignore
        v_gradient = jnp.einsum("hrk,hrd->hkd", weights, out_gradient, precision="highest")
        w_gradient = jnp.einsum("hrd,hkd->hrk", out_gradient, v, precision="highest")
        s_gradient = jnp.where(weights > 0, weights * (w_gradient + common), 0.0)
        q_step, k_gradient, c_step = pull(s_gradient)
        if pools:
            pools = tiles.scatter_add(operands.pages.layout, pools, page_block.ids, k_gradient, v_gradient)
        return q_gradient + q_step, pools, jax.tree.map(jnp.add, constants, c_step)

    return walk.over_page_blocks(0, walk.num_page_blocks(visits), visits, step, (jnp.zeros_like(q), pools, constants))


def _require_alike(q: Any, constants: Any) -> None:
    """``ValueError`` for a gradient of a term's constant that devices share, in a caller's ``jax.shard_map``.

    It is a sum over devices, and these do not take the same number of steps.
    """
    for constant in jax.tree.leaves(constants):
        missing = tuple(sorted(varying_axes(q) - varying_axes(constant), key=str))
        if missing:
            raise ValueError(
                f"A score operation or a mask closes over {jax.typeof(constant)}, which is one value for all devices "
                f"along {missing}. Its gradient would need a collective in a loop. Make it a value of each device, "
                "before the term closes over it and inside of jax.shard_map: "
                f'x = jax.lax.pcast(x, {missing}, to="varying").'
            )
