"""The prefill kernel: one tile of query rows after the other, with queries and results on their way beside the work.

Three kinds of copies run beside the work on a tile::

    tile 0          tile 1          tile 2
    queries 1 in    queries 2 in    queries 3 in      one tile ahead, into two halves of a buffer that take turns
    pages in        pages in        pages in          the stream of pages, several blocks ahead: see `Stream`
                    results 0 out   results 1 out     from one buffer: gone before the next tile's results are stored
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..references import Copies
from .loops import Index
from .refs import Refs
from .tile import TileKernel


@dataclasses.dataclass(frozen=True)
class PrefillKernel:
    """The whole kernel.

    ``tiles`` are kernels for tiles of different sizes, fewest positions first. An item is run by the first of them that
    has at least as many positions as the item has query rows.
    """

    tiles: tuple[TileKernel, ...]

    def run_items(self, refs: Refs, first: Index, end: Index) -> None:
        """Run all items of one core, ``first`` to ``end``, one after the other."""
        pl.when(first < end)(self._queries(refs, first, first).start)
        refs.stream.begin(first, end)
        # Scratch memory holds anything before the first tile. Every later tile finds the softmax cleared by the tile
        # before it.
        self.tiles[-1].clear(refs)
        jax.lax.fori_loop(first, end, lambda item, stage: self._run_item(refs, item, first, end, stage), jnp.int32(0))
        # The kernel's memory is given away when it ends, so the last copy must have read it.
        self._results(refs, end - 1, first).wait()

    def _run_item(self, refs: Refs, item: Index, first: Index, end: Index, stage: Index) -> Index:
        """Attend over one item's pages, whose first block arrives in ``stage`` of the stream's ring.

        Returns the stage of the next item's first block.
        """
        rows, half = refs.stream.work.rows[item], jax.lax.rem(item, 2)
        # The next queries go to the other half of the buffer. That half is free: the tile before has moved its queries
        # out of it before it did anything else.
        pl.when(item + 1 < end)(self._queries(refs, item + 1, first).start)
        self._queries(refs, item, first).wait()
        results_before = self._results(refs, item - 1, first)

        def skip(stage: Index) -> Index:
            # An item without rows has no results, but it waits for those of the item before. The item after it waits
            # for this item's copies only, and a semaphore that still counted others would end that wait too early.
            results_before.wait()
            return stage

        # A tile waits for the results before it by itself, as late as it can.
        runs = [functools.partial(tile.run, refs, item, end, half, results_before.wait) for tile in self.tiles]
        which = (rows > 0).astype(jnp.int32)
        which += sum((rows > tile.shape.positions).astype(jnp.int32) for tile in self.tiles[:-1])
        stage = jax.lax.switch(which, [skip, *runs], stage)
        self._results(refs, item, first).start()
        return stage

    def _queries(self, refs: Refs, item: Index, first: Index) -> Copies:
        """The copies of an item's queries into a half of their buffer."""

        def each(act: Callable[[Any], None]) -> None:
            half = jax.lax.rem(item, 2)
            buffer, arrived = refs.scratch.q_buffer.at[half], refs.scratch.q_arrived.at[half]
            own, own_buffer = refs.inputs.own, refs.scratch.own_buffer

            def copy(in_hbm: Any, in_buffer: Any) -> None:
                act(pltpu.make_async_copy(refs.inputs.q.at[in_hbm], buffer.at[in_buffer], arrived))
                if own is not None:
                    act(pltpu.make_async_copy(own.rows.at[in_hbm], own_buffer.at[half].at[in_buffer], arrived))

            self._each_piece(refs, item, first, copy)

        return Copies(each)

    def _results(self, refs: Refs, item: Index, first: Index) -> Copies:
        """The copies of an item's results out of their buffer."""

        def each(act: Callable[[Any], None]) -> None:
            scratch = refs.scratch
            pairs = list(zip(jax.tree.leaves(scratch.results), jax.tree.leaves(refs.outputs.results), strict=True))

            def copy(in_hbm: Any, in_buffer: Any) -> None:
                for buffer, results in pairs:
                    act(pltpu.make_async_copy(buffer.at[in_buffer], results.at[in_hbm], scratch.results_left))

            self._each_piece(refs, item, first, copy)

        return Copies(each)

    def _each_piece(self, refs: Refs, item: Index, first: Index, copy: Callable[[Any, Any], None]) -> None:
        """Call ``copy`` for pieces of an item's rows: with where a piece lies in HBM, and where in the item's buffer.

        How many query rows an item has is known only when the kernel runs, but a copy has a static size. So rows are
        copied in pieces of a power of two, one for each bit of their number. Items before ``first`` belong to another
        core, and have no pieces here.
        """
        index = jnp.maximum(item, 0)
        rows, row = jnp.where(item >= first, refs.stream.work.rows[index], 0), refs.stream.work.row[index]
        for power in (1 << bit for bit in range(self.tiles[-1].shape.positions.bit_length())):

            @pl.when((rows & power) != 0)
            def _(power=power):
                done = rows & (power - 1)
                copy(pl.ds(row + done, power), pl.ds(done, power))
