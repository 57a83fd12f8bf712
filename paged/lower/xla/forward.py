"""The XLA lowering's forward pass: blocks of query rows, each over the pages that it can see, by online softmax.

Blocks of rows run one after the other (or in lanes, several at once), and inside each a loop runs over its blocks of
pages, first those that need no mask and then the rest, with as many steps as there are visible pages. So scores of a
whole row never exist, work follows what is visible, and a sequence's result depends on nothing but itself.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged.spec import AttentionState

from ..softmax import Running, select_values
from . import tiles
from .backward import backward
from .blocks import Block, Blocks
from .walk import Operands, Walk


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(walk: Walk, operands: Operands) -> AttentionState:
    """State of the members' rows, float32; rows of no member are empty. Every gradient is finite."""
    tokens, dim = operands.q.shape[0], operands.pages.layout.value_dim
    blocks = Blocks.of(operands.seqs, operands.is_member, walk.rows)

    def attend_one(which):
        block = blocks.block(which, walk.rows)
        out, lse = _attend_block(walk, block, operands)
        row = jnp.where(block.is_row, block.row, tokens)
        return row, walk.unfold(out), walk.unfold(lse)[..., 0]

    def attend_lanes(i, state):
        if walk.lanes == 1:
            row, out, lse = attend_one(i)
        else:
            row, out, lse = jax.vmap(attend_one)(i * walk.lanes + jnp.arange(walk.lanes))
        return AttentionState(state.out.at[row].set(out, mode="drop"), state.lse.at[row].set(lse, mode="drop"))

    heads = walk.program.num_q_heads
    empty = AttentionState(jnp.zeros((tokens, heads, dim)), jnp.full((tokens, heads), -jnp.inf))
    return jax.lax.fori_loop(0, -(-blocks.count // walk.lanes), attend_lanes, empty)


def _attend_block(
    walk: Walk, block: Block, operands: Operands
) -> tuple[Float[Array, "kv_heads group_rows dim"], Float[Array, "kv_heads group_rows 1"]]:
    """One block of query rows over all the pages it visits."""
    pages, constants = operands.pages, operands.constants
    q = walk.fold(operands.q[block.row].astype(jnp.float32))
    visits, p = walk.visits(block, operands), walk.positions(block)

    def step(i: Array, running: Running, is_masked: bool) -> Running:
        tile = walk.tile(i, visits, pages.layout.page_size)
        k, v = tiles.gather(pages, tile.ids, i)
        s = walk.scores_keys_left(q, k, constants, p, tile.j)
        if is_masked:
            is_visible = walk.visible(tile, block, constants)
            s, v = jnp.where(is_visible, s, -jnp.inf), select_values(is_visible, v)
        return running.step(s, v)

    start = Running.start(walk.program.num_kv_heads, q.shape[1], dim=pages.layout.value_dim)
    return walk.over_tiles(visits, step, start).finish()


def _forward(walk: Walk, operands: Operands) -> Any:
    state = attend(walk, operands)
    return state, (operands, state)


attend.defvjp(_forward, backward)
