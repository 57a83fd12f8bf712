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

from ..program import Running, Visits, select_values
from . import tiles
from .backward import backward
from .blocks import Block, Blocks
from .tiles import NO_BUFFERS, Buffers
from .walk import Operands, Walk


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(walk: Walk, operands: Operands) -> AttentionState:
    """State of the members' rows, float32; rows of no member are empty. Every gradient is finite."""
    tokens, dim = operands.q.shape[0], operands.pages.layout.value_dim
    blocks = Blocks.of(operands.seqs, operands.is_member, walk.rows)

    def attend_one(which, buffers):
        block = blocks.block(which, walk.rows)
        (out, lse), buffers = _attend_block(walk, block, operands, buffers)
        row = jnp.where(block.is_row, block.row, tokens)
        return (row, walk.unfold(out), walk.unfold(lse)[..., 0]), buffers

    def attend_lanes(i, carry):
        state, buffers = carry
        if walk.lanes == 1:
            (row, out, lse), buffers = attend_one(i, buffers)
        else:
            which = i * walk.lanes + jnp.arange(walk.lanes)
            (row, out, lse), _ = jax.vmap(attend_one, in_axes=(0, None))(which, buffers)
        state = AttentionState(state.out.at[row].set(out, mode="drop"), state.lse.at[row].set(lse, mode="drop"))
        return state, buffers

    heads = walk.program.num_q_heads
    empty = AttentionState(
        jnp.zeros((tokens, heads, dim), jnp.float32), jnp.full((tokens, heads), -jnp.inf, jnp.float32)
    )
    buffers = Buffers.of(operands.pages.layout, walk.pages_per_block) if walk.has_buffers else NO_BUFFERS
    state, _ = jax.lax.fori_loop(0, -(-blocks.count // walk.lanes), attend_lanes, (empty, buffers))
    return state


def _attend_block(
    walk: Walk, block: Block, operands: Operands, buffers: Buffers
) -> tuple[tuple[Float[Array, "kv_heads group_rows dim"], Float[Array, "kv_heads group_rows 1"]], Buffers]:
    """One block of query rows over all the pages it visits."""
    pages, constants = operands.pages, operands.constants
    q = walk.fold(operands.q[block.row].astype(jnp.float32))
    visits, p = walk.visits(block, operands), walk.positions(block)

    def scores(i: Array, buffers: Buffers, is_masked: bool) -> tuple[Array, Buffers]:
        tile = walk.tile(i, visits, pages.layout.page_size)
        k, buffers = buffers.put_keys(lambda a, b: tiles.gather(pages, tile.ids[a:b], i)[0], walk.pages_per_block)
        s = walk.scores_keys_left(q, k, constants, p, tile.j)
        s = jnp.where(walk.visible(tile, block, constants), s, -jnp.inf) if is_masked else s
        return s, buffers

    def values(i: Array, buffers: Buffers, is_masked: bool) -> tuple[Array, Buffers]:
        size = pages.layout.page_size
        tile = walk.tile(i, visits, size)
        is_visible = walk.visible(tile, block, constants) if is_masked else None

        def take(first: int, last: int) -> Array:
            _, v = tiles.gather(pages, tile.ids[first:last], i)
            return v if is_visible is None else select_values(is_visible[..., first * size : last * size], v)

        return buffers.put_values(take, walk.pages_per_block)

    def step(i: Array, carry: tuple[Running, Buffers], is_masked: bool) -> tuple[Running, Buffers]:
        running, buffers = carry
        s, buffers = scores(i, buffers, is_masked)
        v, buffers = values(i, buffers, is_masked)
        return running.step(s, v), buffers

    start = Running.start(walk.program.num_kv_heads, q.shape[1], dim=pages.layout.value_dim), buffers
    if walk.blocks_per_step == 1:
        running, buffers = walk.over_tiles(0, walk.num_tiles(visits), visits, step, start)
    else:
        steps = -(-walk.num_tiles(visits) // walk.blocks_per_step)
        keys = walk.pages_per_block * pages.layout.page_size
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
    """Step number ``which`` of the softmax, over several tiles of ``keys`` keys.

    The scores of all of them come first, and then their values: a tile of either kind is half of what the cache must
    hold, and what the softmax costs a step is paid once for all of them. It is their scores that are kept meanwhile,
    so it is for few query rows.
    """
    running, buffers = carry
    first = which * walk.blocks_per_step
    last = jnp.minimum(first + walk.blocks_per_step, walk.num_tiles(visits))

    def put_scores(i: Array, carry: tuple[Array, Buffers], is_masked: bool) -> tuple[Array, Buffers]:
        s, buffers = carry
        part, buffers = scores(i, buffers, is_masked)
        return jax.lax.dynamic_update_slice_in_dim(s, part, (i - first) * keys, axis=2), buffers

    def add_values(i: Array, carry: tuple[Running, Buffers], is_masked: bool) -> tuple[Running, Buffers]:
        running, buffers = carry
        part = jax.lax.dynamic_slice_in_dim(weights, (i - first) * keys, keys, axis=2)
        v, buffers = values(i, buffers, is_masked)
        return running.add(part, v), buffers

    no_scores = jnp.full((*running.top.shape[:2], walk.blocks_per_step * keys), -jnp.inf, jnp.float32)
    s, buffers = walk.over_tiles(first, last, visits, put_scores, (no_scores, buffers))
    running, weights = running.weigh(s)
    return walk.over_tiles(first, last, visits, add_values, (running, buffers))


def _forward(walk: Walk, operands: Operands) -> Any:
    state = attend(walk, operands)
    return state, (operands, state)


attend.defvjp(_forward, backward)
