"""Writing new rows into the pages, for any batch: two kernels, in place, with many transfers on their way.

Rows go by granules. One of which every slot is written needs no read: XLA has put its rows in the pool's order, and
they are copied. Of the others, at most two a sequence, the slots that are not written must stay: each is read, changed
and written back. Sequences that write to one granule take turns.
"""

import abc
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from paged.spec import PageLayout, Pages, RaggedBatch

from ...program import Sequences
from ...xla import XLA_BLOCKS, token_rows, write_scales
from ..chips import Chip
from ..pages import Pool, pools_of
from ..transforms import in_turn
from .granules import GRANULE, Granules, Lists, granule_at, granule_shape, token_axis

Ref = Any
# Rings of buffers: so many blocks of whole granules are read ahead, and so many written back; so many partial granules.
_BLOCKS, _MOST_IN_BLOCK, _MOST_STAGED = 4, 8, 16
# Vector memory for either, and the share of a core's that is at hand.
_RING_BYTES, _VMEM_SHARE = 2**22, 0.6
# The share of scalar memory that one kernel's lists may take.
_SMEM_SHARE = 0.6


def refuses_write(layout: PageLayout, chip: Chip) -> str | None:
    """Why no kernel writes pages of this layout, or None."""
    if layout.page_size % GRANULE:
        return f"pages of {layout.page_size} tokens are no whole tiles: page_size must be a multiple of {GRANULE}"
    if layout.dtype == jnp.float16:
        return "a TPU has no float16: pages must be bfloat16, float32, int8 or float8"
    taken, budget = Writer(layout).vmem_bytes, int(_VMEM_SHARE * chip.vmem_bytes)
    if taken > budget:
        return f"{GRANULE} slots are so large that buffers take {taken} bytes of vector memory, and there are {budget}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def write_rows(chip: Chip, interpret: Any, k: Array, v: Array, pages: Pages, batch: RaggedBatch) -> Pages:
    """The pages with each row's key and value at its position, in place where they are donated; rows of no sequence,
    and holes, are dropped. Its gradient is the XLA write's.

    Where two tokens have one slot, which is a fault of the caller, one of them is written.
    """
    return in_turn(functools.partial(_write, chip, interpret))(k, v, pages, batch)


def _write_forward(chip: Chip, interpret: Any, k: Array, v: Array, pages: Pages, batch: RaggedBatch) -> Any:
    return write_rows(chip, interpret, k, v, pages, batch), (k, v, pages, batch)


def _write_backward(chip: Chip, interpret: Any, residuals: Any, cotangent: Any) -> Any:
    *differentiable, batch = residuals
    del chip, interpret
    _, pull = jax.vjp(lambda k, v, pages: XLA_BLOCKS.write(k, v, pages, batch), *differentiable)
    return (*pull(cotangent), None)


write_rows.defvjp(_write_forward, _write_backward)


def _write(chip: Chip, interpret: Any, k: Array, v: Array, pages: Pages, batch: RaggedBatch) -> Pages:
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


