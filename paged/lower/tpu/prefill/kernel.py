"""The prefill kernel: tiles of many query rows, one after the other, and their queries and results on their way."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .refs import Refs, Strides
from .tile import Tile

Ref = Any


@dataclasses.dataclass(frozen=True)
class Prefill:
    """The kernel: tiles of many rows and, with ``tiles`` of fewer positions, smallest first, those of few."""

    tiles: tuple[Tile, ...]

    @property
    def strides(self) -> Strides:
        """Those of all tiles."""
        return self.tiles[-1].strides

    def run_items(self, refs: Refs, first: Any, end: Any) -> None:
        """All items of one core, one after the other."""
        pl.when(first < end)(functools.partial(self._copy_queries, refs, first, first, "start"))
        refs.stream.begin(first, end)
        self.tiles[-1].clear(refs)
        jax.lax.fori_loop(first, end, lambda item, slot: self._run_item(refs, item, first, end, slot), jnp.int32(0))
        self._copy_results(refs, end - 1, first, "wait")

    def _run_item(self, refs: Refs, item: Any, first: Any, end: Any, slot: Any) -> Any:
        """Attend over one item's pages, whose first block is in ``slot``; the slot of the next item's first block."""
        rows, place = refs.stream.work.rows[item], jax.lax.rem(item, 2)
        pl.when(item + 1 < end)(functools.partial(self._copy_queries, refs, item + 1, first, "start"))
        self._copy_queries(refs, item, first, "wait")
        wait = functools.partial(self._copy_results, refs, item - 1, first, "wait")
        branches = [lambda slot: (wait(), slot)[1]]
        branches += [functools.partial(tile.run, refs, item, end, place, before_results=wait) for tile in self.tiles]
        which = (rows > 0).astype(jnp.int32)
        which += sum((rows > tile.shape.positions).astype(jnp.int32) for tile in self.tiles[:-1])
        slot = jax.lax.switch(which, branches, slot)
        self._copy_results(refs, item, first, "start")
        return slot

    def _copy_queries(self, refs: Refs, item: Any, first: Any, verb: str) -> None:
        place = jax.lax.rem(item, 2)
        self._copy(refs.q, refs.q_buffer.at[place], refs.q_arrived.at[place], refs, item, first, self.strides.q, verb)

    def _copy_results(self, refs: Refs, item: Any, first: Any, verb: str) -> None:
        self._copy(refs.out, refs.out_buffer, refs.out_left, refs, item, first, self.strides.out, verb, is_out=True)

    def _copy(
        self, far: Ref, near: Ref, done: Ref, refs: Refs, item: Any, first: Any, stride: int, verb: str, is_out=False
    ) -> None:
        """An item's rows between ``far``, which has those of all items, and ``near``, in powers of two; nothing for an
        item before the core's first."""
        one = jnp.maximum(item, 0)
        rows, row = jnp.where(item >= first, refs.stream.work.rows[one], 0), refs.stream.work.row[one]
        for power in (1 << bit for bit in range(self.tiles[-1].shape.positions.bit_length())):

            @pl.when((rows & power) != 0)
            def _(power=power):
                at = rows & (power - 1)
                there = far.at[pl.ds(pl.multiple_of((row + at) * stride, 8), power * stride)]
                here = near.at[pl.ds(pl.multiple_of(at * stride, 8), power * stride)]
                copy = pltpu.make_async_copy(*((here, there) if is_out else (there, here)), done)
                getattr(copy, verb)()
