"""The kernel of granules of which some tokens are written: it reads each, changes it, and writes it back.

Nothing is listed before it starts. The scalar core finds every sequence's granules from lengths and block tables, notes
them in scalar memory, and then works on them in a pipeline::

    read new rows and old granules    put rows into granules    write granules
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..chips import LANES, SUBLANES
from ..references import Copies, Ref
from .granules import GRANULE
from .pipeline import pipeline
from .plan import Part, Writer, granules_at
from .slots import Places, Slots, edges


class Noted(NamedTuple):
    """The granules that are written, in scalar memory.

    * ``page``, ``offset``: where the granule is.
    * ``begin``, ``end``: the tokens of the granule that are written, from 0 to 8; ``end`` is not among them.
    * ``row``: the new row that belongs to the granule's first token.
    """

    page: Ref
    offset: Ref
    begin: Ref
    end: Ref
    row: Ref


class Scratch(NamedTuple):
    """Rings of new rows and of granules, two semaphores for each stage, and the granules that were noted.

    ``row`` holds one token's rows of a `Part` in float32. The row of a single head can be read from it.
    """

    new: tuple[Ref, ...]
    row: tuple[Ref, ...]
    old: tuple[Ref, ...]
    noted: Noted
    arrived: Ref
    left: Ref


@dataclasses.dataclass(frozen=True)
class Partial:
    """The kernel, for the sequences of ``scalars``."""

    writer: Writer
    places: Places
    scalars: Slots
    new: tuple[Ref, ...]
    pools: tuple[Ref, ...]
    scratch: Scratch

    @staticmethod
    def scratch_of(writer: Writer, slots: int) -> Scratch:
        """Memory for the granules of so many sequences."""
        dma, stages = pltpu.SemaphoreType.DMA, 2 * writer.granules_ahead
        noted: Any = [pltpu.SMEM((2 * slots + 1,), jnp.int32)] * len(Noted._fields)
        new = [pltpu.VMEM((stages, GRANULE, *shape), writer.layout.dtype) for shape in writer.new_shapes]
        row = [pltpu.VMEM(part.row_shape, jnp.float32) for part in writer.parts]
        old = writer.vmem(stages)
        return Scratch(tuple(new), tuple(row), old, Noted(*noted), dma((stages,)), dma((stages,)))

    def run(self, core: Any, cores: int) -> None:
        """Change the granules of a core: as many as the others have, or all where two sequences write to one."""
        count, is_shared = self._note()

        @pl.when(jnp.logical_not(is_shared))
        def _():
            pipeline(
                jax.lax.div(count * core, cores),
                jax.lax.div(count * (core + 1), cores),
                ahead=self.writer.granules_ahead,
                read=lambda granule: self._reads(granule).start(),
                send=self._change,
                await_sent=lambda granule: self._writes(granule).wait(),
            )

        # One granule after the other, on one core, since cores cannot wait for each other: a granule that is read
        # before the one that wrote to it has left would bring back what was there before.
        @pl.when(is_shared & (core == 0))
        def _():
            jax.lax.fori_loop(0, count, lambda granule, _: self._change_alone(granule), None)

    def _note(self) -> tuple[Any, Any]:
        """Note every granule. Returns how many there are, and whether two of them are the same piece of memory."""
        keys = -(-(2 * self.places.slots) // (SUBLANES * LANES)) * SUBLANES, LANES
        place = LANES * jax.lax.broadcasted_iota(jnp.int32, keys, 0) + jax.lax.broadcasted_iota(jnp.int32, keys, 1)
        per_page = self.writer.layout.page_size // GRANULE

        def note(seq: Any, carry: Any) -> Any:
            first, end = self.scalars.first[seq], self.scalars.end[seq]
            base = self.places.base(first)
            for exists, position, start, stop in edges(first, end):
                count, before, is_shared = carry
                page, offset = self.places.find(self.scalars, seq, position, base)
                row = self.scalars.row[seq] + position - first
                for ref, x in zip(self.scratch.noted, (page, offset, start, stop, row), strict=True):
                    ref[count] = x  # the next granule overwrites it, if this one is not counted
                exists = exists & self.places.has(page)
                # All granules before it at once. One that is not written has a key that equals none.
                key = jnp.where(exists, page * per_page + jax.lax.div(offset, GRANULE), -1)
                is_shared = jnp.where((before == key) & (key >= 0), 1.0, is_shared)
                carry = count + exists.astype(jnp.int32), jnp.where(place == count, key, before), is_shared
            return carry

        # Not by constants: the compiler keeps a constant register as one number, and a loop cannot change that.
        start = jnp.int32(0), jnp.minimum(place, -1), jnp.minimum(place, 0).astype(jnp.float32)
        count, _, is_shared = jax.lax.fori_loop(0, self.places.slots, note, start)
        return count, jnp.max(is_shared) > 0

    def _change(self, granule: Any) -> None:
        # In this order: a granule that has not arrived would be changed in vain, and what is sent before the change is
        # the old granule.
        self._reads(granule).wait()
        self._put(granule)
        self._writes(granule).start()

    def _change_alone(self, granule: Any) -> None:
        self._reads(granule).start()
        self._change(granule)
        self._writes(granule).wait()

    def _stage(self, granule: Any) -> Any:
        return jax.lax.rem(granule, 2 * self.writer.granules_ahead)

    def _reads(self, granule: Any) -> Copies:
        """A granule's new rows and the granule itself, into their stage of the rings."""
        stage, noted, arrived = self._stage(granule), self.scratch.noted, self.scratch.arrived

        def each(act: Any) -> None:
            def copy_token(token: Any, _: Any) -> None:
                for new, buffer in zip(self.new, self.scratch.new, strict=True):
                    source = new.at[noted.row[granule] + token]
                    act(pltpu.make_async_copy(source, buffer.at[stage, token], arrived.at[stage]))

            jax.lax.fori_loop(noted.begin[granule], noted.end[granule], copy_token, None)
            for source, buffer in zip(self._in_pages(granule), self.scratch.old, strict=True):
                act(pltpu.make_async_copy(source, buffer.at[stage], arrived.at[stage]))

        return Copies(each)

    def _writes(self, granule: Any) -> Copies:
        """A granule, back to its page."""
        stage = self._stage(granule)

        def each(act: Any) -> None:
            for buffer, target in zip(self.scratch.old, self._in_pages(granule), strict=True):
                act(pltpu.make_async_copy(buffer.at[stage], target, self.scratch.left.at[stage]))

        return Copies(each)

    def _in_pages(self, granule: Any) -> list[Ref]:
        return granules_at(
            self.writer, self.pools, self.scratch.noted.page[granule], self.scratch.noted.offset[granule]
        )

    def _put(self, granule: Any) -> None:
        """Put the new rows into a granule that has arrived."""
        stage, noted = self._stage(granule), self.scratch.noted

        def put_token(token: Any, _: Any) -> None:
            new = self.writer.stacked([new[stage, token].astype(jnp.float32) for new in self.scratch.new])
            for part, x, row in zip(self.writer.parts, new, self.scratch.row, strict=True):
                row[...] = x
                self._put_row(part, row, self.scratch.old[part.pool].at[stage, *part.index], token)

        jax.lax.fori_loop(noted.begin[granule], noted.end[granule], put_token, None)

    def _put_row(self, part: Part, row: Ref, old: Ref, token: Any) -> None:
        """Put one token's rows of all heads into a part of a granule."""
        if part.is_token_first:
            x = old[...].astype(jnp.float32)
            is_token = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) == token
            old[...] = jnp.where(is_token, row[...][None], x).astype(old.dtype)
            return
        for head in range(part.row_shape[0]):
            x = old[head].astype(jnp.float32)
            is_token = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) == token
            of_head = jnp.broadcast_to(row[pl.ds(head, 1), :], x.shape)
            old[head] = jnp.where(is_token, of_head, x).astype(old.dtype)
