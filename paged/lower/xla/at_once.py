"""The form ``"at_once"``: many tiles in one operation, so that a call on a GPU is few launches and no loop.

The host of a GPU launches every operation, and it waits for a number from the device before every turn of a loop whose
turns follow the batch. So all row blocks that the schedule names are worked on side by side, each against a page block
of many pages. Where one such step does not cover the call, it runs again: see `repeat`.

What is not visible costs little, although its place in the arrays is there: a page that nobody sees is read as page 0,
which is in the cache, and a list is no longer than the mask allows at any position.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from paged.spec import AttentionState

from ..jax_version import vary_alike, varying_axes
from ..program import Running, Visits, at_most, plain_terms, select_values
from . import tiles
from .blocks import RowBlock
from .sizes import DERIVATIVE_BYTES, FIXED_STEPS, derivative_key_bytes, fit, fixed_steps, is_narrow, is_summed
from .walk import Operands, Walk, dot_products

# Sums over keys are made in as many parts, which fill a machine that has few rows to work on.
_PARTS = 16


def repeat(most: Any, fixed: int, needed: Callable[[], Array], step: Callable[[Any, Any], Any], start: Any) -> Any:
    """``step(i, carry)`` for ``i`` from 0, as often as needed: ``needed()`` times, or up to ``most`` times.

    A step past the last one that is needed must change nothing. At most ``fixed`` steps are no loop. More are a loop
    that follows ``needed``, and for that the host of a GPU reads one number per turn.
    """
    if not isinstance(most, int) or most > fixed:
        return jax.lax.fori_loop(0, needed(), step, start)
    start = step(jnp.int32(0), start)
    for i in range(1, most):
        # Without the barrier XLA would begin all steps at once, and the memory of each would be taken together.
        at, start = jax.lax.optimization_barrier((jnp.int32(i), start))
        start = step(at, start)
    return start


class Tiles(NamedTuple):
    """The row blocks of a call in groups that are worked on side by side, and the steps of each group.

    ``groups`` and ``steps`` are the most that there can be of each. ``fixed_groups`` and ``fixed_steps`` are how many
    are made without asking how many there are: see `repeat`.
    """

    at_once: int
    groups: Any
    steps: Any
    fixed_groups: int
    fixed_steps: int

    @classmethod
    def of(cls, walk: Walk, operands: Operands, fixed: int = FIXED_STEPS) -> "Tiles":
        """The sizes of a walk over these operands, ``fixed`` steps of which are made in any case."""
        most = operands.row_blocks.seq.shape[0]
        at_once = at_most(walk.row_blocks_at_once, most)
        visits = jax.eval_shape(lambda: _with_visits(walk, operands, jnp.int32(0))[1])
        groups, steps = -(-most // at_once), -(-visits.index.shape[0] // walk.pages_per_block)
        return cls(at_once, groups, steps, max(1, fixed // steps) if isinstance(steps, int) else 1, fixed)

    def over_groups(self, operands: Operands, step: Callable[[Array, Any], Any], start: Any) -> Any:
        """Fold ``step(which, carry)`` over the groups, where ``which`` are the numbers of a group's row blocks."""
        one = lambda i, carry: step(i * self.at_once + jnp.arange(self.at_once, dtype=jnp.int32), carry)
        needed = lambda: -(-operands.row_blocks.count // self.at_once)
        return repeat(self.groups, self.fixed_groups, needed, one, start)

    def over_page_blocks(self, walk: Walk, visits: Visits, step: Callable[[Any, Any], Any], start: Any) -> Any:
        """Fold ``step(i, carry)`` over the page blocks of a group, whose ``visits`` are of all its row blocks."""
        needed = lambda: jnp.max(walk.num_page_blocks(visits), initial=0)
        return repeat(self.steps, self.fixed_steps, needed, step, start)


def _with_visits(walk: Walk, operands: Operands, which: Array) -> tuple[RowBlock, Visits]:
    row_block = operands.row_blocks.block(operands.seqs, which, walk.rows)
    return row_block, walk.visits(row_block, operands)


def with_visits(walk: Walk, operands: Operands, which: Array) -> tuple[RowBlock, Visits]:
    """Some row blocks and the pages that each visits, with an axis first everywhere."""
    return jax.vmap(functools.partial(_with_visits, walk, operands))(which)


def for_derivatives(walk: Walk, operands: Operands) -> Walk:
    """The walk in tiles whose derivatives take no more memory than a step may take."""
    layout, most = operands.pages.layout, operands.row_blocks.seq.shape[0]
    per_key = derivative_key_bytes(walk.program, layout, walk.rows)
    at_once, pages = at_most(walk.row_blocks_at_once, most), walk.pages_per_block
    at_once, pages = fit(DERIVATIVE_BYTES, per_key, layout.page_size, at_once, pages)
    if pages != walk.pages_per_block:
        q = operands.q
        shape = walk.program.num_kv_heads, walk.program.group * walk.rows, pages * layout.page_size
        terms = plain_terms(walk.program, *shape, like=q) if varying_axes(q) else plain_terms(walk.program, *shape)
        walk = dataclasses.replace(walk, terms=terms, pages_per_block=pages)
    return dataclasses.replace(walk, row_blocks_at_once=at_once)


def attend(walk: Walk, operands: Operands) -> AttentionState:
    """See `forward.attend`."""
    tokens, sizes = operands.q.shape[0], Tiles.of(walk, operands, fixed_steps(walk.program.group * walk.rows))

    def attend_some(which: Array, state: AttentionState) -> AttentionState:
        row, out, lse = _attend_row_blocks(walk, sizes, operands, which)
        return AttentionState(state.out.at[row].set(out, mode="drop"), state.lse.at[row].set(lse, mode="drop"))

    heads, dim = walk.program.num_q_heads, operands.pages.layout.value_dim
    out = jnp.zeros((tokens, heads, dim), jnp.float32)
    _, start = vary_alike(operands, AttentionState(out, jnp.full((tokens, heads), -jnp.inf, jnp.float32)))
    return sizes.over_groups(operands, attend_some, start)


def _attend_row_blocks(walk: Walk, sizes: Tiles, operands: Operands, which: Array) -> tuple[Array, Array, Array]:
    """Some row blocks over all pages that they visit: the batch's row of each row, its output and log-sum-exp."""
    row_block, visits = with_visits(walk, operands, which)
    q = jax.vmap(walk.fold)(operands.q[row_block.row].astype(jnp.float32))
    running = Running.start(*q.shape[:-1], dim=operands.pages.layout.value_dim)
    _, start = vary_alike(operands, running)

    def step(i: Any, running: Running) -> Running:
        return jax.vmap(functools.partial(_step, walk, operands, i))(row_block, visits, q, running)

    out, lse = sizes.over_page_blocks(walk, visits, step, start).finish()
    row = jnp.where(row_block.is_row, row_block.row, operands.q.shape[0])
    return row, jax.vmap(walk.unfold)(out), jax.vmap(walk.unfold)(lse)[..., 0]


def _step(
    walk: Walk,
    operands: Operands,
    i: Any,
    row_block: RowBlock,
    visits: Visits,
    q: Float[Array, "kv_heads group_rows head_dim"],
    running: Running,
) -> Running:
    """One step of the softmax: a row block against its page block number ``i``."""
    pages, constants = operands.pages, operands.constants
    page_block = walk.page_block(i, visits, row_block, pages.layout.page_size)
    is_visible = walk.visible(page_block, row_block, constants)
    k, v = tiles.gather(pages, page_block.ids, None)
    narrow = operands.q.dtype if is_narrow(operands.q.dtype, pages.layout) else None
    if is_summed(q.shape[1]):
        product: Any = _sums_of_products
    elif narrow is not None:
        # Both are exact in their dtype; the scale, which is not, comes after the product.
        product = lambda _, k: walk.program.scale * _dots("hrd,hkd->hrk", q.astype(narrow), k.astype(narrow))
    else:
        product = dot_products
    s = walk.scores(q, k, constants, walk.positions(row_block), page_block.j, row_block.numbers, product)
    running, weights = running.weigh(jnp.where(is_visible, s, -jnp.inf))
    if is_summed(q.shape[1]):
        return running._replace(values=running.values + _weighted_sums(weights, v, is_visible))
    v = select_values(is_visible, v)
    return running.add(weights, v) if narrow is None else running.add(weights, v.astype(narrow), _of_halves)


def _dots(formula: str, x: Array, y: Array) -> Array:
    return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32)


