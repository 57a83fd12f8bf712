"""Writing new rows into the pages, for any batch: two kernels, in place, with many transfers on their way.

Rows go by granules. One of which every slot is written needs no read: XLA has put its rows in the pool's order, and
they are copied. Of the others, at most two a sequence, the slots that are not written must stay: each is read, changed
and written back. Sequences that write to one granule take turns.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int

from paged.spec import PageLayout, Pages, RaggedBatch

from ..sequences import Sequences
from ..xla import XLA_BLOCKS, token_rows, write_scales
from .chips import Chip
from .granules import GRANULE, granule_at, granule_shape, token_axis
from .transfer import Pool, pools_of

Ref = Any
_LANES = 128
# Rings of buffers: so many blocks of whole granules are read ahead, and so many written back; so many partial granules.
_BLOCKS, _MOST_IN_BLOCK, _MOST_STAGED = 4, 8, 16
# Vector memory for either, and the share of a core's that is at hand.
_RING_BYTES, _VMEM_SHARE = 2**22, 0.6
# The share of scalar memory that one kernel's list may take.
_SMEM_SHARE, _BYTES_A_GRANULE = 0.6, 20


class Granules(NamedTuple):
    """Granules to write, flat.

    ``page`` is -1 where there is nothing to write, ``slot`` the granule's first; its slots from ``begin`` up to ``end``
    are written. ``turn`` counts the granules before this one in the list that are the same piece of memory, and is -1
    where there is nothing to write. ``row`` is the row for the first slot. ``count`` is the list's length without what
    only pads it.
    """

    page: Int[Array, " granules"]
    slot: Int[Array, " granules"]
    begin: Int[Array, " granules"]
    end: Int[Array, " granules"]
    turn: Int[Array, " granules"]
    row: Int[Array, " granules"]
    count: Int[Array, ""]

    @classmethod
    def whole(cls, seqs: Sequences, most: int, page_size: int, num_pages: int) -> "Granules":
        """Those of which every slot is written, of which there are at most ``most``."""
        first = _round_up(_first_position(seqs))
        counts = jnp.where(seqs.counts > 0, jnp.maximum(seqs.lengths - first, 0) // GRANULE, 0)
        ends = jnp.cumsum(counts)
        index = jnp.arange(most, dtype=jnp.int32)
        seq = _searchsorted(ends, index)
        position = first[seq] + GRANULE * (index - ends[seq] + counts[seq])
        slots = jnp.zeros_like(seq), jnp.full_like(seq, GRANULE)
        return cls._of(seqs, seq, position, slots, index < ends[-1], page_size, num_pages)

    @classmethod
    def partial(cls, seqs: Sequences, tokens: int, page_size: int, num_pages: int) -> "Granules":
        """The others, which are the first and the last of a sequence."""
        first, length = _first_position(seqs), seqs.lengths
        last = length // GRANULE * GRANULE
        has_head = (first % GRANULE > 0) & (first < length)
        has_tail = (length > last) & (seqs.counts > 0) & (last >= first)
        head_end = jnp.minimum(length - first // GRANULE * GRANULE, GRANULE)
        exists, position, begin, end = (
            jnp.stack(x, axis=1).reshape(-1)
            for x in (
                (has_head, has_tail),
                (first // GRANULE * GRANULE, last),
                (first % GRANULE, jnp.zeros_like(first)),
                (head_end, length - last),
            )
        )
        ends = jnp.cumsum(exists, dtype=jnp.int32)
        index = jnp.arange(min(tokens, exists.shape[0]), dtype=jnp.int32)
        which = _searchsorted(ends, index)
        slots = begin[which], end[which]
        own = cls._of(seqs, which // 2, position[which], slots, index < ends[-1], page_size, num_pages)
        return own._replace(turn=_turns(own.page, own.slot))

    @classmethod
    def _of(
        cls,
        seqs: Sequences,
        seq: Int[Array, " granules"],
        position: Int[Array, " granules"],
        slots: tuple[Array, Array],
        is_real: Bool[Array, " granules"],
        page_size: int,
        num_pages: int,
    ) -> "Granules":
        entry = jnp.clip(position // page_size, 0, seqs.tables.shape[1] - 1)
        page = seqs.tables[seq, entry]
        page = jnp.where(is_real & (page >= 0) & (page < num_pages), page, -1)
        row = seqs.starts[seq] + position - (seqs.lengths - seqs.counts)[seq]
        count = jnp.sum(is_real, dtype=jnp.int32)
        return cls(page, position % page_size, *slots, jnp.zeros_like(page), row, count)

    def part(self, some: slice) -> "Granules":
        """A part of the list."""
        count = jnp.clip(self.count - some.start, 0, some.stop - some.start)
        return Granules(*(x[some] for x in self[:-1]), count)

    @property
    def lists(self) -> tuple[Array, ...]:
        """What a kernel has to know."""
        return self.page, self.slot, self.begin, self.end, self.turn

    def gather(self, rows: Array, axis: int) -> Array:
        """Every granule's ``rows [tokens, ...]``, its slots at ``axis`` of a granule; anything in slots not written."""
        row = jnp.clip(self.row[:, None] + jnp.arange(GRANULE), 0, rows.shape[0] - 1)
        return jnp.moveaxis(rows[row], 1, 1 + axis)


