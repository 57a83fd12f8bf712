"""The kernel of granules of which every token is written: what was there before is not read.

New rows lie as the caller has them, the heads of a token next to each other, and in most orders a granule has the
tokens of a head next to each other. So rows are turned on their way, several granules at a time, a *block*::

    read 8 rows for each granule    turn tokens and heads    write granules

Nothing is listed before the kernel starts. The scalar core finds granules from lengths and block tables, one block
after the other, while others are on their way.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..chips import LANES
from ..references import Copies, Ref
from .granules import GRANULE
from .pipeline import pipeline
from .plan import Writer, granules_at
from .slots import Places, Slots, inner


class Noted(NamedTuple):
    """The granules of the blocks that are on their way, in a ring in scalar memory.

    * ``page``, ``offset``: where the granule is; the page is -1 where nothing is written.
    * ``row``: the new row that belongs to the granule's first token.
    """

    page: Ref
    offset: Ref
    row: Ref


class Scratch(NamedTuple):
    """A ring of new rows as they lie, a ring of granules, and a semaphore for each stage of either.

    ``apart`` has rows between the two, for each granule of a block and each part of it: see `Whole._turn`. ``cursor``
    is the next granule: the sequence, and how many of the sequence's granules are before it.
    """

    new: tuple[Ref, ...]
    granules: tuple[Ref, ...]
    apart: tuple[Ref, ...]
    noted: Noted
    cursor: Ref
    arrived: Ref
    left: Ref


@dataclasses.dataclass(frozen=True)
class Whole:
    """The kernel, for the sequences of ``scalars``."""

    writer: Writer
    places: Places
    scalars: Slots
    new: tuple[Ref, ...]
    pools: tuple[Ref, ...]
    scratch: Scratch

    @staticmethod
    def scratch_of(writer: Writer) -> Scratch:
        """Memory for blocks on their way."""
        dma, ahead, size = pltpu.SemaphoreType.DMA, writer.blocks_ahead, writer.granules_per_block
        noted: Any = [pltpu.SMEM(((2 * ahead + 1) * size,), jnp.int32)] * len(Noted._fields)
        new, granules, apart = writer.whole_vmem(ahead, size)
        return Scratch(
            new, granules, apart, Noted(*noted), pltpu.SMEM((2,), jnp.int32), dma((ahead + 1,)), dma((ahead,))
        )

    def run(self, core: Any, cores: int) -> None:
        """Write this core's blocks: as many as the others have."""
        size = self.writer.granules_per_block
        blocks = jax.lax.div(self._count() + size - 1, size)
        first, end = (jax.lax.div(blocks * at, cores) for at in (core, core + 1))
        # The granules before the core's first one are skipped with the sequences that they belong to.
        self.scratch.cursor[0], self.scratch.cursor[1] = 0, first * size
        pipeline(
            first,
            end,
            ahead=self.writer.blocks_ahead,
            read=self._read,
            send=self._send,
            await_sent=self._await_writes,
        )

    def _count(self) -> Any:
        """The granules of all sequences."""
        return jax.lax.fori_loop(0, self.places.slots, lambda seq, n: n + self._granules_of(seq)[1], jnp.int32(0))

    def _granules_of(self, seq: Any) -> tuple[Any, Any]:
        return inner(self.scalars.first[seq], self.scalars.end[seq])

    def _read(self, block: Any) -> None:
        for i in range(self.writer.granules_per_block):
            self._note(block, i)
        self._reads(block).start()

    def _note(self, block: Any, i: int) -> None:
        """Note the granule at the cursor as granule ``i`` of a block, and move the cursor on."""
        cursor, last = self.scratch.cursor, self.places.slots - 1

        def is_past(at: Any) -> Any:
            return (at[0] <= last) & (at[1] >= self._granules_of(jnp.minimum(at[0], last))[1])

        seq, before = jax.lax.while_loop(
            is_past, lambda at: (at[0] + 1, at[1] - self._granules_of(at[0])[1]), (cursor[0], cursor[1])
        )
        cursor[0], cursor[1] = seq, before + 1
        exists, seq = seq <= last, jnp.minimum(seq, last)
        first = self.scalars.first[seq]
        position = self._granules_of(seq)[0] + GRANULE * before
        page, offset = self.places.find(self.scalars, seq, position, self.places.base(first))
        page = jnp.where(exists & self.places.has(page), page, -1)
        at = self._noted(block, i)
        for ref, x in zip(self.scratch.noted, (page, offset, self.scalars.row[seq] + position - first), strict=True):
            ref[at] = x

    def _noted(self, block: Any, i: int) -> Any:
        """Where a block's granule is noted. Blocks that are read, turned and written are noted at once."""
        return jax.lax.rem(block, 2 * self.writer.blocks_ahead + 1) * self.writer.granules_per_block + i

    def _arrival(self, block: Any) -> Any:
        return jax.lax.rem(block, self.writer.blocks_ahead + 1)

    def _departure(self, block: Any) -> Any:
        return jax.lax.rem(block, self.writer.blocks_ahead)

    def _reads(self, block: Any) -> Copies:
        """The new rows of a block's granules that have a page, into their stage of the ring."""
        scratch, stage = self.scratch, self._arrival(block)

        def each(act: Any) -> None:
            for i in range(self.writer.granules_per_block):
                at = self._noted(block, i)

                @pl.when(scratch.noted.page[at] >= 0)
                def _(i=i, at=at):
                    for new, buffer in zip(self.new, scratch.new, strict=True):
                        rows = new.at[pl.ds(scratch.noted.row[at], GRANULE)]
                        act(pltpu.make_async_copy(rows, buffer.at[stage, i], scratch.arrived.at[stage]))

        return Copies(each)

    def _send(self, block: Any) -> None:
        # In this order: rows that have not arrived would be turned in vain, and what is written before rows are turned
        # is what the stage held before.
        self._reads(block).wait()
        for i in range(self.writer.granules_per_block):
            self._turn(block, i)
        self._start_writes(block)

    def _turn(self, block: Any, i: int) -> None:
        """Put the new rows of a block's granule in the granule's order.

        Rows whose heads follow one another are laid apart first, and those of each head are read with a stride. Only
        rows of 32-bit numbers can be read so.
        """
        arrival, departure = self._arrival(block), self._departure(block)
        for number, part in enumerate(self.writer.parts):
            granule = self.scratch.granules[part.pool].at[departure, i, *part.index]
            if part.is_token_first:
                granule[...] = self.scratch.new[number][arrival, i]
                continue
            apart, stride = self.scratch.apart[number].at[i], part.stride
            heads, lanes = part.row_shape
            for token in range(GRANULE):
                row = self._row(number, arrival, i, token)
                for column, first in enumerate(range(0, lanes, LANES)):
                    of_column = row[:, first : first + LANES]
                    apart[column, pl.ds(token * stride, heads), pl.ds(0, of_column.shape[1])] = of_column
            for head in range(heads):
                for column, first in enumerate(range(0, lanes, LANES)):
                    width = min(LANES, lanes - first)
                    x = apart[column, pl.ds(head, GRANULE, stride=stride)][:, :width]
                    granule[head, :, pl.ds(first, width)] = x.astype(part.dtype)

    def _row(self, number: int, stage: Any, i: int, token: int) -> Any:
        """A token's heads of a part, in float32."""
        rows = [new[stage, i, token].astype(jnp.float32) for new in self.scratch.new]
        return self.writer.stacked(rows)[number]

    def _start_writes(self, block: Any) -> None:
        """Start a copy for every granule of a block that has a page."""
        stage, noted = self._departure(block), self.scratch.noted
        for i in range(self.writer.granules_per_block):
            at = self._noted(block, i)

            @pl.when(noted.page[at] >= 0)
            def _(i=i, at=at):
                targets = granules_at(self.writer, self.pools, noted.page[at], noted.offset[at])
                for buffer, target in zip(self.scratch.granules, targets, strict=True):
                    pltpu.make_async_copy(buffer.at[stage, i], target, self.scratch.left.at[stage]).start()

    def _await_writes(self, block: Any) -> None:
        """Wait until every granule of a block that has a page is written."""
        stage, size = self._departure(block), self.writer.granules_per_block
        count = sum((self.scratch.noted.page[self._noted(block, i)] >= 0).astype(jnp.int32) for i in range(size))

        def wait(granules: int) -> None:
            # A semaphore counts bytes, and a wait takes as many from it as its copy would move. So one wait for as many
            # bytes does for all copies of a block, wherever they went.
            for buffer in self.scratch.granules:
                moved = buffer.at[stage, pl.ds(0, granules)]
                pltpu.make_async_copy(moved, moved, self.scratch.left.at[stage]).wait()

        pl.when(count == size)(lambda: wait(size))

        @pl.when(count != size)
        def _():
            jax.lax.fori_loop(0, count, lambda i, _: wait(1), None)
