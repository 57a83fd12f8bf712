"""The XLA lowering in forward mode: the tiles of the forward pass once more, with weights from the log-sum-exp.

As in `backward`, nothing that grows with tokens x length is kept, and JAX differentiates the program's score
operations, one tile at a time.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from paged.spec import AttentionState

from ..program import select_values
from . import tiles
from .blocks import RowBlock
from .walk import Operands, Parts, Walk


def tangent(walk: Walk, operands: Operands, state: AttentionState, along: Parts) -> AttentionState:
    """The change of `attend`'s result ``state`` as the operands move along ``along``; 0 in empty rows."""
    row_blocks = operands.row_blocks
    tokens = operands.q.shape[0]

    def put_row_block(which, changes):
        row_block = row_blocks.block(operands.seqs, which, walk.rows)
        row = jnp.where(row_block.is_row, row_block.row, tokens)
        out, lse = _row_block_tangent(walk, row_block, operands, state, along)
        out = changes.out.at[row].set(walk.unfold(out), mode="drop")
        return AttentionState(out, changes.lse.at[row].set(walk.unfold(lse)[..., 0], mode="drop"))

    start = AttentionState(jnp.zeros_like(state.out), jnp.zeros_like(state.lse))
    return jax.lax.fori_loop(0, row_blocks.count, put_row_block, start)


def _row_block_tangent(walk: Walk, row_block: RowBlock, operands: Operands, state: AttentionState, along: Parts):
    """The changes of one row block's outputs and log-sum-exps, folded."""
    at_rows = functools.partial(walk.rows_of, row_block)
    q, out, lse = at_rows(operands.q), at_rows(state.out), at_rows(state.lse[..., None])
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
    visits, p = walk.visits(row_block, operands), walk.positions(row_block)
    moves: dict[str, Any] = {"constants": along.constants}
    if along.q is not None:
        moves["q"] = at_rows(along.q)

    def step(i, carry, is_masked):
        out_change, lse_change = carry
        page_block = walk.page_block(i, visits, row_block, operands.pages.layout.page_size)
        k, v = tiles.gather(operands.pages, page_block.ids, i)
        k_move = v_move = None
        if along.arrays:
            moved = dataclasses.replace(operands.pages, arrays=along.arrays)
            k_move, v_move = tiles.gather(moved, page_block.ids, i)
        is_visible = walk.visible(page_block, row_block, operands.constants) if is_masked else None
        if is_visible is not None:
            k, v, k_move, v_move = (x if x is None else select_values(is_visible, x) for x in (k, v, k_move, v_move))

        def scores(at):
            constants = Parts(None, (), at["constants"]).put_constants(operands.constants)
            return walk.scores(at.get("q", q), at.get("k", k), constants, p, page_block.j, row_block.numbers)

        step_moves = moves if k_move is None else {**moves, "k": k_move}
        own = Parts.of(operands).constants
        at = {
            "q": q,
            "k": k,
            "constants": tuple(c if m is not None else None for c, m in zip(own, along.constants, strict=True)),
        }
        s, s_change = jax.jvp(scores, ({name: at[name] for name in step_moves},), (step_moves,))
        weights = jnp.exp(s - lse)
        if is_visible is not None:
            weights = jnp.where(is_visible, weights, 0.0)
        changes = jnp.where(weights > 0, weights * s_change, 0.0)
        out_change = out_change + jnp.einsum("hrk,hkd->hrd", changes, v, precision="highest")
        if v_move is not None:
            out_change = out_change + jnp.einsum("hrk,hkd->hrd", weights, v_move, precision="highest")
        return out_change, lse_change + jnp.sum(changes, axis=-1, keepdims=True)

    start = (jnp.zeros_like(out), jnp.zeros_like(lse))
    out_change, lse_change = walk.over_page_blocks(0, walk.num_page_blocks(visits), visits, step, start)
    # out = sum_j exp(s_j - lse) v_j, so that a change of lse takes from every weight alike.
    return out_change - lse_change * out, lse_change
