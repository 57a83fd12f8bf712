"""The XLA lowering's forward pass: every row block, over the page blocks that it can see, by online softmax.

Row blocks run one after the other, or several side by side. For each of them a loop runs over its page blocks: first
those that need no mask, then the others, as many as are visible. With few query rows, one step of the loop takes
several page blocks. So no score of a whole row is ever stored, work follows what is visible, and a sequence's result
depends on that sequence alone. What is here for the sake of CPUs is in `cpu`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged.spec import AttentionState

from ..jax_version import vary_alike
from ..program import Running, Visits
from . import tiles
from .at_once import attend as attend_at_once
from .blocks import RowBlock
from .cpu import Buffers, dot_products_keys_left
from .schedule import AT_ONCE
from .walk import Operands, Walk


def attend(walk: Walk, operands: Operands) -> AttentionState:
    """State of the members' rows, float32; rows of no member are empty. Every gradient is finite."""
    if walk.form == AT_ONCE:
        return attend_at_once(walk, operands)
    tokens, layout = operands.q.shape[0], operands.pages.layout
    row_blocks = operands.row_blocks
    at_once = walk.row_blocks_at_once

    def attend_one(which, buffers):
        row_block = row_blocks.block(operands.seqs, which, walk.rows)
        (out, lse), buffers = _attend_row_block(walk, row_block, operands, buffers)
        row = jnp.where(row_block.is_row, row_block.row, tokens)
        return (row, walk.unfold(out), walk.unfold(lse)[..., 0]), buffers

    def attend_some(i, carry):
        state, buffers = carry
        if at_once == 1:
            (row, out, lse), buffers = attend_one(i, buffers)
        else:
            which = i * at_once + jnp.arange(at_once, dtype=jnp.int32)
            (row, out, lse), _ = jax.vmap(attend_one, in_axes=(0, None))(which, buffers)
        # Rows that the sequence does not have are sent past the end, and dropped.
        state = AttentionState(state.out.at[row].set(out, mode="drop"), state.lse.at[row].set(lse, mode="drop"))
        return state, buffers

    heads = walk.program.num_q_heads
    empty = AttentionState(
        jnp.zeros((tokens, heads, layout.value_dim), jnp.float32), jnp.full((tokens, heads), -jnp.inf, jnp.float32)
    )
    buffers = Buffers.of(
        layout,
        pages_per_block=walk.pages_per_block,
        blocks_per_step=walk.blocks_per_step,
        row_blocks_at_once=at_once,
    )
    _, start = vary_alike(operands, (empty, buffers))
    state, _ = jax.lax.fori_loop(0, -(-row_blocks.count // at_once), attend_some, start)
    return state


def _attend_row_block(
    walk: Walk, row_block: RowBlock, operands: Operands, buffers: Buffers
) -> tuple[tuple[Float[Array, "kv_heads group_rows dim"], Float[Array, "kv_heads group_rows 1"]], Buffers]:
    """One row block over all the pages it visits: the normalised output, and the log-sum-exp."""
    pages, constants, size = operands.pages, operands.constants, operands.pages.layout.page_size
    q = walk.fold(operands.q[row_block.row].astype(jnp.float32))
    visits, p = walk.visits(row_block, operands), walk.positions(row_block)

    def scores(i: Array, buffers: Buffers, is_masked: bool) -> tuple[Array, Buffers]:
        page_block = walk.page_block(i, visits, row_block, size)
        k, buffers = tiles.keys(pages, page_block.ids, i, buffers)
        s = walk.scores(q, k, constants, p, page_block.j, row_block.numbers, dot_products_keys_left)
        s = jnp.where(walk.visible(page_block, row_block, constants), s, -jnp.inf) if is_masked else s
        return s, buffers

    def values(i: Array, buffers: Buffers, is_masked: bool) -> tuple[Array, Buffers]:
        page_block = walk.page_block(i, visits, row_block, size)
        is_visible = walk.visible(page_block, row_block, constants) if is_masked else None
        return tiles.values(pages, page_block.ids, i, buffers, is_visible)

    def step(i: Array, carry: tuple[Running, Buffers], is_masked: bool) -> tuple[Running, Buffers]:
        running, buffers = carry
        s, buffers = scores(i, buffers, is_masked)
        v, buffers = values(i, buffers, is_masked)
        return running.step(s, v), buffers

    running = Running.start(walk.program.num_kv_heads, q.shape[1], dim=pages.layout.value_dim)
    _, start = vary_alike(q, (running, buffers))
    if walk.blocks_per_step == 1:
        running, buffers = walk.over_page_blocks(0, walk.num_page_blocks(visits), visits, step, start)
    else:
        steps = -(-walk.num_page_blocks(visits) // walk.blocks_per_step)
        keys = walk.pages_per_block * size
        step_of_several = functools.partial(_step_of_several, walk, visits, keys, scores, values)
        running, buffers = jax.lax.fori_loop(0, steps, step_of_several, start)
    return running.finish(), buffers


def _step_of_several(
    walk: Walk,
    visits: Visits,
    keys: int,
    scores: Callable[[Array, Buffers, bool], tuple[Array, Buffers]],
    values: Callable[[Array, Buffers, bool], tuple[Array, Buffers]],
    which: Array,
    carry: tuple[Running, Buffers],
) -> tuple[Running, Buffers]:
    """Step number ``which`` of the softmax, over several page blocks of ``keys`` keys.

    First come the scores of all page blocks, then one softmax, then the values of all page blocks. So the cache holds
    tiles of keys or tiles of values at a time, and the fixed cost of a softmax step is paid once. The scores of all
    page blocks are kept meanwhile, which is cheap where query rows are few.
    """
    running, buffers = carry
    first = which * walk.blocks_per_step
    last = jnp.minimum(first + walk.blocks_per_step, walk.num_page_blocks(visits))

    def put_scores(i: Array, carry: tuple[Array, Buffers], is_masked: bool) -> tuple[Array, Buffers]:
        s, buffers = carry
        of_block, buffers = scores(i, buffers, is_masked)
        return jax.lax.dynamic_update_slice_in_dim(s, of_block, (i - first) * keys, axis=2), buffers

    def add_values(i: Array, carry: tuple[Running, Buffers], is_masked: bool) -> tuple[Running, Buffers]:
        running, buffers = carry
        of_block = jax.lax.dynamic_slice_in_dim(weights, (i - first) * keys, keys, axis=2)
        v, buffers = values(i, buffers, is_masked)
        return running.add(of_block, v), buffers

    no_scores = jnp.full((*running.top.shape[:2], walk.blocks_per_step * keys), -jnp.inf, jnp.float32)
    _, start = vary_alike(running, (no_scores, buffers))
    s, buffers = walk.over_page_blocks(first, last, visits, put_scores, start)
    running, weights = running.weigh(s)
    return walk.over_page_blocks(first, last, visits, add_values, (running, buffers))
