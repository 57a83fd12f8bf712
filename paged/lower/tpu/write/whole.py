"""The kernel of granules of which every token is written: what was there before is not read."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from ..references import Copies, Ref
from .granules import GranuleLists, Granules
from .pipeline import pipeline
from .plan import Writer, granules_at


class Scalars(NamedTuple):
    """What the kernel reads from scalar memory: the granules, and where each core's blocks of them begin and end."""

    lists: GranuleLists
    bounds: Ref

    @classmethod
    def of(cls, writer: Writer, granules: Granules, cores: int) -> "Scalars":
        """The granules, with their blocks cut so that every core has as many."""
        blocks = (granules.count + writer.granules_per_block - 1) // writer.granules_per_block
        bounds: Int[Array, " cores_plus_1"] = (blocks * jnp.arange(cores + 1) // cores).astype(jnp.int32)
        return cls(granules.lists, bounds)


class Scratch(NamedTuple):
    """A ring of blocks of new rows for each array, and two semaphores for each stage of the ring."""

    new: tuple[Ref, ...]
    arrived: Ref
    left: Ref


@dataclasses.dataclass(frozen=True)
class Whole:
    """The kernel: it reads blocks of new rows, and writes each granule of a block to its page.

    Core ``c`` writes the blocks of granules from ``bounds[c]`` to ``bounds[c + 1]``.
    """

    writer: Writer
    scalars: Scalars
    new: tuple[Ref, ...]
    pools: tuple[Ref, ...]
    ring: Scratch

    @staticmethod
    def scratch(writer: Writer) -> Scratch:
        """A ring of blocks of new rows."""
        dma, stages = pltpu.SemaphoreType.DMA, 2 * writer.blocks_ahead
        return Scratch(writer.vmem(stages, writer.granules_per_block), dma((stages,)), dma((stages,)))

    def run(self) -> None:
        """Write this core's blocks: a block is read while those before it are written."""
        core = pl.program_id(0)
        pipeline(
            self.scalars.bounds[core],
            self.scalars.bounds[core + 1],
            ahead=self.writer.blocks_ahead,
            read=lambda block: self._reads(block).start(),
            send=self._send,
            await_sent=self._await_writes,
        )

    def _send(self, block: Any) -> None:
        # Without the wait, what the stage held before would be written to the pages.
        self._reads(block).wait()
        self._start_writes(block)

    def _stage(self, block: Any) -> Any:
        return jax.lax.rem(block, 2 * self.writer.blocks_ahead)

    def _reads(self, block: Any) -> Copies:
        """A block's new rows, into its stage of the ring."""

        def each(act):
            stage, size = self._stage(block), self.writer.granules_per_block
            for new, buffer in zip(self.new, self.ring.new, strict=True):
                source = new.at[pl.ds(block * size, size)]
                act(pltpu.make_async_copy(source, buffer.at[stage], self.ring.arrived.at[stage]))

        return Copies(each)

    def _start_writes(self, block: Any) -> None:
        """Start a copy for every granule of a block that has a page."""
        stage, size = self._stage(block), self.writer.granules_per_block
        for i in range(size):
            page, offset = self.scalars.lists.page[block * size + i], self.scalars.lists.offset[block * size + i]

            @pl.when(page >= 0)
            def _(i=i, page=page, offset=offset):
                for buffer, target in zip(
                    self.ring.new, granules_at(self.writer, self.pools, page, offset), strict=True
                ):
                    pltpu.make_async_copy(buffer.at[stage, i], target, self.ring.left.at[stage]).start()

    def _await_writes(self, block: Any) -> None:
        """Wait until every granule of a block that has a page is written."""
        stage, size = self._stage(block), self.writer.granules_per_block
        count = sum((self.scalars.lists.page[block * size + i] >= 0).astype(jnp.int32) for i in range(size))

        def wait(granules: int) -> None:
            # A semaphore counts bytes, and a wait takes as many from it as its copy would move. So one wait for as many
            # bytes does for all copies of a block, wherever they went.
            for buffer in self.ring.new:
                moved = buffer.at[stage, pl.ds(0, granules)]
                pltpu.make_async_copy(moved, moved, self.ring.left.at[stage]).wait()

        pl.when(count == size)(lambda: wait(size))

        @pl.when(count != size)
        def _():
            jax.lax.fori_loop(0, count, lambda i, _: wait(1), None)
