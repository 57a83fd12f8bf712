"""The XLA lowering's forward pass: blocks of query rows, each over the pages that it can see, by online softmax.

Blocks of rows run one after the other, and inside each a loop runs over its blocks of pages, first those that need no
mask and then the rest, with as many steps as there are visible pages. So scores of a whole row never exist, work
follows what is visible, and a sequence's result depends on nothing but itself.
"""

import functools

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


def _attend_block(
    walk: Walk, block: Block, operands: Operands
) -> tuple[Float[Array, "kv_heads group_rows dim"], Float[Array, "kv_heads group_rows"]]:
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

    whole, steps = walk.whole_steps(visits), walk.steps(visits)
    running = Running.start(walk.program.num_kv_heads, q.shape[1], pages.layout.value_dim)
    running = jax.lax.fori_loop(0, whole, functools.partial(step, is_masked=False), running)
    running = jax.lax.fori_loop(whole, steps, functools.partial(step, is_masked=True), running)
    return running.finish()


def _forward(walk: Walk, operands: Operands) -> tuple[AttentionState, tuple[Operands, AttentionState]]:
    state = attend(walk, operands)
    return state, (operands, state)


attend.defvjp(_forward, backward)
