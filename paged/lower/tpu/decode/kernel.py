"""The decode kernel: online softmax over the visible pages of each sequence, streamed from HBM without a pause.

The pages of all items come as one `Stream` of blocks, which runs ahead of the work, from one sequence into the next.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...program import Running, Terms
from ..chips import LANES
from ..pages import Stream, Views, Work, dot
from ..references import Copies, Ref

# Tiles whose scores are held at once: their products overlap, and more would not fit the registers.
_TILES_AT_ONCE = 8
# Items of one block each that are worked on at once, at most: alone, a stage of one waits for the stage before.
ITEMS_AT_ONCE = 2
# Items whose queries and results are in memory at once: a short item is done before a copy of either has arrived.
ROWS_IN_FLIGHT = 2 * ITEMS_AT_ONCE
_QUERIES_AHEAD = ROWS_IN_FLIGHT - ITEMS_AT_ONCE
# Scores of items together: as many registers, of 1024, as leave room for the rest.
_SCORES_TOGETHER = 32 * 1024


class Inputs(NamedTuple):
    """What the kernel reads. ``new`` are the rows to write first, ``pools`` the arrays of the pages."""

    k_scale: Ref | None  # f32[tiles, tile_rows, 1]
    v_scale: Ref | None  # f32[tiles, tile_rows, 1]
    arrays: tuple[Ref, ...]  # what the terms need: [tiles, tile_rows, 1], or one number for each tile
    q: Ref  # [tokens, kv_heads, group, key_lanes]
    new: tuple[Ref, ...]  # f32[tokens, *row] for each pool; none if nothing is written
    pools: tuple[Ref, ...]


class Outputs(NamedTuple):
    """What the kernel writes. ``pools`` are those of the inputs, in place; none if nothing is written."""

    out: Ref  # f32[splits, tokens, kv_heads, group, result_lanes]
    lse: Ref  # f32[splits, tokens, heads * group, LANES]: lane t is tile t's
    pools: tuple[Ref, ...]


class Scratch(NamedTuple):
    """What the kernel works in."""

    pages: tuple[Ref, ...]  # [buffers, pages_per_block, *page] for each pool: the stream's ring
    pages_arrived: Ref  # a semaphore for each stage of that ring
    q: Ref  # [ROWS_IN_FLIGHT, rows, kv_heads, group, key_lanes]
    q_arrived: Ref
    out: Ref  # f32[ROWS_IN_FLIGHT, rows, kv_heads, group, result_lanes]
    lse: Ref  # f32[ROWS_IN_FLIGHT, rows, heads * group, LANES]
    out_left: Ref
    cursor: Ref  # i32[2]
    is_clean: Ref  # i32[buffers]
    next_stage: Ref  # i32[1]: between the steps of a grid, the stage of the next item's first block
    staging: Any  # memory for new rows, see `Staging`; None if nothing is written


class Refs(NamedTuple):
    """All memory of the kernel, by what it is for, and the stream of pages."""

    work: Work
    inputs: Inputs
    outputs: Outputs
    scratch: Scratch
    stream: Stream


class Block(NamedTuple):
    """Block ``i`` of an item, arrived in ``slot``; its queries and the softmax so far, of every tile. None for a first
    block, which has no softmax yet."""

    item: Any
    i: Any
    slot: Any
    q: list
    running: tuple[Running, ...] | None


class Seen(NamedTuple):
    """What a block's scores are computed with: positions where they are needed, what is visible (None: all), and the
    scales a token of keys and values."""

    p: Any
    j: Any
    visible: Any
    scales: list | None


@dataclasses.dataclass(frozen=True)
class Decode:
    """The kernel's static facts. ``splits`` items make one sequence; ``items_at_once`` of one block each, 1 to
    `ITEMS_AT_ONCE`, are worked on at once.

    ``bodies`` are the views of a block's first pages, smallest first and at last the whole block, with the terms at
    their shape: a last block of few pages need not cost what a whole one does.
    """

    bodies: tuple[tuple[Views, Terms], ...]
    splits: int
    items_at_once: int

    @property
    def views(self) -> Views:
        """The views of a whole block."""
        return self.bodies[-1][0]

    def run_items(self, refs: Refs, first: Any, end: Any) -> None:
        """All items of one core, one after the other, or some short ones at once."""
        self.begin(refs, first, end)

        def step(carry):
            item, slot = carry
            are_short = self._are_short(refs, item, end)
            slot = jax.lax.cond(
                are_short,
                lambda: self._run_together(refs, item, first, end, slot),
                lambda: self.run_item(refs, item, first, end, slot),
            )
            return item + jnp.where(are_short, self.items_at_once, 1), slot

        # While some are worked on, as many more must be on their way.
        if self._body_together is None or refs.stream.buffers < 2 * self.items_at_once:
            run = functools.partial(self.run_item, refs, first=first, end=end)
            jax.lax.fori_loop(first, end, lambda item, slot: run(item, slot=slot), jnp.int32(0))
        else:
            jax.lax.while_loop(lambda carry: carry[0] < end, step, (jnp.int32(first), jnp.int32(0)))
        self.drain(refs, first, end)

    def begin(self, refs: Refs, first: Any, end: Any) -> None:
        """Set the stream going."""
        for ahead in range(_QUERIES_AHEAD):
            pl.when(first + ahead < end)(self._query_copies(refs, first + ahead).start)
        refs.stream.begin(first, end)

    def run_item(self, refs: Refs, item: Any, first: Any, end: Any, slot: Any) -> Any:
        """Attend over one item's pages, whose first block is in ``slot``; the slot of the next item's first block."""
        q = self._queries(refs, item, end)
        start = (slot, self._start())
        slot, running = self._over_blocks(refs, item, end, q, start)
        self._result_copies(refs, item - ROWS_IN_FLIGHT, first).wait()
        self._finish(refs, item, running)
        self._result_copies(refs, item, first).start()
        return slot

    @property
    def _body_together(self) -> tuple[Views, Terms] | None:
        """The longest body at which items can be worked on together; None where not even the shortest is."""
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
            count = refs.work.count[jnp.minimum(item + behind, last)]
            are_short &= (count > 0) & (count <= views.pages_per_block)
        return are_short

    def _run_together(self, refs: Refs, item: Any, first: Any, end: Any, slot: Any) -> Any:
        """`run_item` for the next ``items_at_once``, of one block each: every stage for all of them before the next."""
        stream, items, blocks = refs.stream, [item + behind for behind in range(self.items_at_once)], []
        queries = [self._queries(refs, one, end) for one in items]
        stream.fetch_next(end, stream.before(slot))
        for one, q in zip(items, queries, strict=True):
            stream.wait(one, 0, slot)
            stream.silence(one, 0, slot)
            blocks.append(Block(one, 0, slot, q, None))
            slot = stream.after(slot)
        for one in items:
            self._result_copies(refs, one - ROWS_IN_FLIGHT, first).wait()
        for one, running in zip(items, self._attend(refs, blocks, True, body=self._body_together), strict=True):
            self._finish(refs, one, running)
        for one in items:
            self._result_copies(refs, one, first).start()
        # Into the slots just read; the last of them is the next turn's.
        for block in blocks[:-1]:
            stream.fetch_next(end, block.slot)
        return slot

    def _queries(self, refs: Refs, item: Any, end: Any) -> list:
        """An item's queries, of every tile; those of a later one are sent for."""
        later, place = item + _QUERIES_AHEAD, jax.lax.rem(item, ROWS_IN_FLIGHT)
        pl.when(later < end)(self._query_copies(refs, later).start)
        self._query_copies(refs, item).wait()
        return [self.views.queries(refs.scratch.q.at[place], tile) for tile in range(self.views.tiles)]

    def drain(self, refs: Refs, first: Any, end: Any) -> None:
        """Wait for the last results to leave."""
        for behind in range(ROWS_IN_FLIGHT):
            self._result_copies(refs, end - 1 - behind, first).wait()

    def _over_blocks(self, refs: Refs, item: Any, end: Any, q: list, start: Any) -> Any:
        """Fold the item's blocks: first, without a branch, those visible in full while whole blocks follow."""
        block = self.views.pages_per_block
        stream, count = refs.stream, refs.work.count[item]
        ahead = stream.buffers - 1
        whole = jax.lax.div(refs.work.num_full[item], block)
        total = jax.lax.div(count + block - 1, block)
        straight = jnp.maximum(jnp.minimum(whole, jax.lax.div(count, block) - ahead), 0)

        def step_straight(i, carry):
            slot, running = carry
            stream.wait_whole(slot)
            fetch = stream.fetch_in_parts(item, i + ahead, stream.before(slot), self.views.tiles)
            return stream.after(slot), self._attend(refs, [Block(item, i, slot, q, running)], False, fetch)[0]

        def step(i, carry, is_masked):
            slot, running = carry
            stream.fetch_next(end, stream.before(slot))
            stream.wait(item, i, slot)
            if not is_masked:
                return stream.after(slot), self._attend(refs, [Block(item, i, slot, q, running)], False)[0]
            stream.silence(item, i, slot)
            pages = stream.pages_of(item, i)

            def attend(running, body):
                return self._attend(refs, [Block(item, i, slot, q, running)], True, body=body)[0]

            bodies = [functools.partial(attend, body=body) for body in self.bodies]
            enough = sum((pages > views.pages_per_block).astype(jnp.int32) for views, _ in self.bodies[:-1])
            return stream.after(slot), jax.lax.switch(enough, bodies, running)

        carry = jax.lax.fori_loop(0, straight, step_straight, start)

        @pl.when(straight > 0)
        def _():
            stream.move_cursor(item, straight + ahead - 1)

        carry = jax.lax.fori_loop(straight, whole, lambda i, carry: step(i, carry, False), carry)
        return jax.lax.fori_loop(whole, total, lambda i, carry: step(i, carry, True), carry)

    def _attend(
        self,
        refs: Refs,
        blocks: list[Block],
        is_masked: bool,
        between: Callable[[int], None] = lambda tile: None,
        body: tuple[Views, Terms] | None = None,
    ) -> list[tuple[Running, ...]]:
        """One step of the online softmax for all tiles of some blocks; ``between(tile)`` is called after the
        product of each."""
        body = body or self.bodies[-1]
        views, buffers = body[0], refs.stream.transfers.buffers
        seen = [self._seen(refs, block, is_masked, body) for block in blocks]
        new: list[list[Running]] = [[] for _ in blocks]
        for chunk in range(0, views.tiles, _TILES_AT_ONCE):
            tiles = range(chunk, min(chunk + _TILES_AT_ONCE, views.tiles))
            pairs = [(at, tile) for at in range(len(blocks)) for tile in tiles]
            products = []
            for at, tile in pairs:
                products.append(dot(blocks[at].q[tile], views.keys(buffers, blocks[at].slot, tile), contract=1))
                between(tile)
            weighed = [
                self._weigh(refs, blocks[at], tile, product, seen[at], body[1])
                for (at, tile), product in zip(pairs, products, strict=True)
            ]
            for (at, tile), (taken, weights) in zip(pairs, weighed, strict=True):
                v = views.values(buffers, blocks[at].slot, tile)
                new[at].append(taken.add(weights, v, self._product(seen[at].scales, tile)))
        return [tuple(one) for one in new]

    def _seen(self, refs: Refs, block: Block, is_masked: bool, body: tuple[Views, Terms]) -> Seen:
        """Positions, visibility and scales of a block, which its tiles share."""
        (views, terms), item = body, block.item
        base = refs.work.begin[item] + block.i * self.views.pages_per_block
        pages = refs.work.count[item] - block.i * self.views.pages_per_block
        p: Any = None
        j: Any = None
        if is_masked or terms.scores_use_positions:
            p = refs.work.position[item] + views.row()
            j = views.positions(lambda at: jnp.where(at < pages, refs.work.index[base + at], views.nowhere))
        visible = views.is_own_key()
        if is_masked:
            seen = terms.visible(tuple(ref[0] for ref in refs.inputs.arrays), p, j, refs.work.length[item])
            visible = seen if visible is None else seen & visible
        if not self._scales_tokens:
            return Seen(p, j, visible, None)
        scales = [views.scales(buffer, block.slot) for buffer in refs.stream.transfers.buffers[-2:]]
        if is_masked:
            scales[1] = jnp.where(j[:1] < refs.work.length[item], scales[1], 0.0)
        return Seen(p, j, visible, scales)

    def _weigh(self, refs: Refs, block: Block, tile: int, product: Any, seen: Seen, terms: Terms) -> Any:
        """The softmax's first half for a tile, from its products."""
        s = self._scaled(refs, tile, product * terms.factor, seen.scales)
        s = terms.scores(tuple(ref[tile] for ref in refs.inputs.arrays), s, seen.p, seen.j)
        s = s if seen.visible is None else jnp.where(seen.visible, s, -jnp.inf)
        return Running.first(s, self.views.result_lanes) if block.running is None else block.running[tile].weigh(s)

    def _scaled(self, refs: Refs, tile: int, s: Any, scales: Any) -> Any:
        """Products of queries and keys, from those of stored keys."""
        if refs.inputs.k_scale is not None:
            s = s * refs.inputs.k_scale[tile]
        if scales is not None:
            s = s * scales[0][tile : tile + 1]
        return s

    def _product(self, scales: list | None, tile: int) -> Callable[..., Any]:
        def product(weights, v):
            weights = weights if scales is None else weights * scales[1][tile : tile + 1]
            return self.views.own(dot(self.views.align(weights).astype(v.dtype), v, contract=0))

        return product

    def _start(self) -> tuple[Running, ...]:
        views = self.views
        return tuple(Running.start(views.tile_rows, dim=views.result_lanes) for _ in range(views.tiles))

    def _finish(self, refs: Refs, item: Any, running: tuple[Running, ...]) -> None:
        """Normalise. The log-sum-exp of tile ``t`` is lane ``t``."""
        views, place = self.views, jax.lax.rem(item, ROWS_IN_FLIGHT)
        lane = jax.lax.broadcasted_iota(jnp.int32, (views.tile_rows, LANES), 1)
        lses = jnp.zeros((views.tile_rows, LANES), jnp.float32)
        for tile in range(views.tiles):
            out, lse = running[tile].finish()
            if refs.inputs.v_scale is not None:
                out = out * refs.inputs.v_scale[tile]
            views.store(refs.scratch.out.at[place], tile, out)
            lses = jnp.where(lane == tile, lse, lses)
        refs.scratch.lse[place] = lses.reshape(refs.scratch.lse.shape[1:])

    def _query_copies(self, refs: Refs, item: Any) -> Copies:
        """An item's query rows into memory."""

        def each(act):
            place, last = jax.lax.rem(item, ROWS_IN_FLIGHT), refs.inputs.q.shape[0] - 1
            for row in range(self.views.rows):
                source = refs.inputs.q.at[jnp.minimum(refs.work.row[item] + row, last)]
                act(pltpu.make_async_copy(source, refs.scratch.q.at[place, row], refs.scratch.q_arrived.at[place]))

        return Copies(each)

    def _result_copies(self, refs: Refs, item: Any, first: Any) -> Copies:
        """An item's results to its own rows. A row that its sequence does not have is not written, and nothing is for
        an item before the core's first."""

        def each(act):
            one = jnp.maximum(item, 0)
            rows = jnp.where(item >= first, refs.work.rows[one], 0)
            split, place = jax.lax.rem(one, self.splits), jax.lax.rem(one, ROWS_IN_FLIGHT)
            for row in range(self.views.rows):

                @pl.when(row < rows)
                def _(row=row):
                    for buffer, ref in ((refs.scratch.out, refs.outputs.out), (refs.scratch.lse, refs.outputs.lse)):
                        target = ref.at[split, refs.work.row[one] + row]
                        act(pltpu.make_async_copy(buffer.at[place, row], target, refs.scratch.out_left.at[place]))

        return Copies(each)

    @property
    def _scales_tokens(self) -> bool:
        return self.views.layout.scales == "token"