def _first_position(seqs: Sequences) -> Int[Array, " seqs"]:
    return jnp.maximum(seqs.lengths - seqs.counts, 0)


def _round_up(position: Array) -> Array:
    return (position + GRANULE - 1) // GRANULE * GRANULE


def _searchsorted(ends: Array, index: Array) -> Array:
    """Whose interval an index is in; anybody's if it is past the last. By comparison with all: one pass, no gathers."""
    found = jnp.searchsorted(ends, index, side="right", method="compare_all")
    return jnp.minimum(found, ends.shape[0] - 1).astype(jnp.int32)


def _cut(count: Int[Array, ""], cores: int) -> Int[Array, " cores_plus_1"]:
    return (count * jnp.arange(cores + 1) // cores).astype(jnp.int32)


def _turns(page: Int[Array, " granules"], slot: Int[Array, " granules"]) -> Int[Array, " granules"]:
    """For each granule, how many before it are the same. By comparison of all pairs: a TPU sorts slowly."""
    index = jnp.arange(page.shape[0])
    same = (page[:, None] == page) & (slot[:, None] == slot) & (index[:, None] > index)
    return jnp.where(page < 0, -1, jnp.sum(same, axis=1, dtype=jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def write_rows(chip: Chip, interpret: Any, k: Array, v: Array, pages: Pages, batch: RaggedBatch) -> Pages:
    """The pages with each row's key and value at its position, in place where they are donated; rows of no sequence,
    and holes, are dropped. Its gradient is the XLA write's.

    Where two tokens have one slot, which is a fault of the caller, one of them is written.
    """
    writer, tokens, size = Writer(pages.layout), k.shape[0], pages.layout.page_size
    seqs = Sequences.of(batch, tokens, size)
    rows, pools = token_rows(k, v, pages), pages.arrays
    if (batch.query_rows or tokens) >= GRANULE:
        most = -(-(tokens // GRANULE) // writer.in_block) * writer.in_block
        granules = Granules.whole(seqs, most, size, pages.num_pages)
        pools = _launch(Whole, writer, granules, rows, pools, chip, interpret)
    granules = Granules.partial(seqs, tokens, size, pages.num_pages)
    pools = _launch(Partial, writer, granules, rows, pools, chip, interpret)
    return Pages(pools, *write_scales(rows[len(pools) :], pages, batch), layout=pages.layout)


def _write_forward(chip: Chip, interpret: Any, k: Array, v: Array, pages: Pages, batch: RaggedBatch) -> Any:
    return write_rows(chip, interpret, k, v, pages, batch), (k, v, pages, batch)


def _write_backward(chip: Chip, interpret: Any, residuals: Any, cotangent: Any) -> Any:
    *differentiable, batch = residuals
    del chip, interpret
    _, pull = jax.vjp(lambda k, v, pages: XLA_BLOCKS.write(k, v, pages, batch), *differentiable)
    return (*pull(cotangent), None)


write_rows.defvjp(_write_forward, _write_backward)


def _launch(
    kind: Any,
    writer: "Writer",
    granules: Granules,
    rows: tuple[Array, ...],
    pools: tuple[Array, ...],
    chip: Chip,
    interpret: Any,
) -> tuple[Array, ...]:
    """The pools with these granules written, by one kernel, or several where the list does not fit scalar memory."""
    length = granules.page.shape[0]
    most = int(_SMEM_SHARE * chip.smem_bytes) // _BYTES_A_GRANULE // _MOST_IN_BLOCK * _MOST_IN_BLOCK
    for first in range(0, length, most):
        part = granules.part(slice(first, min(first + most, length)))
        new = [part.gather(x, token_axis(writer.layout, pool)) for x, pool in zip(rows, writer.pools, strict=False)]
        bounds = kind.bounds_of(writer, part, chip.cores)
        scalars, operands = (*part.lists, bounds), (*new, *pools)

        def kernel(*refs: Any, count: int = len(pools), lists: int = len(part.lists)) -> None:
            *own, bound = refs[: lists + 1]
            news, written, scratch = (
                refs[lists + 1 :][i:j] for i, j in ((0, count), (2 * count, 3 * count), (3 * count, None))
            )
            kind(writer, Granules(*own, row=None, count=None), bound, news, written, scratch[:-2], *scratch[-2:]).run()

        pools = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(chip.cores,),
                in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)] * len(operands),
                out_specs=[pl.BlockSpec(memory_space=pltpu.HBM)] * len(pools),
                scratch_shapes=kind.scratch(writer),
            ),
            out_shape=[jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools],
            input_output_aliases={len(scalars) + len(new) + i: i for i in range(len(pools))},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",), disable_bounds_checks=True, vmem_limit_bytes=chip.vmem_bytes
            ),
            interpret=interpret,
            name=f"paged_write_{kind.__name__.lower()}",
        )(*scalars, *operands)
    return tuple(pools)


