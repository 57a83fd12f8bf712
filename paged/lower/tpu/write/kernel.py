"""The two writing kernels: one for granules of which every token is written, and one for all other granules.

Both are pipelines over a ring of buffers in vector memory. While some stages of the ring are being filled, others are
on their way to the pages::

    whole      read new rows                                                  write granules
    partial    read new rows and old granules    put rows into granules       write granules
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from ..references import Copies, Ref
from .granules import GranuleLists, Granules, granule_at, token_axis
from .plan import Writer


class Scalars(NamedTuple):
    """What the kernels read from scalar memory: the granules, and where each core's begin and end."""

    lists: GranuleLists
    bounds: Ref


class Inputs(NamedTuple):
    """``new`` are the rows of every granule, ``[granules, *granule]`` for each array; ``pools`` are the arrays."""

    new: tuple[Ref, ...]
    pools: tuple[Ref, ...]


class Outputs(NamedTuple):
    """The arrays of the pages, which are written in place."""

    pools: tuple[Ref, ...]


class Scratch(NamedTuple):
    """A ring of buffers for each array, and two semaphores for each stage of the ring.

    ``new`` holds new rows. ``old`` holds the pages' granules while they are changed; the kernel of whole granules has
    none.
    """

    new: tuple[Ref, ...]
    old: tuple[Ref, ...]
    arrived: Ref
    left: Ref


