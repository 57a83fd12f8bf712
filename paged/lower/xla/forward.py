"""The XLA lowering's forward pass: blocks of query rows, each over the pages that it can see, by online softmax.

Blocks of rows run one after the other (or in lanes, several at once), and inside each a loop runs over its blocks of
pages, first those that need no mask and then the rest, with as many steps as there are visible pages. Where rows are
few, a step takes several blocks of pages. So scores of a whole row never exist, work follows what is visible, and a
sequence's result depends on nothing but itself.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged.spec import AttentionState

from ..softmax import Running, select_values
from ..visits import Visits
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

    def scores(i: Array, is_masked: bool) -> Array:
        tile = walk.tile(i, visits, pages.layout.page_size)
        k, _ = tiles.gather(pages, tile.ids, i)
        s = walk.scores_keys_left(q, k, constants, p, tile.j)
        return jnp.where(walk.visible(tile, block, constants), s, -jnp.inf) if is_masked else s

    def values(i: Array, is_masked: bool) -> Array:
        tile = walk.tile(i, visits, pages.layout.page_size)
        _, v = tiles.gather(pages, tile.ids, i)
        return select_values(walk.visible(tile, block, constants), v) if is_masked else v

    def step(i: Array, running: Running, is_masked: bool) -> Running:
        return running.step(scores(i, is_masked), values(i, is_masked))

    start = Running.start(walk.program.num_kv_heads, q.shape[1], dim=pages.layout.value_dim)
    if walk.blocks_per_step == 1:
        return walk.over_tiles(0, walk.num_tiles(visits), visits, step, start).finish()
    steps = -(-walk.num_tiles(visits) // walk.blocks_per_step)
    keys = walk.pages_per_block * pages.layout.page_size
    step_of_several = functools.partial(_step_of_several, walk, visits, keys, scores, values)
    return jax.lax.fori_loop(0, steps, step_of_several, start).finish()


def _step_of_several(
    walk: Walk,
    visits: Visits,
    keys: int,
    scores: Callable[[Array, bool], Array],
    values: Callable[[Array, bool], Array],
    which: Array,
    running: Running,
) -> Running:
    """Step number ``which`` of the softmax, over several tiles of ``keys`` keys.

    The scores of all of them come first, and then their values: a tile of either kind is half of what the cache must
    hold, and what the softmax costs a step is paid once for all of them. It is their scores that are kept meanwhile,
    so it is for few query rows.
    """
    first = which * walk.blocks_per_step
    last = jnp.minimum(first + walk.blocks_per_step, walk.num_tiles(visits))

    def put_scores(i: Array, s: Array, is_masked: bool) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(s, scores(i, is_masked), (i - first) * keys, axis=2)

    def add_values(i: Array, running: Running, is_masked: bool) -> Running:
        part = jax.lax.dynamic_slice_in_dim(weights, (i - first) * keys, keys, axis=2)
        return running.add(part, values(i, is_masked))

    no_scores = jnp.full((*running.top.shape[:2], walk.blocks_per_step * keys), -jnp.inf)
    running, weights = running.weigh(walk.over_tiles(first, last, visits, put_scores, no_scores))
    return walk.over_tiles(first, last, visits, add_values, running)


def _forward(walk: Walk, operands: Operands) -> Any:
    state = attend(walk, operands)
    return state, (operands, state)


attend.defvjp(_forward, backward)
