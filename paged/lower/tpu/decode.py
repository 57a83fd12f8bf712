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

from ..softmax import Running
from .stream import Stream
from .terms import Terms
from .views import Views, dot
from .work import Work

Ref = Any
# Tiles whose scores are held at once: their products overlap, and more would not fit the registers.
_TILES_AT_ONCE = 8
# Items whose queries and results are in memory at once: a short item is done before a copy of either has arrived.
ROWS_IN_FLIGHT = 4


class Refs(NamedTuple):
    """What the kernel reads, writes and works in."""

    work: Work
    k_scale: Ref | None
    v_scale: Ref | None
    arrays: tuple[Ref, ...]
    q: Ref
    stream: Stream
    out: Ref
    lse: Ref
    q_buffer: Ref
    q_arrived: Ref
    out_buffer: Ref
    lse_buffer: Ref
    out_left: Ref


@dataclasses.dataclass(frozen=True)
class Decode:
    """The kernel's static facts. ``splits`` items make one sequence.

    ``bodies`` are the views of a block's first pages, smallest first and at last the whole block, with the terms at
    their shape: a last block of few pages need not cost what a whole one does.
    """

    bodies: tuple[tuple[Views, Terms], ...]
    scale: float
    splits: int

    @property
    def views(self) -> Views:
        """The views of a whole block."""
        return self.bodies[-1][0]

    def run_items(self, refs: Refs, first: Any, end: Any) -> None:
        """All items of one core, one after the other."""
        self.begin(refs, first, end)
        jax.lax.fori_loop(first, end, lambda item, slot: self.run_item(refs, item, first, end, slot), jnp.int32(0))
        self.drain(refs, first, end)

    def begin(self, refs: Refs, first: Any, end: Any) -> None:
        """Set the stream going."""
        for ahead in range(ROWS_IN_FLIGHT - 1):
            pl.when(first + ahead < end)(functools.partial(self._copy_queries, refs, first + ahead, "start"))
        refs.stream.begin(first, end)

    def run_item(self, refs: Refs, item: Any, first: Any, end: Any, slot: Any) -> Any:
        """Attend over one item's pages, whose first block is in ``slot``; the slot of the next item's first block."""
        later = item + ROWS_IN_FLIGHT - 1
        pl.when(later < end)(functools.partial(self._copy_queries, refs, later, "start"))
        self._copy_queries(refs, item, "wait")
        place = jax.lax.rem(item, ROWS_IN_FLIGHT)
        q = [self.views.queries(refs.q_buffer.at[place], tile) for tile in range(self.views.tiles)]
        start = (slot, self._start())
        slot, running = self._over_blocks(refs, item, end, q, start)
        self._copy_results(refs, item - ROWS_IN_FLIGHT, first, "wait")
        self._finish(refs, place, running)
        self._copy_results(refs, item, first, "start")
        return slot

    def drain(self, refs: Refs, first: Any, end: Any) -> None:
        """Wait for the last results to leave."""
        for behind in range(ROWS_IN_FLIGHT):
            self._copy_results(refs, end - 1 - behind, first, "wait")

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
            return stream.after(slot), self._attend_block(refs, item, i, slot, q, running, False, fetch)

        def step(i, carry, is_masked):
            slot, running = carry
            stream.fetch_next(end, stream.before(slot))
            stream.wait(item, i, slot)
            if not is_masked:
                return stream.after(slot), self._attend_block(refs, item, i, slot, q, running, False)
            stream.silence(item, i, slot)
            pages = stream.pages_of(item, i)
            bodies = [
                functools.partial(self._attend_block, refs, item, i, slot, q, is_masked=True, body=body)
                for body in self.bodies
            ]
            enough = sum((pages > views.pages_per_block).astype(jnp.int32) for views, _ in self.bodies[:-1])
            return stream.after(slot), jax.lax.switch(enough, bodies, running)

        carry = jax.lax.fori_loop(0, straight, step_straight, start)

        @pl.when(straight > 0)
        def _():
            stream.move_cursor(item, straight + ahead - 1)

        carry = jax.lax.fori_loop(straight, whole, lambda i, carry: step(i, carry, False), carry)
        return jax.lax.fori_loop(whole, total, lambda i, carry: step(i, carry, True), carry)

    def _attend_block(
        self,
        refs: Refs,
        item: Any,
        i: Any,
        slot: Any,
        q: list,
        running: tuple[Running, ...],
        is_masked: bool,
        between: Callable[[int], None] = lambda tile: None,
        body: tuple[Views, Terms] | None = None,
    ) -> tuple[Running, ...]:
        """One step of the online softmax for every tile of a block; ``between(tile)`` is called after its product."""
        views, terms = body or self.bodies[-1]
        buffers, base = refs.stream.transfers.buffers, refs.work.begin[item] + i * self.views.pages_per_block
        pages = refs.work.count[item] - i * self.views.pages_per_block
        p: Any = None
        j: Any = None
        if is_masked or terms.scores_use_positions:
            p = refs.work.position[item] + views.row()
            j = views.positions(lambda at: jnp.where(at < pages, refs.work.index[base + at], views.nowhere))
        visible = views.is_own_key()
        if is_masked:
            seen = terms.mask(tuple(ref[0] for ref in refs.arrays), p, j) & (j < refs.work.length[item])
            visible = seen if visible is None else seen & visible
        scales = [views.scales(buffer, slot) for buffer in buffers[-2:]] if self._scales_tokens else None
        new = []
        for chunk in range(0, views.tiles, _TILES_AT_ONCE):
            tiles = range(chunk, min(chunk + _TILES_AT_ONCE, views.tiles))
            products = []
            for tile in tiles:
                products.append(dot(q[tile], views.keys(buffers, slot, tile), contract=1))
                between(tile)
            for tile, product in zip(tiles, products, strict=True):
                s = self._scaled(refs, tile, product, scales)
                s = terms.scores(tuple(ref[tile] for ref in refs.arrays), s, p, j)
                s = s if visible is None else jnp.where(visible, s, -jnp.inf)
                v = views.values(buffers, slot, tile)
                v_scale = None if scales is None else scales[1][tile : tile + 1]
                if v_scale is not None and is_masked:
                    v_scale = jnp.where(j[:1] < refs.work.length[item], v_scale, 0.0)
                taken, weights = running[tile].weigh(s)
                new.append(taken.add(weights, v, self._product(v_scale)))
        return tuple(new)

    def _scaled(self, refs: Refs, tile: int, product: Any, scales: Any) -> Any:
        """Scaled products of queries and keys, from products of stored keys."""
        s = product * self.scale
        if refs.k_scale is not None:
            s = s * refs.k_scale[tile]
        if scales is not None:
            s = s * scales[0][tile : tile + 1]
        return s

    def _product(self, v_scale: Any) -> Callable[..., Any]:
        def product(weights, v):
            weights = weights if v_scale is None else weights * v_scale
            return dot(self.views.align(weights).astype(v.dtype), v, contract=0)

        return product

    def _start(self) -> tuple[Running, ...]:
        views = self.views
        return tuple(Running.start(views.tile_rows, dim=views.result_lanes) for _ in range(views.tiles))

    def _finish(self, refs: Refs, place: Any, running: tuple[Running, ...]) -> None:
        """Normalise. The log-sum-exp of tile ``t`` is lane ``t``."""
        views = self.views
        lane = jax.lax.broadcasted_iota(jnp.int32, (views.tile_rows, 128), 1)
        lses = jnp.zeros((views.tile_rows, 128), jnp.float32)
        for tile in range(views.tiles):
            out, lse = running[tile].finish()
            if refs.v_scale is not None:
                out = out * refs.v_scale[tile]
            views.store(refs.out_buffer.at[place], tile, out)
            lses = jnp.where(lane == tile, lse, lses)
        refs.lse_buffer[place] = lses.reshape(refs.lse_buffer.shape[1:])

    def _copy_queries(self, refs: Refs, item: Any, verb: str) -> None:
        place, last = jax.lax.rem(item, ROWS_IN_FLIGHT), refs.q.shape[0] - 1
        for row in range(self.views.rows):
            source = refs.q.at[jnp.minimum(refs.work.row[item] + row, last)]
            copy = pltpu.make_async_copy(source, refs.q_buffer.at[place, row], refs.q_arrived.at[place])
            getattr(copy, verb)()

    def _copy_results(self, refs: Refs, item: Any, first: Any, verb: str) -> None:
        """Results go to the item's own rows; a row that the sequence does not have is nobody's, and so are those of
        items before the core's first."""
        one = jnp.maximum(item, 0)
        rows = jnp.where(item >= first, refs.work.rows[one], 0)
        part, place = jax.lax.rem(one, self.splits), jax.lax.rem(one, ROWS_IN_FLIGHT)
        for row in range(self.views.rows):

            @pl.when(row < rows)
            def _(row=row):
                for buffer, ref in ((refs.out_buffer, refs.out), (refs.lse_buffer, refs.lse)):
                    target = ref.at[part, refs.work.row[one] + row]
                    copy = pltpu.make_async_copy(buffer.at[place, row], target, refs.out_left.at[place])
                    getattr(copy, verb)()

    @property
    def _scales_tokens(self) -> bool:
        return self.views.layout.scales == "token"
