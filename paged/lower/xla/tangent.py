"""The XLA lowering in forward mode: the tiles of the forward pass once more, with weights from the log-sum-exp.

As in `backward`, nothing that grows with tokens x length is kept, and JAX differentiates the program's score
operations, one tile at a time.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from paged.spec import AttentionState

from ..program import Visits, select_values
from . import tiles
from .at_once import Tiles, for_derivatives, with_visits
from .blocks import RowBlock
from .schedule import AT_ONCE
from .walk import Operands, PageBlock, Parts, Walk


def tangent(walk: Walk, operands: Operands, state: AttentionState, along: Parts) -> AttentionState:
    """The change of `attend`'s result ``state`` as the operands move along ``along``; 0 in empty rows."""
    start = AttentionState(jnp.zeros_like(state.out), jnp.zeros_like(state.lse))
    if walk.form == AT_ONCE:
        return _at_once(walk, operands, state, along, start)
    row_blocks = operands.row_blocks
    tokens = operands.q.shape[0]

    def put_row_block(which, changes):
        row_block = row_blocks.block(operands.seqs, which, walk.rows)
        row = jnp.where(row_block.is_row, row_block.row, tokens)
        out, lse = _row_block_tangent(walk, row_block, operands, state, along)
        out = changes.out.at[row].set(walk.unfold(out), mode="drop")
        return AttentionState(out, changes.lse.at[row].set(walk.unfold(lse)[..., 0], mode="drop"))

    return jax.lax.fori_loop(0, row_blocks.count, put_row_block, start)


def _row_block_tangent(walk: Walk, row_block: RowBlock, operands: Operands, state: AttentionState, along: Parts):
    """The changes of one row block's outputs and log-sum-exps, folded."""
    rows = _Rows.of(walk, row_block, operands, state)
    visits, p = walk.visits(row_block, operands), walk.positions(row_block)
    rows = rows.moving(walk, row_block, along)

    def step(i, carry, is_masked):
        page_block = walk.page_block(i, visits, row_block, operands.pages.layout.page_size)
        return _of_tile(walk, operands, along, rows, p, row_block, page_block, i, is_masked, carry)

    start = (jnp.zeros_like(rows.out), jnp.zeros_like(rows.lse))
    changes = walk.over_page_blocks(0, walk.num_page_blocks(visits), visits, step, start)
    return rows.finish(*changes)


def _at_once(walk: Walk, operands: Operands, state: AttentionState, along: Parts, start: Any) -> AttentionState:
    walk = for_derivatives(walk, operands)
    sizes = Tiles.of(walk, operands)

    def put_group(which: Array, changes: AttentionState) -> AttentionState:
        row_block, visits = with_visits(walk, operands, which)
        rows = jax.vmap(lambda one: _Rows.of(walk, one, operands, state).moving(walk, one, along))(row_block)

        def step(i: Any, carry: Any) -> Any:
            def of_one(rows: _Rows, row_block: RowBlock, visits: Visits, carry: Any) -> Any:
                page_block = walk.page_block(i, visits, row_block, operands.pages.layout.page_size)
                p = walk.positions(row_block)
                return _of_tile(walk, operands, along, rows, p, row_block, page_block, None, True, carry)

            return jax.vmap(of_one)(rows, row_block, visits, carry)

        zeros = (jnp.zeros_like(rows.out), jnp.zeros_like(rows.lse))
        out, lse = rows.finish(*sizes.over_page_blocks(walk, visits, step, zeros))
        row = jnp.where(row_block.is_row, row_block.row, operands.q.shape[0])
        out = changes.out.at[row].set(jax.vmap(walk.unfold)(out), mode="drop")
        return AttentionState(out, changes.lse.at[row].set(jax.vmap(walk.unfold)(lse)[..., 0], mode="drop"))

    return sizes.over_groups(operands, put_group, start)


class _Rows(NamedTuple):
    """Of one row block, folded: queries, outputs, log-sum-exps, and how the queries move; None if they do not."""

    q: Array
    out: Array
    lse: Array
    q_move: Array | None = None

    @classmethod
    def of(cls, walk: Walk, row_block: RowBlock, operands: Operands, state: AttentionState) -> "_Rows":
        at_rows = functools.partial(walk.rows_of, row_block)
        q, out, lse = at_rows(operands.q), at_rows(state.out), at_rows(state.lse[..., None])
        lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
        return cls(q, out, lse)

    def moving(self, walk: Walk, row_block: RowBlock, along: Parts) -> "_Rows":
        """The rows with how their queries move."""
        return self if along.q is None else self._replace(q_move=walk.rows_of(row_block, along.q))

    def finish(self, out_change: Array, lse_change: Array) -> tuple[Array, Array]:
        """The changes of outputs and log-sum-exps, from the sums over all keys."""
        # out = sum_j exp(s_j - lse) v_j, so that a change of lse takes from every weight alike.
        return out_change - lse_change * self.out, lse_change


def _of_tile(
    walk: Walk,
    operands: Operands,
    along: Parts,
    rows: _Rows,
    p: Array,
    row_block: RowBlock,
    page_block: PageBlock,
    counter: Any,
    is_masked: bool,
    carry: tuple[Array, Array],
) -> tuple[Array, Array]:
    """The sums over keys with those of a tile added."""
    out_change, lse_change = carry
    k, v = tiles.gather(operands.pages, page_block.ids, counter)
    k_move = v_move = None
    if along.arrays:
        moved = dataclasses.replace(operands.pages, arrays=along.arrays)
        k_move, v_move = tiles.gather(moved, page_block.ids, counter)
    is_visible = walk.visible(page_block, row_block, operands.constants) if is_masked else None
    if is_visible is not None:
        k, v, k_move, v_move = (x if x is None else select_values(is_visible, x) for x in (k, v, k_move, v_move))

    def scores(at):
        constants = Parts(None, (), at["constants"]).put_constants(operands.constants)
        return walk.scores(at.get("q", rows.q), at.get("k", k), constants, p, page_block.j, row_block.numbers)

    moves: dict[str, Any] = {"constants": along.constants}
    if rows.q_move is not None:
        moves["q"] = rows.q_move
    if k_move is not None:
        moves["k"] = k_move
    own = Parts.of(operands).constants
    at = {
        "q": rows.q,
        "k": k,
        "constants": tuple(c if m is not None else None for c, m in zip(own, along.constants, strict=True)),
    }
    s, s_change = jax.jvp(scores, ({name: at[name] for name in moves},), (moves,))
    weights = jnp.exp(s - rows.lse)
    if is_visible is not None:
        weights = jnp.where(is_visible, weights, 0.0)
    changes = jnp.where(weights > 0, weights * s_change, 0.0)
    out_change = out_change + jnp.einsum("hrk,hkd->hrd", changes, v, precision="highest")
    if v_move is not None:
        out_change = out_change + jnp.einsum("hrk,hkd->hrd", weights, v_move, precision="highest")
    return out_change, lse_change + jnp.sum(changes, axis=-1, keepdims=True)