@dataclasses.dataclass(frozen=True)
class Kernel(abc.ABC):
    """What both kernels have in common.

    Core ``c`` writes the granules, or blocks of granules, from ``bounds[c]`` to ``bounds[c + 1]``.
    """

    writer: Writer
    lists: GranuleLists
    bounds: Ref
    new: tuple[Ref, ...]
    pools: tuple[Ref, ...]
    ring: Scratch

    @staticmethod
    @abc.abstractmethod
    def bounds_of(writer: Writer, granules: Granules, cores: int) -> Array:
        """Where to cut the work between cores."""

    @staticmethod
    @abc.abstractmethod
    def scratch(writer: Writer) -> Scratch:
        """The ring of buffers, and its semaphores."""

    @abc.abstractmethod
    def run(self) -> None:
        """Write this core's granules."""

    def in_pages(self, page: Any, offset: Any) -> list[Ref]:
        """The granule at an offset in a page, in each array of the pages."""
        return [
            granule_at(self.writer.layout, pool, ref, page, offset)
            for pool, ref in zip(self.writer.pools, self.pools, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Whole(Kernel):
    """The kernel of whole granules: it reads blocks of new rows, and writes each granule of a block to its page."""

    @staticmethod
    def bounds_of(writer: Writer, granules: Granules, cores: int) -> Int[Array, " cores_plus_1"]:
        """Where to cut the list of blocks, so that every core has as many."""
        return _evenly((granules.count + writer.granules_per_block - 1) // writer.granules_per_block, cores)

    @staticmethod
    def scratch(writer: Writer) -> Scratch:
        """A ring of blocks of new rows."""
        dma, stages = pltpu.SemaphoreType.DMA, 2 * writer.blocks_ahead
        return Scratch(writer.vmem(stages, writer.granules_per_block), (), dma((stages,)), dma((stages,)))

    def run(self) -> None:
        """Write this core's blocks: a block is read while those before it are written."""
        core = pl.program_id(0)
        _pipeline(
            self.bounds[core],
            self.bounds[core + 1],
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
            page, offset = self.lists.page[block * size + i], self.lists.offset[block * size + i]

            @pl.when(page >= 0)
            def _(i=i, page=page, offset=offset):
                for buffer, target in zip(self.ring.new, self.in_pages(page, offset), strict=True):
                    pltpu.make_async_copy(buffer.at[stage, i], target, self.ring.left.at[stage]).start()

    def _await_writes(self, block: Any) -> None:
        """Wait until every granule of a block that has a page is written."""
        stage, size = self._stage(block), self.writer.granules_per_block
        count = sum((self.lists.page[block * size + i] >= 0).astype(jnp.int32) for i in range(size))

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


@dataclasses.dataclass(frozen=True)
class Partial(Kernel):
    """The kernel of partial granules: it reads each granule, changes it, and writes it back."""

    @staticmethod
    def bounds_of(writer: Writer, granules: Granules, cores: int) -> Int[Array, " cores_plus_2"]:
        """Where to cut the list of granules, and then the number of turns.

        If there are several turns one core takes all granules, since cores cannot wait for each other.
        """
        del writer
        turns = jnp.max(granules.lists.turn, keepdims=True) + 1
        alone = jnp.full((cores + 1,), granules.count).at[0].set(0)
        return jnp.concatenate([jnp.where(turns > 1, alone, _evenly(granules.count, cores)), turns])

    @staticmethod
    def scratch(writer: Writer) -> Scratch:
        """A ring of new rows, and one of granules."""
        dma, stages = pltpu.SemaphoreType.DMA, 2 * writer.granules_ahead
        return Scratch(writer.vmem(stages), writer.vmem(stages), dma((stages,)), dma((stages,)))

    def run(self) -> None:
        """Change this core's granules: those of the first turn, and when all these are in place those of the next."""
        core, ahead = pl.program_id(0), self.writer.granules_ahead
        first, end, turns = self.bounds[core], self.bounds[core + 1], self.bounds[self.bounds.shape[0] - 1]

        def take_turn(turn, _):
            # At its end every write of this turn has been awaited, so the next turn reads what this one has written.
            _pipeline(
                first,
                end,
                ahead=ahead,
                read=self._in_turn(turn, lambda granule, stage: self._reads(granule, stage).start()),
                send=self._in_turn(turn, self._change),
                await_sent=self._in_turn(turn, lambda granule, stage: self._writes(granule, stage).wait()),
            )

        jax.lax.fori_loop(0, turns, take_turn, None)

    def _in_turn(self, turn: Any, act: Callable[[Any, Any], None]) -> Callable[[Any], None]:
        """A function that calls ``act(granule, stage)`` if it is the granule's turn."""

        def act_in_turn(granule):
            is_turn = self.lists.turn[granule] == turn
            pl.when(is_turn)(lambda: act(granule, jax.lax.rem(granule, 2 * self.writer.granules_ahead)))

        return act_in_turn

    def _change(self, granule: Any, stage: Any) -> None:
        # In this order: a granule that has not arrived would be changed in vain, and what is sent before the change is
        # the old granule.
        self._reads(granule, stage).wait()
        self._put(granule, stage)
        self._writes(granule, stage).start()

    def _reads(self, granule: Any, stage: Any) -> Copies:
        """A granule's new rows and the granule itself, into their stage of the rings."""

        def each(act):
            sources = (*(new.at[granule] for new in self.new), *self._in_pages(granule))
            for source, buffer in zip(sources, (*self.ring.new, *self.ring.old), strict=True):
                act(pltpu.make_async_copy(source, buffer.at[stage], self.ring.arrived.at[stage]))

        return Copies(each)

    def _writes(self, granule: Any, stage: Any) -> Copies:
        """A granule, back to its page."""

        def each(act):
            for buffer, target in zip(self.ring.old, self._in_pages(granule), strict=True):
                act(pltpu.make_async_copy(buffer.at[stage], target, self.ring.left.at[stage]))

        return Copies(each)

    def _in_pages(self, granule: Any) -> list[Ref]:
        return self.in_pages(self.lists.page[granule], self.lists.offset[granule])

    def _put(self, granule: Any, stage: Any) -> None:
        """Put the new rows into a granule that has arrived."""
        begin, end = self.lists.begin[granule], self.lists.end[granule]
        for pool, new, old in zip(self.writer.pools, self.ring.new, self.ring.old, strict=True):
            rows, x = (ref[stage].astype(jnp.float32) for ref in (new, old))
            token = jax.lax.broadcasted_iota(jnp.int32, x.shape, token_axis(self.writer.layout, pool))
            old[stage] = jnp.where((token >= begin) & (token < end), rows, x).astype(old.dtype)


def _evenly(count: Int[Array, ""], cores: int) -> Int[Array, " cores_plus_1"]:
    return (count * jnp.arange(cores + 1) // cores).astype(jnp.int32)


def _pipeline(
    first: Any,
    end: Any,
    *,
    ahead: int,
    read: Callable[[Any], None],
    send: Callable[[Any], None],
    await_sent: Callable[[Any], None],
) -> None:
    """A pipeline over a ring of ``2 * ahead`` stages, for the items from ``first`` to ``end``.

    Item ``i`` is read ``ahead`` items before it is sent. Its send is awaited before its stage is read into again, or at
    the end.
    """

    def step(i, _):
        # Item i + ahead is read into the stage of item i - ahead, so that one must have left: else it would be
        # overwritten on its way.
        pl.when(i - ahead >= first)(lambda: await_sent(i - ahead))
        pl.when(i + ahead < end)(lambda: read(i + ahead))
        send(i)

    jax.lax.fori_loop(first, jnp.minimum(first + ahead, end), lambda i, _: read(i), None)
    jax.lax.fori_loop(first, end, step, None)
    # The sends of the last items that no step has awaited: a kernel must not end while a copy still counts.
    jax.lax.fori_loop(jnp.maximum(first, end - ahead), end, lambda i, _: await_sent(i), None)
