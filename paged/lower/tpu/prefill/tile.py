"""One tile of many query rows over the visible pages of its sequence, near the matrix unit's rate.

The tile meets its pages in blocks, and each block in strip groups (see `shape`). A strip group takes two steps on a
block: `BlockKernel.score` computes its scores, mostly on the matrix unit, and `BlockKernel.weigh` its weights and their
products with the values, mostly on the vector unit. The kernel is a pipeline of these steps. The scores of one strip
group are computed beside the weights of the strip group before it, so that neither unit waits for the other. Of blocks
i and i+1, with 4 strip groups::

    score    group 1 of i    group 2 of i    group 3 of i    group 0 of i+1    group 1 of i+1
    weigh    group 0 of i    group 1 of i    group 2 of i    group 3 of i      group 0 of i+1
    half          0               1               0               1                 0

The steps in one column have no data in common: new scores go to one half of the scratch memory while the scores in the
other half, whose number is in the last line, are weighed. Columns are written as one straight line of code, so that the
compiler can mix their instructions. The pipeline runs on from block to block over *whole* blocks, in which the tile
sees every key. The other blocks need a mask. For each of them the pipeline starts anew.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ...program import update_maximum
from ..chips import LANES
from ..pages import Stream
from .block import Block, BlockKernel
from .loops import Index, div, even_divisor, loop, rem, unrolled_loop
from .refs import Refs, Strides
from .shape import TileShape

# Scores are in units of log 2: powers of two are what a TPU computes, and every other base costs a multiplication.
LOG2E = math.log2(math.e)
# Strip groups in one straight line of code: with fewer, the matrix unit waits where lines meet.
MOST_UNROLLED = 16
# Positions whose rows move to or from `Scratch.apart` at once.
_POSITIONS = 16


@dataclasses.dataclass(frozen=True)
class TileKernel:
    """The kernel for tiles of one shape.

    * ``strides``, ``value_lanes``: where rows lie in `Scratch.apart`, and which lanes of a result are the value's.
    * ``blocks``: code for the first pages of a block, fewest pages first. The last one is for whole blocks.
    * ``most_unrolled``: strip groups in one straight line of code, at most.
    * ``fetches_beside``: whether the copies of a block's pages may start between products.
    """

    shape: TileShape
    strides: Strides
    value_lanes: slice
    blocks: tuple[BlockKernel, ...]
    most_unrolled: int
    fetches_beside: bool

    def run(
        self, refs: Refs, item: Index, end: Index, half: Index, before_results: Callable[[], None], stage: Index
    ) -> Index:
        """Attend over one item's pages and leave the results in their buffer.

        The item's queries are in ``half`` of their buffer, and its first block arrives in ``stage`` of the stream's
        ring. Returns the stage of the next item's first block. ``before_results`` waits until the results' buffer is
        free.
        """
        self._load_queries(refs, half)
        stage = self._over_blocks(refs, item, end, stage)
        self._finish(refs)
        # Here and not earlier: the results of the tile before leave while this tile is worked on. Here and not later:
        # `_store_results` would overwrite them on their way.
        before_results()
        self._store_results(refs)
        return stage

    def _load_queries(self, refs: Refs, half: Index) -> None:
        """Put the queries of each strip together: rows of positions go to ``apart``, and strips are read from there.

        Positions that the batch brings for the rows are laid out beside them.
        """
        scratch, strides, lanes = refs.scratch, self.strides, refs.scratch.queries.shape[1]

        def lay_apart(turn: Index) -> None:
            x = scratch.q_buffer[half, pl.ds(turn * _POSITIONS, _POSITIONS)].astype(jnp.float32)
            scratch.apart[strides.positions_of(turn, _POSITIONS)] = strides.apart(x)
            if scratch.own_rows is not None:
                positions = pl.ds(turn * _POSITIONS, _POSITIONS)
                for register in range(scratch.own_rows.shape[0]):
                    scratch.own_rows[register, positions] = scratch.own_buffer[half, positions, register]

        def load(strip: Index) -> None:
            rows = self.shape.rows_of_strip(strip)
            for column in range(strides.q_columns):
                x = scratch.apart[self._strip_apart(strip, column)]
                width = min(LANES, lanes - column * LANES)
                scratch.queries[rows, pl.ds(column * LANES, width)] = x[:, :width].astype(scratch.queries.dtype)

        loop(self.shape.positions // _POSITIONS, lay_apart)
        unrolled_loop(self.shape.strips, self.most_unrolled // 2, load)

    def clear(self, refs: Refs) -> None:
        """Set the softmax of all rows to that of no key at all. Every tile finds it so, and leaves it so."""
        unrolled_loop(self.shape.strip_groups, self.most_unrolled // 2, functools.partial(self._clear, refs))

    def _clear(self, refs: Refs, strip_group: Index) -> None:
        scratch = refs.scratch
        for state, nothing in ((scratch.top, -jnp.inf), (scratch.total, 0.0), (scratch.values, 0.0)):
            cleared = jnp.full((self.shape.strip_group_rows, state.shape[1]), nothing, jnp.float32)
            state[self.shape.rows_of_strip_group(strip_group)] = cleared

    def _over_blocks(self, refs: Refs, item: Index, end: Index, stage: Index) -> Index:
        """Fold the item's blocks into the softmax: first the whole blocks that need no mask, and then the others.

        Returns the stage after the item's last block.
        """
        stream, kernel = refs.stream, self.blocks[-1]
        size = stream.pages_per_block
        count = stream.work.count[item]
        whole, total = div(stream.work.num_full[item], size), div(count + size - 1, size)

        def block_at(i: Index, stage: Index) -> Block:
            return Block(stage, jax.lax.rem(i, 2), i)

        def fold_whole(i: Index, stage: Index) -> Index:
            # The stage before this one is free: its block was the last one that was folded.
            fetch = self._fetch(stream, end, stream.before(stage))
            here, following, is_last = block_at(i, stage), block_at(i + 1, stream.after(stage)), i + 1 == whole

            # The first scores of the following block are computed at the end of this fold. So that block must have
            # arrived and be prepared before the fold begins: inside, a wait would be a branch in the straight line.
            @pl.when(jnp.logical_not(is_last))
            def _():
                stream.wait_whole(stream.after(stage))
                kernel.prepare(refs, item, following, is_masked=False)

            # The straight line computes the first scores of some block in any case. After the last whole block they are
            # the scores of this block again, which are not read: the next stage may still be filled.
            following = _choose(is_last, here, following)
            self._fold(refs, kernel, item, here, following, is_masked=False, beside=fetch)
            return stream.after(stage)

        def fold_other(i: Index, stage: Index) -> Index:
            stream.fetch_next(end, stream.before(stage))
            stream.wait(item, i, stage)
            # After the wait, or the pages would arrive on top of the zeros; before any product reads the values.
            stream.zero_dead_values(item, i, stage)
            stream.hide_holes(item, i, stage)
            pages = stream.pages_of(item, i)
            enough = sum((pages > block.views.pages_per_block).astype(jnp.int32) for block in self.blocks[:-1])
            branches = [functools.partial(self._fold_masked, refs, block, item) for block in self.blocks]
            jax.lax.switch(enough, branches, block_at(i, stage), pages)
            return stream.after(stage)

        # The pipeline's first step. There are no weights yet that could be computed beside these scores.
        @pl.when(whole > 0)
        def _():
            stream.wait_whole(stage)
            kernel.prepare(refs, item, block_at(0, stage), is_masked=False)
            kernel.score(refs, item, block_at(0, stage), 0, 0, is_masked=False)

        stage = jax.lax.fori_loop(0, whole, fold_whole, stage)
        return jax.lax.fori_loop(whole, total, fold_other, stage)

    def _fetch(self, stream: Stream, end: Index, stage: Index) -> Callable[[int], None] | None:
        """Fetch the next block of the stream into ``stage``, now or beside products.

        Copies start beside products, one share after each strip group, if all strip groups are in one straight line of
        code. Then the result is a function to be called after each of them. Otherwise copies start now.

        In a ring of two stages they must start now: ``stage`` is also the one that is waited for next, before any strip
        group, and a wait for a copy that has not started never ends.
        """
        is_line = even_divisor(self.shape.strip_groups, self.most_unrolled) == self.shape.strip_groups
        if self.fetches_beside and is_line and stream.stages > 2:
            return stream.fetch_next_piecewise(end, stage, self.shape.strip_groups)
        return stream.fetch_next(end, stage)

    def _fold_masked(self, refs: Refs, kernel: BlockKernel, item: Index, here: Block, pages: Index) -> None:
        """Fold one block that needs a mask. It has ``pages`` pages, no more than the kernel's views have."""
        # In this order: scores read the mask that `prepare` stores.
        kernel.prepare(refs, item, here, is_masked=True)
        kernel.score(refs, item, here, 0, 0, is_masked=True)
        self._fold(refs, kernel, item, here, here, is_masked=True)

    def _fold(
        self,
        refs: Refs,
        kernel: BlockKernel,
        item: Index,
        here: Block,
        following: Block,
        is_masked: bool,
        beside: Callable[[int], None] | None = None,
    ) -> None:
        """Fold the block ``here`` into the softmax of all strip groups.

        The scores of strip group 0 are already in half 0 of the scores. While a strip group is weighed, the next one is
        scored; while the last one is weighed, strip group 0 is scored on the block ``following``. ``beside(i)`` is
        called after strip group ``i``.
        """
        groups = self.shape.strip_groups
        unrolled = even_divisor(groups, self.most_unrolled // (2 if is_masked else 1))

        def run_line(turn: Index) -> None:
            for step in range(unrolled):
                strip_group, is_end_of_line = turn * unrolled + step, step + 1 == unrolled
                half, next_half = step % 2, (step + 1) % unrolled % 2
                next_block, next_group = here, strip_group + 1
                if is_end_of_line and unrolled == groups:
                    next_block, next_group = following, 0
                elif is_end_of_line:
                    is_last = strip_group + 1 == groups
                    next_block, next_group = _choose(is_last, following, here), jnp.where(is_last, 0, strip_group + 1)

                score = functools.partial(kernel.score, refs, item, next_block, next_group, next_half, is_masked)
                weigh = functools.partial(kernel.weigh, refs, here, strip_group, half, is_masked)
                # Scores come first, so that their products start while the weights before them are computed. A line
                # with an odd number of strip groups ends in the half where it begins. There the old scores must be
                # weighed before the new ones overwrite them.
                for act in (score, weigh) if half != next_half else (weigh, score):
                    act()
                if beside is not None:
                    beside(step)

        loop(groups // unrolled, run_line)

    def _finish(self, refs: Refs) -> None:
        """Normalise the results of all strips into ``apart``, and clear the softmax."""
        scratch, shape, strides = refs.scratch, self.shape, self.strides
        lane = jax.lax.broadcasted_iota(jnp.int32, (shape.strip_rows, LANES), 1)

        def finish(strip_group: Index) -> None:
            group_rows = shape.rows_of_strip_group(strip_group)
            values, top = scratch.values[group_rows], scratch.top[group_rows]
            total = jnp.broadcast_to(jnp.sum(scratch.total[group_rows], axis=1, keepdims=True), top.shape)
            kv_head = shape.kv_head_of(strip_group)
            for i, strip in enumerate(shape.strips_of(strip_group)):
                rows, head = slice(i * shape.strip_rows, (i + 1) * shape.strip_rows), shape.q_head_of(strip)
                factor, lse = self._factor_and_lse(refs, head, top[rows], total[rows])
                if refs.inputs.v_scale is not None:
                    factor = factor * refs.inputs.v_scale[kv_head]
                for column in range(strides.out_columns):
                    x = values[rows, column * LANES : (column + 1) * LANES]
                    scratch.apart[self._strip_apart(strip, column)] = x * factor
                if scratch.lse is not None:
                    # The log-sum-exp of every head has a lane of its own: see `Rows`.
                    register = 0 if strides.lse_registers == 1 else div(head, LANES)
                    positions = pl.ds(shape.first_position_of(strip), shape.strip_rows)
                    others = scratch.lse[register, positions]
                    scratch.lse[register, positions] = jnp.where(lane == rem(head, LANES), lse, others)
            # Only after this strip group was read. Here, where sums over lanes are waited for, the stores of zeros take
            # little more than half of the time that they take by themselves (modelled).
            self._clear(refs, strip_group)

        unrolled_loop(shape.strip_groups, self.most_unrolled, finish)

    def _factor_and_lse(self, refs: Refs, head: Index, top: Any, total: Any) -> tuple[Any, Any]:
        """By what a head's sums of weighted values are multiplied, and its log-sum-exps (None if nobody wants them).

        Both are the same in every lane. Without a visible key the sums are 0, and so is what they are multiplied by.
        """
        # Not in units of log 2 any more: the log-sum-exp of a row that sees no key is exactly its sink.
        top, share = top / LOG2E, 1.0
        if refs.inputs.sinks is not None:
            # One more logit in the denominator. The sums are moved to the larger one of it and of the maximum.
            sink = jnp.full(top.shape, refs.inputs.sinks[head])
            _, top, share = update_maximum(top, sink)
            total = total * share + jnp.exp(sink - top)
        lse = None if refs.scratch.lse is None else jnp.log(total) + top
        return share / jnp.where(total == 0, 1.0, total), lse

    def _store_results(self, refs: Refs) -> None:
        """Put the results into their buffer, as the caller has them: all heads of a position next to each other."""
        scratch, strides = refs.scratch, self.strides
        out, lse = scratch.results

        def store(turn: Index) -> None:
            x = strides.together(scratch.apart[strides.positions_of(turn, _POSITIONS)])
            out[pl.ds(turn * _POSITIONS, _POSITIONS)] = x[..., self.value_lanes].astype(out.dtype)

        loop(self.shape.positions // _POSITIONS, store)
        if lse is not None:
            for register in range(strides.lse_registers):
                for first in range(0, self.shape.positions, self.shape.strip_rows):
                    positions = pl.ds(first, self.shape.strip_rows)
                    lse[positions, register] = scratch.lse[register, positions]

    def _strip_apart(self, strip: Index, column: int) -> Any:
        """Where a column of a strip's rows lies in ``apart``."""
        head, first = self.shape.q_head_of(strip), self.shape.first_position_of(strip)
        return self.strides.head_of(head, column, first, self.shape.strip_rows)


def _choose(condition: Index, yes: Block, no: Block) -> Block:
    return Block(*(jnp.where(condition, x, y) for x, y in zip(yes, no, strict=True)))