def _of_halves(weights: Float[Array, "kv_heads rows keys"], v: Float[Array, "kv_heads keys dim"]) -> Array:
    """Weighted sums of 16-bit values, by one product of 16-bit numbers: each weight is the sum of two of these.

    The two lie side by side in the 4 bytes of their weight, so that XLA writes them over the scores, and a product over
    twice as many keys adds them up (seen in compiled code: two arrays of halves would take as much memory again).
    """
    info = jnp.finfo(v.dtype)
    # XLA may leave out a conversion there and back, but not this rounding.
    high = jax.lax.reduce_precision(weights, info.nexp, info.nmant)
    bits = lambda x: jax.lax.bitcast_convert_type(x.astype(v.dtype), jnp.uint16).astype(jnp.uint32)
    halves = jax.lax.bitcast_convert_type((bits(high) << 16) | bits(weights - high), v.dtype)
    return _dots("hrk,hkd->hrd", halves.reshape(*weights.shape[:2], -1), jnp.repeat(v, 2, axis=1))


def _sums_of_products(q: Array, k: Array) -> Array:
    """`dot_products`, written so that XLA reads each page inside of the sum and stores no tile of keys."""
    return jnp.sum(q[:, :, None] * k[:, None], axis=-1)


def _weighted_sums(
    weights: Float[Array, "kv_heads rows keys"], v: Float[Array, "kv_heads keys dim"], is_visible: Bool[Array, "..."]
) -> Float[Array, "kv_heads rows dim"]:
    """Weighted sums of the values that each row sees, written so that XLA reads each page inside of the sum.

    A sum by `jnp.sum` would store a transposed tile of values first (seen in compiled code): XLA makes the axis of such
    a sum the last one in memory. A sum over windows keeps the order of the axes.
    """
    keys = v.shape[1]
    part = keys // math.gcd(keys, _PARTS) if isinstance(keys, int) else keys
    values = jnp.where(is_visible[..., None], weights[..., None] * v[:, None], 0.0)
    window = (1, 1, part, 1)
    parts = jax.lax.reduce_window(values, 0.0, jax.lax.add, window, window, "VALID")
    return functools.reduce(jnp.add, (parts[:, :, i] for i in range(parts.shape[2])))
