"""The XLA lowering's gradient: the tiles of the forward pass once more, with weights recomputed from the log-sum-exp.

Nothing that grows with tokens x length is kept between the passes (Dao et al., arXiv:2205.14135, algorithm 4). JAX
differentiates the program's score operations, one tile at a time.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from paged.spec import AttentionState

from ..jax_version import vary_alike, varying_axes
from ..program import Visits, select_values
from . import tiles
from .at_once import Tiles, for_derivatives, with_visits
from .blocks import RowBlock
from .schedule import AT_ONCE
from .walk import Operands, PageBlock, Parts, Walk


def backward(walk: Walk, operands: Operands, state: AttentionState, cotangent: AttentionState, like: Parts) -> Parts:
    """Gradients of the operands of `attend`, whose result ``state`` is: of the parts that are in ``like``."""
    moved = Parts.of(operands, like).constants
    _require_alike(operands.q, moved)
    pools = tuple(jnp.zeros(a.shape, jnp.float32) for a in operands.pages.arrays if like.arrays)
    zeros = jax.tree.map(lambda c: jnp.zeros(c.shape, c.dtype), moved)
    _, start = vary_alike(operands, (jnp.zeros(operands.q.shape, jnp.float32), pools, zeros))
    run = _at_once if walk.form == AT_ONCE else _in_turn
    q, pools, constants = run(walk, operands, _Known(state, cotangent, moved), start)
    cast = tuple(pool.astype(array.dtype) for pool, array in zip(pools, operands.pages.arrays, strict=False))
    return Parts(q.astype(operands.q.dtype), cast, constants).only(like)


class _Known(NamedTuple):
    """What a gradient is computed from besides the operands; and the constants that have a gradient."""

    state: AttentionState
    cotangent: AttentionState
    moved: Any


class _Rows(NamedTuple):
    """Of one row block, folded: queries, log-sum-exps, the outputs' gradients, and what all of a row's keys share."""

    q: Array
    lse: Array
    out_gradient: Array
    common: Array

    @classmethod
    def of(cls, walk: Walk, row_block: RowBlock, operands: Operands, known: _Known) -> "_Rows":
        state, cotangent = known.state, known.cotangent
        at_rows = functools.partial(walk.rows_of, row_block)
        q, out, out_gradient = at_rows(operands.q), at_rows(state.out), at_rows(cotangent.out)
        lse, lse_gradient = at_rows(state.lse[..., None]), at_rows(cotangent.lse[..., None])
        lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
        # d loss / d s_j = w_j (<d out, v_j> - <d out, out> + d lse): the softmax's Jacobian, and lse's.
        common = lse_gradient - jnp.sum(out_gradient * out, axis=-1, keepdims=True)
        return cls(q, lse, out_gradient, common)


def _in_turn(walk: Walk, operands: Operands, known: _Known, start: Any) -> Any:
    row_blocks = operands.row_blocks

    def add_row_block(which, carry):
        q_gradient, pools, constants = carry
        row_block = row_blocks.block(operands.seqs, which, walk.rows)
        q, pools, constants = _row_block_gradient(walk, row_block, operands, known, pools, constants)
        row = jnp.where(row_block.is_row, row_block.row, operands.q.shape[0])
        return q_gradient.at[row].set(walk.unfold(q), mode="drop"), pools, constants

    return jax.lax.fori_loop(0, row_blocks.count, add_row_block, start)


def _row_block_gradient(walk: Walk, row_block: RowBlock, operands: Operands, known: _Known, pools, constants):
    """The gradient of one row block's queries; and those of pools and constants, with the row block's part added."""
    rows = _Rows.of(walk, row_block, operands, known)
    visits, p = walk.visits(row_block, operands), walk.positions(row_block)

    def step(i, carry, is_masked):
        q_gradient, pools, constants = carry
        page_block = walk.page_block(i, visits, row_block, operands.pages.layout.page_size)
        q_step, k, v, c_step = _of_tile(walk, operands, known.moved, rows, p, row_block, page_block, i, is_masked)
        if pools:
            pools = tiles.scatter_add(operands.pages.layout, pools, page_block.ids, k, v)
        return q_gradient + q_step, pools, jax.tree.map(jnp.add, constants, c_step)

    last = walk.num_page_blocks(visits)
    return walk.over_page_blocks(0, last, visits, step, (jnp.zeros_like(rows.q), pools, constants))


def _at_once(walk: Walk, operands: Operands, known: _Known, start: Any) -> Any:
    walk, layout = for_derivatives(walk, operands), operands.pages.layout
    sizes = Tiles.of(walk, operands)

    def of_tile(i: Any, rows: _Rows, row_block: RowBlock, visits: Visits) -> Any:
        page_block, p = walk.page_block(i, visits, row_block, layout.page_size), walk.positions(row_block)
        gradients = _of_tile(walk, operands, known.moved, rows, p, row_block, page_block, None, True)
        return *gradients, page_block.ids

    def add_group(which: Array, carry: Any) -> Any:
        row_block, visits = with_visits(walk, operands, which)
        rows = jax.vmap(lambda one: _Rows.of(walk, one, operands, known))(row_block)

        def step(i: Any, carry: Any) -> Any:
            q_gradient, pools, constants = carry
            of_one = functools.partial(of_tile, i)
            q_step, k, v, c_step, ids = jax.vmap(of_one)(rows, row_block, visits)
            if pools:
                # Pages of several sequences, side by side.
                k, v = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, x.shape[-1]) for x in (k, v))
                pools = tiles.scatter_add(layout, pools, ids.reshape(-1), k, v)
            constants = jax.tree.map(lambda c, step: c + jnp.sum(step, axis=0), constants, c_step)
            return q_gradient + q_step, pools, constants

        q_gradient, *others = carry
        q, *others = sizes.over_page_blocks(walk, visits, step, (jnp.zeros_like(rows.q), *others))
        row = jnp.where(row_block.is_row, row_block.row, operands.q.shape[0])
        return q_gradient.at[row].set(jax.vmap(walk.unfold)(q), mode="drop"), *others

    return sizes.over_groups(operands, add_group, start)


def _of_tile(
    walk: Walk,
    operands: Operands,
    moved: Any,
    rows: _Rows,
    p: Array,
    row_block: RowBlock,
    page_block: PageBlock,
    counter: Any,
    is_masked: bool,
) -> tuple[Array, Array, Array, Any]:
    """A tile's part of the gradients: of queries, of the page block's keys and values, and of constants."""
    is_visible = None

    def scores(q, k, moved):
        constants = Parts(None, (), moved).put_constants(operands.constants)
        return walk.scores(q, k, constants, p, page_block.j, row_block.numbers)

    k, v = tiles.gather(operands.pages, page_block.ids, counter)
    if is_masked:
        is_visible = walk.visible(page_block, row_block, operands.constants)
        k, v = select_values(is_visible, k), select_values(is_visible, v)
    s, pull = jax.vjp(scores, rows.q, k, moved)
    weights = jnp.exp(s - rows.lse)
    if is_visible is not None:
        weights = jnp.where(is_visible, weights, 0.0)
    v_gradient = jnp.einsum("hrk,hrd->hkd", weights, rows.out_gradient, precision="highest")
    w_gradient = jnp.einsum("hrd,hkd->hrk", rows.out_gradient, v, precision="highest")
    s_gradient = jnp.where(weights > 0, weights * (w_gradient + rows.common), 0.0)
    q_step, k_gradient, c_step = pull(s_gradient)
    return q_step, k_gradient, v_gradient, c_step


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
