"""The decode kernel: online softmax over the visible pages of each sequence, streamed from HBM without a pause.

A core works on its items one after the other, and on the blocks of pages of each item in order. For a block, every tile
takes one step of the online softmax (see `Views` for tiles). Three kinds of copies run beside the work:

    pages       by the `Stream`, several blocks ahead, from one item into the next
    queries     of the next items, into a ring of `ROWS_IN_FLIGHT` stages
    results     of the last items, out of a ring of as many stages

Items of one block are so short that one step must wait for the step before it. Two of them are worked on together, so
that the steps of one fill the waits of the other.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...program import Running, Terms
from ..chips import LANES
from ..pages import Views, dot
from ..references import Copies
from .apart import Apart
from .refs import Refs
from .sight import Block, Seen, Sight

# Tiles whose scores are held at once: their products overlap, and the scores of more would not fit the registers.
_TILES_AT_ONCE = 8
# The most items of one block each that are worked on together.
ITEMS_AT_ONCE = 2
# Items whose queries or results are in memory at once. A short item is done before a copy of either has arrived.
ROWS_IN_FLIGHT = 2 * ITEMS_AT_ONCE
_QUERIES_AHEAD = ROWS_IN_FLIGHT - ITEMS_AT_ONCE
# Scores of items that are worked on together: 32 registers of 1024 scores, which leave room for the rest.
_SCORES_TOGETHER = 32 * 1024


@dataclasses.dataclass(frozen=True)
class Decode:
    """The kernel's static facts.

    * ``bodies``: views of a block's first pages with the terms at their shape, fewest pages first, at last those of the
      whole block. A block of few pages then costs less than a whole one.
    * ``splits``: the items of each sequence.
    * ``has_even_rows``: every slot has rows, and they are those that follow the slot before. Then every row is written,
      also those of slots that are not live.
    * ``items_at_once``: items of one block that are worked on together, from 1 to `ITEMS_AT_ONCE`.
    * ``sight``: what the scores of a block need beside products.
    * ``apart``: how rows are laid out for tiles; None where queries lie by KV head, as tiles meet them.
    """

    bodies: tuple[tuple[Views, Terms], ...]
    splits: int
    has_even_rows: bool
    items_at_once: int
    sight: Sight
    apart: Apart | None

    @property
    def views(self) -> Views:
        """The views of a whole block."""
        return self.bodies[-1][0]

    def run_items(self, refs: Refs, first: Any, end: Any) -> None:
        """Attend over the items ``first`` to ``end`` of a core, short ones together."""
        self.begin(refs, first, end)

        def step(carry):
            item, stage = carry
            are_short = self._are_short(refs, item, end)
            stage = jax.lax.cond(
                are_short,
                lambda: self._run_together(refs, item, first, end, stage),
                lambda: self.run_item(refs, item, first, end, stage),
            )
            return item + jnp.where(are_short, self.items_at_once, 1), stage

        # Items together need twice as many stages: while their blocks are worked on, as many more must be on their way.
        # Else the wait for pages would be longer than what working together saves.
        if self._body_together is None or refs.stream.stages < 2 * self.items_at_once:
            run = functools.partial(self.run_item, refs, first=first, end=end)
            jax.lax.fori_loop(first, end, lambda item, stage: run(item, stage=stage), jnp.int32(0))
        else:
            jax.lax.while_loop(lambda carry: carry[0] < end, step, (jnp.int32(first), jnp.int32(0)))
        self.drain(refs, first, end)

    def begin(self, refs: Refs, first: Any, end: Any) -> None:
        """Start the copies of the first items' queries and of the first blocks of pages."""
        for ahead in range(_QUERIES_AHEAD):
            pl.when(first + ahead < end)(self._query_copies(refs, first + ahead).start)
        refs.stream.begin(first, end)

    def run_item(self, refs: Refs, item: Any, first: Any, end: Any, stage: Any) -> Any:
        """Attend over one item, whose first block is in ``stage``. Returns the stage of the next item's first block."""
        q = self._queries(refs, item, end)
        start = (stage, self._start())
        stage, running = self._over_blocks(refs, item, end, q, start)
        # Here and not earlier: the results leave while this item is worked on. Here and not later: `_finish` writes to
        # the stage of the ring that they leave from.
        self._result_copies(refs, item - ROWS_IN_FLIGHT, first).wait()
        self._finish(refs, item, running)
        self._result_copies(refs, item, first).start()
        return stage

    @property
    def _body_together(self) -> tuple[Views, Terms] | None:
        """The longest body at which items can be worked on together; None if even the shortest is too long."""
        if self.items_at_once == 1:
            return None
        fits = [
            (views, terms)
            for views, terms in self.bodies
            if self.items_at_once * views.tiles * views.tile_rows * views.columns <= _SCORES_TOGETHER
        ]
        return fits[-1] if fits else None

    def _are_short(self, refs: Refs, item: Any, end: Any) -> Any:
        """Whether the next items can be worked on together."""
        (views, _), last = self._body_together or self.bodies[0], refs.work.count.shape[0] - 1
        are_short = item + self.items_at_once <= end
        for behind in range(self.items_at_once):
            # At the end of the list the last item is looked up again; the result is False in any case.
            count = refs.work.count[jnp.minimum(item + behind, last)]
            are_short &= (count > 0) & (count <= views.pages_per_block)
        return are_short

    def _run_together(self, refs: Refs, item: Any, first: Any, end: Any, stage: Any) -> Any:
        """`run_item` for the next ``items_at_once`` items, of one block each: every step for all of them in turn."""
        stream, items, blocks = refs.stream, [item + behind for behind in range(self.items_at_once)], []
        queries = [self._queries(refs, each, end) for each in items]
        stream.fetch_next(end, stream.before(stage))
        for each, q in zip(items, queries, strict=True):
            stream.wait(each, 0, stage)
            # After the wait, or the pages would arrive on top of the zeros; before a product reads the values.
            stream.zero_dead_values(each, 0, stage)
            stream.hide_holes(each, 0, stage)
            blocks.append(Block(each, 0, stage, q, None))
            stage = stream.after(stage)
        for each in items:
            self._result_copies(refs, each - ROWS_IN_FLIGHT, first).wait()
        for each, running in zip(items, self._attend(refs, blocks, True, body=self._body_together), strict=True):
            self._finish(refs, each, running)
        for each in items:
            self._result_copies(refs, each, first).start()
        # One block was fetched above for all of these items: fetch the others. Only now are the stages of these items
        # free. The stage of the last one stays free, for the block that the next turn fetches first.
        for block in blocks[:-1]:
            stream.fetch_next(end, block.stage)
        return stage

    def _queries(self, refs: Refs, item: Any, end: Any) -> list:
        """An item's queries for every tile. The copy of a later item's queries is started."""
        later, row_stage = item + _QUERIES_AHEAD, jax.lax.rem(item, ROWS_IN_FLIGHT)
        # Before the wait, so that it is on its way meanwhile. The stage is free: its last item is done.
        pl.when(later < end)(self._query_copies(refs, later).start)
        self._query_copies(refs, item).wait()
        apart, q, tiles = self.apart, refs.scratch.q.at[row_stage], range(self.views.tiles)
        if apart is None:
            return [self.views.queries(q, tile) for tile in tiles]
        apart.put(refs.scratch.apart, row_stage, q)
        return [apart.queries(refs.scratch.apart, row_stage, tile) for tile in tiles]

    def drain(self, refs: Refs, first: Any, end: Any) -> None:
        """Wait for the last results to leave: a kernel must not end while a copy is on its way."""
        for behind in range(ROWS_IN_FLIGHT):
            self._result_copies(refs, end - 1 - behind, first).wait()

    def _over_blocks(self, refs: Refs, item: Any, end: Any, q: list, start: Any) -> Any:
        """Fold the item's blocks into the softmax, in three loops.

        * ``step_straight``: blocks that are visible in full, while the block to fetch is a whole block of this item. It
          has no branches, so copies start between products.
        * ``step`` without a mask: the other blocks that are visible in full.
        * ``step`` with a mask: all other blocks.
        """
        block = self.views.pages_per_block
        stream, count = refs.stream, refs.work.count[item]
        ahead = stream.stages - 1
        whole = jax.lax.div(refs.work.num_full[item], block)
        total = jax.lax.div(count + block - 1, block)
        straight = jnp.maximum(jnp.minimum(whole, jax.lax.div(count, block) - ahead), 0)

        def step_straight(i, carry):
            stage, running = carry
            stream.wait_whole(stage)
            fetch = stream.fetch_whole_piecewise(item, i + ahead, stream.before(stage), self.views.tiles)
            return stream.after(stage), self._attend(refs, [Block(item, i, stage, q, running)], False, fetch)[0]

        def step(i, carry, is_masked):
            stage, running = carry
            # Before the wait: the stage before is free since the last step, and HBM must not pause.
            stream.fetch_next(end, stream.before(stage))
            if not is_masked:
                stream.wait_whole(stage)
                return stream.after(stage), self._attend(refs, [Block(item, i, stage, q, running)], False)[0]
            stream.wait(item, i, stage)
            # After the wait, or the pages would arrive on top of the zeros; before a product reads the values.
            stream.zero_dead_values(item, i, stage)
            stream.hide_holes(item, i, stage)
            pages = stream.pages_of(item, i)

            def attend(running, body):
                return self._attend(refs, [Block(item, i, stage, q, running)], True, body=body)[0]

            bodies = [functools.partial(attend, body=body) for body in self.bodies]
            enough = sum((pages > views.pages_per_block).astype(jnp.int32) for views, _ in self.bodies[:-1])
            return stream.after(stage), jax.lax.switch(enough, bodies, running)

        at, carry = stream.until_hole(jnp.int32(0), straight, step_straight, start)

        # The straight steps fetched blocks without the cursor. `fetch_next` must go on where they ended, or it would
        # fetch blocks of this item again.
        @pl.when(at > 0)
        def _():
            stream.move_cursor(item, at + ahead - 1)

        at, carry = stream.until_hole(at, whole, lambda i, carry: step(i, carry, False), carry)
        return jax.lax.fori_loop(at, total, lambda i, carry: step(i, carry, True), carry)

    def _attend(
        self,
        refs: Refs,
        blocks: list[Block],
        is_masked: bool,
        between: Callable[[int], None] = lambda tile: None,
        body: tuple[Views, Terms] | None = None,
    ) -> list[tuple[Running, ...]]:
        """One step of the online softmax for all tiles of some blocks, each of another item.

        ``between(tile)`` is called after each tile's product. ``body`` is that of a whole block if none is given.
        """
        body = body or self.bodies[-1]
        views, buffers = body[0], refs.stream.transfers.buffers
        seen = [self.sight.of_block(refs, block, is_masked, body) for block in blocks]
        new: list[list[Running]] = [[] for _ in blocks]
        # All products, then all weights, then all values: the compiler keeps this order, and within each line nothing
        # waits for anything else.
        for chunk in range(0, views.tiles, _TILES_AT_ONCE):
            tiles = range(chunk, min(chunk + _TILES_AT_ONCE, views.tiles))
            pairs = [(b, tile) for b in range(len(blocks)) for tile in tiles]
            products = []
            for b, tile in pairs:
                products.append(dot(blocks[b].q[tile], views.keys(buffers, blocks[b].stage, tile), contract=1))
                between(tile)
            weighed = [
                self._weigh(refs, blocks[b], tile, product, seen[b], body[1])
                for (b, tile), product in zip(pairs, products, strict=True)
            ]
            for (b, tile), (running, weights) in zip(pairs, weighed, strict=True):
                v = views.values(buffers, blocks[b].stage, tile)
                new[b].append(running.add(weights, v, self._product(seen[b].scales, tile)))
        return [tuple(of_block) for of_block in new]

    def _weigh(self, refs: Refs, block: Block, tile: int, product: Any, seen: Seen, terms: Terms) -> Any:
        """The first half of a step of the softmax for one tile, from its products: a `Running`, and the weights."""
        s = self._scaled(refs, tile, product * terms.factor, seen.scales)
        s = terms.scores(tuple(ref[tile] for ref in refs.inputs.arrays), seen.given, s, seen.p, seen.j)
        visible = seen.visible_in(tile)
        s = s if visible is None else jnp.where(visible, s, -jnp.inf)
        return Running.first(s, self.views.result_lanes) if block.running is None else block.running[tile].weigh(s)

    def _scaled(self, refs: Refs, tile: int, s: Any, scales: Any) -> Any:
        """Products of queries and keys, from products of queries and stored keys."""
        if refs.inputs.k_scale is not None:
            s = s * refs.inputs.k_scale[tile]
        if scales is not None:
            s = s * scales[0][tile : tile + 1]
        return s

    def _product(self, scales: list | None, tile: int) -> Callable[..., Any]:
        """A function of weights and stored values: the weighted values of each row's own head."""

        def product(weights, v):
            weights = weights if scales is None else weights * scales[1][tile : tile + 1]
            return self.views.own_head(dot(self.views.align(weights).astype(v.dtype), v, contract=0))

        return product

    def _start(self) -> tuple[Running, ...]:
        views = self.views
        return tuple(Running.start(views.tile_rows, dim=views.result_lanes) for _ in range(views.tiles))

    def _finish(self, refs: Refs, item: Any, running: tuple[Running, ...]) -> None:
        """Store an item's normalised results. The log-sum-exps of tile ``t`` are lane ``t``."""
        views, row_stage = self.views, jax.lax.rem(item, ROWS_IN_FLIGHT)
        lane = jax.lax.broadcasted_iota(jnp.int32, (views.tile_rows, LANES), 1)
        lses = jnp.zeros((views.tile_rows, LANES), jnp.float32)
        for tile in range(views.tiles):
            out, lse = self._with_sinks(refs, item, tile, running[tile]).finish()
            if refs.inputs.v_scale is not None:
                out = out * refs.inputs.v_scale[tile]
            if self.apart is None:
                views.store(refs.scratch.out.at[row_stage], tile, out)
            else:
                self.apart.store(refs.scratch.apart, row_stage, tile, out)
            lses = jnp.where(lane == tile, lse, lses)
        if self.apart is not None:
            self.apart.take(refs.scratch.apart, row_stage, refs.scratch.out.at[row_stage])
        if refs.scratch.lse is not None:
            refs.scratch.lse[row_stage] = lses.reshape(refs.scratch.lse.shape[1:])

    def _with_sinks(self, refs: Refs, item: Any, tile: int, running: Running) -> Running:
        """The softmax of a tile with one more logit per row, which has no value. Rows of no sequence have none."""
        if refs.inputs.sinks is None:
            return running
        return running.weigh(jnp.where(refs.work.rows[item] > 0, refs.inputs.sinks[tile], -jnp.inf))[0]

    def _query_copies(self, refs: Refs, item: Any) -> Copies:
        """An item's query rows, from HBM."""

        def each(act):
            row_stage, last = jax.lax.rem(item, ROWS_IN_FLIGHT), refs.inputs.q.shape[0] - 1
            for row in range(self.views.query_rows):
                # Every item copies as many rows, so that a wait counts as many bytes. A row past the last is copied
                # from the last, and its result is not stored.
                source = refs.inputs.q.at[jnp.minimum(refs.work.row[item] + row, last)]
                target = refs.scratch.q.at[row_stage, row]
                act(pltpu.make_async_copy(source, target, refs.scratch.q_arrived.at[row_stage]))

        return Copies(each)

    def _result_copies(self, refs: Refs, item: Any, first: Any) -> Copies:
        """An item's results, to its own rows in HBM.

        A row that the item does not have is not copied, nor is an item before the core's first.
        """

        def each(act):
            looked_up = jnp.maximum(item, 0)
            rows = self.views.query_rows if self.has_even_rows else refs.work.rows[looked_up]
            rows = jnp.where(item >= first, rows, 0)
            split, row_stage = jax.lax.rem(looked_up, self.splits), jax.lax.rem(looked_up, ROWS_IN_FLIGHT)
            for row in range(self.views.query_rows):

                @pl.when(row < rows)
                def _(row=row):
                    scratch, outputs = refs.scratch, refs.outputs
                    for buffer, results in ((scratch.out, outputs.out), (scratch.lse, outputs.lse)):
                        if buffer is None or results is None:
                            continue
                        target = results.at[split, refs.work.row[looked_up] + row]
                        act(pltpu.make_async_copy(buffer.at[row_stage, row], target, scratch.out_left.at[row_stage]))

        return Copies(each)