def _cut(count: Int[Array, ""], cores: int) -> Int[Array, " cores_plus_1"]:
    return (count * jnp.arange(cores + 1) // cores).astype(jnp.int32)


def _launch(
    kind: "type[Kernel]",
    writer: "Writer",
    granules: Granules,
    rows: tuple[Array, ...],
    pools: tuple[Array, ...],
    chip: Chip,
    interpret: Any,
) -> tuple[Array, ...]:
    """The pools with these granules written, by one kernel, or several where the list does not fit scalar memory."""
    length, most = granules.row.shape[0], int(_SMEM_SHARE * chip.smem_bytes) // (4 * len(Lists._fields))
    most -= most % _MOST_IN_BLOCK
    for first in range(0, length, most):
        part = granules.part(slice(first, min(first + most, length)))
        new = [part.gather(x, token_axis(writer.layout, pool)) for x, pool in zip(rows, writer.pools, strict=False)]
        scalars, operands = (*part.lists, kind.bounds_of(writer, part, chip.cores)), (*new, *pools)
        pools = pl.pallas_call(
            functools.partial(_run, kind, writer),
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


def _run(kind: "type[Kernel]", writer: "Writer", *refs: Ref) -> None:
    """Give the kernel its memory by name: the pools that it reads are those it writes."""
    count, *lists = len(writer.pools), *refs[: len(Lists._fields)]
    bounds, *rest = refs[len(lists) :]
    new, pools, (*buffers, arrived, left) = rest[:count], rest[2 * count : 3 * count], rest[3 * count :]
    kind(writer, Lists(*lists), bounds, tuple(new), tuple(pools), tuple(buffers), arrived, left).run()


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
        """Granules a block of whole ones, a power of two."""
        fit = max(1, min(_MOST_IN_BLOCK, _RING_BYTES // (2 * _BLOCKS * self._granule_bytes)))
        return 2 ** (fit.bit_length() - 1)

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
class Kernel(abc.ABC):
    """What both kernels have: granules to write, and for each array of the pages the new rows, the pool itself, and
    buffers, with semaphores for each place in these.

    Core ``c`` does the granules, or blocks of them, from ``bounds[c]`` to ``bounds[c + 1]``.
    """

    writer: Writer
    lists: Lists
    bounds: Ref
    new: tuple[Ref, ...]
    pools: tuple[Ref, ...]
    buffers: tuple[Ref, ...]
    arrived: Ref
    left: Ref

    @staticmethod
    @abc.abstractmethod
    def bounds_of(writer: Writer, granules: Granules, cores: int) -> Array:
        """Where to cut the work between cores."""

    @staticmethod
    @abc.abstractmethod
    def scratch(writer: Writer) -> list[Any]:
        """Buffers and semaphores."""

    @abc.abstractmethod
    def run(self) -> None:
        """Write this core's part."""


@dataclasses.dataclass(frozen=True)
class Whole(Kernel):
    """The kernel of whole granules: blocks of them from the new rows' memory, each granule on to its place."""

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
            page, slot = self.lists.page[block * size + i], self.lists.slot[block * size + i]

            @pl.when(page >= 0)
            def _(i=i, page=page, slot=slot):
                targets = self.writer.granules(self.pools, page, slot)
                for buffer, target in zip(self.buffers, targets, strict=True):
                    pltpu.make_async_copy(buffer.at[place, i], target, self.left.at[place]).start()

    def _await_writes(self, block: Any) -> None:
        """Semaphores count bytes, whichever they are."""
        place, size = jax.lax.rem(block, 2 * _BLOCKS), self.writer.in_block
        count = sum((self.lists.page[block * size + i] >= 0).astype(jnp.int32) for i in range(size))

        def wait(granules: int) -> None:
            for buffer in self.buffers:
                part = buffer.at[place, pl.ds(0, granules)]
                pltpu.make_async_copy(part, part, self.left.at[place]).wait()

        pl.when(count == size)(lambda: wait(size))

        @pl.when(count != size)
        def _():
            jax.lax.fori_loop(0, count, lambda i, _: wait(1), None)


@dataclasses.dataclass(frozen=True)
class Partial(Kernel):
    """The kernel of partial granules: a ring of them, each read, changed, and written back."""

    @staticmethod
    def bounds_of(writer: Writer, granules: Granules, cores: int) -> Int[Array, " cores_plus_2"]:
        """Where to cut the granules, and at last the number of turns. If there are several, one core takes them all."""
        del writer
        turns = jnp.max(granules.lists.turn, keepdims=True) + 1
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
        pl.when(self.lists.turn[granule] == turn)(lambda: act(granule, jax.lax.rem(granule, 2 * self.writer.staged)))

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
        begin, end, count = self.lists.begin[granule], self.lists.end[granule], len(self.new)
        for pool, new, old in zip(self.writer.pools, self.buffers[:count], self.buffers[count:], strict=True):
            rows, x = (ref[place].astype(jnp.float32) for ref in (new, old))
            slot = jax.lax.broadcasted_iota(jnp.int32, x.shape, token_axis(self.writer.layout, pool))
            old[place] = jnp.where((slot >= begin) & (slot < end), rows, x).astype(old.dtype)

    def _places(self, granule: Any) -> list[Ref]:
        return self.writer.granules(self.pools, self.lists.page[granule], self.lists.slot[granule])