def _stream(first: Any, end: Any, ahead: int, read: Any, send: Any, await_sent: Any) -> None:
    """A ring of ``2 * ahead`` buffers: each of ``first`` to ``end`` is read so many before it is sent, and has left
    when its buffer is needed, or at the end."""

    def step(i, _):
        pl.when(i - ahead >= first)(lambda: await_sent(i - ahead))
        pl.when(i + ahead < end)(lambda: read(i + ahead))
        send(i)

    jax.lax.fori_loop(first, jnp.minimum(first + ahead, end), lambda i, _: read(i), None)
    jax.lax.fori_loop(first, end, step, None)
    jax.lax.fori_loop(jnp.maximum(first, end - ahead), end, lambda i, _: await_sent(i), None)


class Writer(NamedTuple):
    """The static facts of the kernels: a layout's arrays, and the buffers that fit."""

    layout: PageLayout

    @property
    def pools(self) -> tuple[Pool, ...]:
        """The pool's arrays; scales a token are not among them."""
        return tuple(pool for pool in pools_of(self.layout) if not pool.is_scale)

    @property
    def _granule_bytes(self) -> int:
        # A tile of 8-bit values may take the memory of 32-bit ones.
        return 4 * sum(math.prod(granule_shape(self.layout, pool)) for pool in self.pools)

    @property
    def in_block(self) -> int:
        """Granules a block of whole ones."""
        return max(1, min(_MOST_IN_BLOCK, _RING_BYTES // (2 * _BLOCKS * self._granule_bytes)))

    @property
    def staged(self) -> int:
        """Partial granules that are read ahead, and as many that are written back."""
        return max(1, min(_MOST_STAGED, _RING_BYTES // (4 * self._granule_bytes)))

    @property
    def vmem_bytes(self) -> int:
        """Vector memory of the larger kernel."""
        return self._granule_bytes * max(2 * _BLOCKS * self.in_block, 4 * self.staged)

    def vmem(self, *places: int) -> list[Any]:
        """A buffer of granules for each array."""
        return [pltpu.VMEM((*places, *granule_shape(self.layout, pool)), pool.dtype) for pool in self.pools]

    def granules(self, pools: tuple[Ref, ...], page: Any, slot: Any) -> list[Ref]:
        """A granule's part of each array."""
        return [granule_at(self.layout, pool, ref, page, slot) for pool, ref in zip(self.pools, pools, strict=True)]


@dataclasses.dataclass(frozen=True)
class Whole:
    """The kernel of whole granules: blocks of them from the new rows' memory, each granule on to its place."""

    writer: Writer
    granules: Granules
    bounds: Ref
    new: tuple[Ref, ...]
    pools: tuple[Ref, ...]
    buffers: tuple[Ref, ...]
    arrived: Ref
    left: Ref

    @staticmethod
    def bounds_of(writer: Writer, granules: Granules, cores: int) -> Int[Array, " cores_plus_1"]:
        """Where to cut the blocks so that every core has as many."""
        return _cut((granules.count + writer.in_block - 1) // writer.in_block, cores)

    @staticmethod
    def scratch(writer: Writer) -> list[Any]:
        """Buffers, and semaphores for each."""
        dma = pltpu.SemaphoreType.DMA
        return [*writer.vmem(2 * _BLOCKS, writer.in_block), dma((2 * _BLOCKS,)), dma((2 * _BLOCKS,))]

    def run(self) -> None:
        """Write this core's blocks; a block is read while those before it leave."""
        core = pl.program_id(0)
        _stream(self.bounds[core], self.bounds[core + 1], _BLOCKS, self._read, self._send, self._await_writes)

    def _send(self, block: Any) -> None:
        self._read(block, "wait")
        self._start_writes(block)

    def _read(self, block: Any, verb: str = "start") -> None:
        place, size = jax.lax.rem(block, 2 * _BLOCKS), self.writer.in_block
        for new, buffer in zip(self.new, self.buffers, strict=True):
            source = new.at[pl.ds(block * size, size)]
            getattr(pltpu.make_async_copy(source, buffer.at[place], self.arrived.at[place]), verb)()

    def _start_writes(self, block: Any) -> None:
        place, size = jax.lax.rem(block, 2 * _BLOCKS), self.writer.in_block
        for i in range(size):
            page, slot = self.granules.page[block * size + i], self.granules.slot[block * size + i]

            @pl.when(page >= 0)
            def _(i=i, page=page, slot=slot):
                targets = self.writer.granules(self.pools, page, slot)
                for buffer, target in zip(self.buffers, targets, strict=True):
                    pltpu.make_async_copy(buffer.at[place, i], target, self.left.at[place]).start()

    def _await_writes(self, block: Any) -> None:
        """Semaphores count bytes, whichever they are."""
        place, size = jax.lax.rem(block, 2 * _BLOCKS), self.writer.in_block
        count = sum((self.granules.page[block * size + i] >= 0).astype(jnp.int32) for i in range(size))

        def wait(granules: int) -> None:
            for buffer in self.buffers:
                part = buffer.at[place, pl.ds(0, granules)]
                pltpu.make_async_copy(part, part, self.left.at[place]).wait()

        pl.when(count == size)(lambda: wait(size))

        @pl.when(count != size)
        def _():
            jax.lax.fori_loop(0, count, lambda i, _: wait(1), None)


@dataclasses.dataclass(frozen=True)
class Partial:
    """The kernel of partial granules: a ring of them, each read, changed, and written back."""

    writer: Writer
    granules: Granules
    bounds: Ref
    new: tuple[Ref, ...]
    pools: tuple[Ref, ...]
    buffers: tuple[Ref, ...]
    arrived: Ref
    left: Ref

    @staticmethod
    def bounds_of(writer: Writer, granules: Granules, cores: int) -> Int[Array, " cores_plus_2"]:
        """Where to cut the granules, and at last the number of turns. If there are several, one core takes them all."""
        del writer
        turns = jnp.max(granules.turn, keepdims=True) + 1
        alone = jnp.full((cores + 1,), granules.count).at[0].set(0)
        return jnp.concatenate([jnp.where(turns > 1, alone, _cut(granules.count, cores)), turns])

    @staticmethod
    def scratch(writer: Writer) -> list[Any]:
        """Buffers of new rows, those of granules, and semaphores for each place of the ring."""
        dma, staged = pltpu.SemaphoreType.DMA, 2 * writer.staged
        return [*writer.vmem(staged), *writer.vmem(staged), dma((staged,)), dma((staged,))]

    def run(self) -> None:
        """Change this core's granules: those of the first turn, and when all these are in place those of the next."""
        core, ahead = pl.program_id(0), self.writer.staged
        first, end, turns = self.bounds[core], self.bounds[core + 1], self.bounds[self.bounds.shape[0] - 1]

        def take_turn(turn, _):
            acts = (
                functools.partial(self._in_turn, turn, act) for act in (self._read, self._change, self._await_write)
            )
            _stream(first, end, ahead, *acts)

        jax.lax.fori_loop(0, turns, take_turn, None)

    def _in_turn(self, turn: Any, act: Any, granule: Any) -> None:
        """``act`` on a granule and its place in the ring, if it is this one's turn."""
        pl.when(self.granules.turn[granule] == turn)(lambda: act(granule, jax.lax.rem(granule, 2 * self.writer.staged)))

    def _await_write(self, granule: Any, place: Any) -> None:
        self._write(granule, place, "wait")

    def _change(self, granule: Any, place: Any) -> None:
        self._read(granule, place, "wait")
        self._put(granule, place)
        self._write(granule, place, "start")

    def _read(self, granule: Any, place: Any, verb: str = "start") -> None:
        sources = (*(new.at[granule] for new in self.new), *self._places(granule))
        for source, buffer in zip(sources, self.buffers, strict=True):
            getattr(pltpu.make_async_copy(source, buffer.at[place], self.arrived.at[place]), verb)()

    def _write(self, granule: Any, place: Any, verb: str) -> None:
        targets = self._places(granule)
        for buffer, target in zip(self.buffers[len(self.new) :], targets, strict=True):
            getattr(pltpu.make_async_copy(buffer.at[place], target, self.left.at[place]), verb)()

    def _put(self, granule: Any, place: Any) -> None:
        """Put the new rows into a granule that has been read."""
        begin, end, count = self.granules.begin[granule], self.granules.end[granule], len(self.new)
        for pool, new, old in zip(self.writer.pools, self.buffers[:count], self.buffers[count:], strict=True):
            rows, x = (ref[place].astype(jnp.float32) for ref in (new, old))
            slot = jax.lax.broadcasted_iota(jnp.int32, x.shape, token_axis(self.writer.layout, pool))
            old[place] = jnp.where((slot >= begin) & (slot < end), rows, x).astype(old.dtype)

    def _places(self, granule: Any) -> list[Ref]:
        return self.writer.granules(self.pools, self.granules.page[granule], self.granules.slot[granule])
