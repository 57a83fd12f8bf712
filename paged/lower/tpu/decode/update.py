"""Writing a step's keys and values in the decode kernel itself, before it attends.

New rows are few, and most go into the middle of a granule. So every granule that a sequence writes to is read from its
page, changed and written back, for many sequences at once. All granules are in place before the first page is read for
attention.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from paged.spec import PageLayout, Pages

from ...program import Sequences, floor_div
from ...xla import token_rows
from ..chips import LANES, SUBLANES
from ..pages import IntervalWork, WorkList, pools_of
from ..references import Copies, Ref
from ..write.granules import GRANULE, granule_at, granule_shape, granules_per_seq, row_shape, token_axis

# Vector memory for granules on their way, and the most sequences whose granules are on their way together.
_STAGING_BYTES, _MOST_STAGED = 2**21, 64


class Targets(NamedTuple):
    """Where new rows go: for every sequence as many granules as its rows can touch, in one flat list.

    * ``page``: the granule's page, or -1 where nothing is written.
    * ``offset``: the offset in the page of the granule's first token.
    * ``position``: the position of that token in its sequence.
    """

    page: Int[Array, " granules"]
    offset: Int[Array, " granules"]
    position: Int[Array, " granules"]

    @classmethod
    def of(cls, seqs: Sequences, rows: int, page_size: int, num_pages: int) -> "Targets":
        """The granules of sequences that have at most ``rows`` new rows each."""
        first = jnp.clip(seqs.positions, 0, seqs.lengths) // GRANULE * GRANULE
        position = first[:, None] + GRANULE * jnp.arange(granules_per_seq(rows), dtype=jnp.int32)[None]
        is_written = (position < seqs.lengths[:, None]) & (seqs.counts > 0)[:, None]
        entry = jnp.minimum(position // page_size, seqs.tables.shape[1] - 1)
        page = jnp.take_along_axis(seqs.tables, entry, axis=1)
        is_written &= (page >= 0) & (page < num_pages)
        page, offset = jnp.where(is_written, page, -1).reshape(-1), (position % page_size).reshape(-1)
        return cls(page, offset, position.reshape(-1))

    def at(self, granule: Any) -> tuple[Any, Any, Any]:
        """A granule's page, offset and position."""
        return self.page[granule], self.offset[granule], self.position[granule]


def targets_of_tables(work: IntervalWork, rows: int, page_size: int, num_pages: int) -> Callable[[Any], Any]:
    """`Targets.at` of the batch, computed by the scalar core from its block tables."""
    per_seq = granules_per_seq(rows)

    def at(granule: Any) -> tuple[Any, Any, Any]:
        seq = jax.lax.div(granule, per_seq)
        length = work.length[seq]
        first = floor_div(jnp.clip(work.position[seq], 0, length), GRANULE) * GRANULE
        position = first + GRANULE * (granule - seq * per_seq)
        entry = floor_div(position, page_size, low=0)
        page = work.page[seq * work.width + jnp.minimum(entry, work.width - 1)]
        is_written = (position < length) & (page >= 0) & (page < num_pages)
        return jnp.where(is_written, page, -1), position - entry * page_size, position

    return at


class Staging(NamedTuple):
    """Memory for the granules of several sequences and for the rows that go into them, of each array of pages.

    All reads share the semaphore ``arrived``, and all writes the semaphore ``left``. ``targets`` says where the
    granules are, in scalar memory.
    """

    granules: tuple[Ref, ...]
    rows: tuple[Ref, ...]
    targets: Targets
    arrived: Ref
    left: Ref


class WriteRefs(NamedTuple):
    """What the write reads, writes and works in.

    ``target(granule)`` is a granule's page, offset and position. ``new`` are the rows to write, for each array of
    pages.
    """

    work: WorkList | IntervalWork
    target: Callable[[Any], Any]
    new: tuple[Ref, ...]
    pools: tuple[Ref, ...]
    staging: Staging


def new_rows(k: Array, v: Array, pages: Pages) -> tuple[Array, ...]:
    """New keys and values as the kernel takes them, ``[tokens, ...]``: as they lie, where their pages hold them so.

    Else one array for each array of pages, in which every row is as its page holds it, in float32.
    """
    layout = pages.layout
    if layout.order != "interleaved" and layout.scales is None:
        # A TPU has no float16. Registers hold rows of 16 bits in pairs.
        k, v = (x.astype(jnp.float32) if x.dtype == jnp.float16 or x.shape[1] % 2 else x for x in (k, v))
        return k, v
    rows = zip(token_rows(k, v, pages), pools_of(layout), strict=True)
    return tuple(x.astype(jnp.float32).reshape(x.shape[0], *row_shape(layout, pool)) for x, pool in rows)


class Write(NamedTuple):
    """The write, by its static facts.

    * ``rows``: the most that a sequence writes.
    * ``of_row``: the shape and dtype of a row in each array of `new_rows`.
    """

    layout: PageLayout
    rows: int
    of_row: tuple[tuple[tuple[int, ...], Any], ...]

    @classmethod
    def of(cls, layout: PageLayout, rows: int, new: tuple[Any, ...]) -> "Write":
        """The write of `new_rows`, which may be references."""
        return cls(layout, rows, tuple((x.shape[1:], x.dtype) for x in new))

    @property
    def is_plain(self) -> bool:
        """Whether new rows are keys and values as they lie, ``[kv_heads, dim]``."""
        return len(self.of_row[0][0]) == 2

    @property
    def staged(self) -> int:
        """Sequences whose granules are on their way together."""
        granule = sum(math.prod(granule_shape(self.layout, pool)) * 4 for pool in pools_of(self.layout))
        return max(1, min(_MOST_STAGED, _STAGING_BYTES // (granule * granules_per_seq(self.rows))))

    def scratch(self) -> Staging:
        """Memory to write with."""
        pools, count, dma = pools_of(self.layout), self.staged * granules_per_seq(self.rows), pltpu.SemaphoreType.DMA
        granules = [pltpu.VMEM((count, *granule_shape(self.layout, pool)), pool.dtype) for pool in pools]
        rows = [pltpu.VMEM((self.staged, self.rows, *shape), dtype) for shape, dtype in self.of_row]
        targets: Any = [pltpu.SMEM((count,), jnp.int32)] * len(Targets._fields)
        return Staging(tuple(granules), tuple(rows), Targets(*targets), arrived=dma, left=dma)

    def run(self, refs: WriteRefs, first: Any, end: Any) -> None:
        """Write the new rows of sequences ``first`` to ``end``, and return when they are in place."""
        per_seq = granules_per_seq(self.rows)

        def write_some(base):
            count = jnp.minimum(end - base, self.staged)
            # If two sequences write to one granule, the first must be done before the second one reads it.
            count = jnp.where(self._note_targets(refs, base * per_seq, count * per_seq), 1, count)

            def for_each_seq(act):
                jax.lax.fori_loop(0, count, lambda i, _: act(base + i, i), None)

            def for_each_granule(act):
                jax.lax.fori_loop(0, count * per_seq, lambda i, _: act(base * per_seq + i, i), None)

            # Every read starts before the first is awaited: one after the other, each would take the whole latency of
            # HBM. All reads share one semaphore, which counts bytes whoever sent them. So nothing is sure to have
            # arrived before all waits are over, and no granule is changed before that.
            for_each_seq(lambda seq, i: self._row_copies(refs, seq, i).start())
            for_each_granule(lambda granule, i: self._granule_copies(refs, i, is_write=False).start())
            for_each_seq(lambda seq, i: self._row_copies(refs, seq, i).wait())
            for_each_granule(lambda granule, i: self._granule_copies(refs, i, is_write=False).wait())
            for_each_granule(lambda granule, i: self._put(refs, granule, i))
            for_each_granule(lambda granule, i: self._granule_copies(refs, i, is_write=True).start())
            # Before the next turn: it reads into this memory, and of a shared granule it must read what is written
            # here. After the last turn the pages are read for attention.
            for_each_granule(lambda granule, i: self._granule_copies(refs, i, is_write=True).wait())
            return base + count

        jax.lax.while_loop(lambda base: base < end, write_some, first)

    def _note_targets(self, refs: WriteRefs, first: Any, count: Any) -> Any:
        """Note where ``count`` granules from ``first`` on are. Returns whether two of them are one."""
        shape, per_page = (SUBLANES, LANES), self.layout.page_size // GRANULE
        assert self.staged * granules_per_seq(self.rows) <= SUBLANES * LANES
        place = LANES * jax.lax.broadcasted_iota(jnp.int32, shape, 0) + jax.lax.broadcasted_iota(jnp.int32, shape, 1)

        def note(i, carry):
            keys, is_shared = carry
            target = refs.target(first + i)
            for ref, x in zip(refs.staging.targets, target, strict=True):
                ref[i] = x
            page, offset, _ = target
            # The granules before it in this turn, all at once. Those that are not written equal none.
            key = jnp.where(page < 0, -1, page * per_page + floor_div(offset, GRANULE))
            is_shared = jnp.where((keys == key) & (key >= 0), 1.0, is_shared)
            return jnp.where(place == i, key, keys), is_shared

        # Not by constants: the compiler keeps a constant register as one number, and a loop cannot change that.
        start = jnp.minimum(place, -1), jnp.minimum(place, 0).astype(jnp.float32)
        return jnp.max(jax.lax.fori_loop(0, count, note, start)[1]) > 0

    def _row_copies(self, refs: WriteRefs, seq: Any, i: Any) -> Copies:
        """A sequence's new rows, to place ``i`` of the staging memory."""

        def each(act):
            for row in range(self.rows):
                for new, buffer in zip(refs.new, refs.staging.rows, strict=True):
                    source = new.at[jnp.minimum(refs.work.row[seq] + row, new.shape[0] - 1)]
                    act(pltpu.make_async_copy(source, buffer.at[i, row], refs.staging.arrived))

        return Copies(each)

    def _granule_copies(self, refs: WriteRefs, i: Any, *, is_write: bool) -> Copies:
        """The granule in place ``i`` of the staging memory, from or to its page; nothing where nothing is written."""

        def each(act):
            page, offset, _ = refs.staging.targets.at(i)

            @pl.when(page >= 0)
            def _():
                for pool, ref, buffer in zip(pools_of(self.layout), refs.pools, refs.staging.granules, strict=True):
                    in_page, staged = granule_at(self.layout, pool, ref, page, offset), buffer.at[i]
                    if is_write:
                        act(pltpu.make_async_copy(staged, in_page, refs.staging.left))
                    else:
                        act(pltpu.make_async_copy(in_page, staged, refs.staging.arrived))

        return Copies(each)

    def _put(self, refs: WriteRefs, granule: Any, i: Any) -> None:
        """Put a sequence's new rows into one of its granules, at place ``i`` of the staging memory."""
        work, staging = refs.work, refs.staging
        seq, staged = (jax.lax.div(x, granules_per_seq(self.rows)) for x in (granule, i))
        page, offset, position = staging.targets.at(i)

        @pl.when(page >= 0)
        def _():
            for ref, axis, which, is_scale in self._parts(staging, i):
                x = ref[...].astype(jnp.float32)
                token = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
                if is_scale:
                    # The granule of per-token scales is the whole page, which begins before the granule of keys.
                    token = token - offset
                for row in range(self.rows):
                    # The token of the granule that this row is; -1, which is none, for a row that does not exist.
                    target = jnp.where(row < work.rows[seq], work.position[seq] + row - position, -1)
                    new = [staging.rows[array][staged, row].astype(jnp.float32) for array in which]
                    x = jnp.where(token == target, self._in_granule(new, axis), x)
                ref[...] = x.astype(ref.dtype)

    def _in_granule(self, new: list[Array], axis: int) -> Array:
        """A token's rows of `new_rows` as a part of a granule holds them, whose token axis is ``axis``."""
        if not self.is_plain:
            return new[0]
        (row,) = self.layout.stack(*new) if len(new) > 1 else new
        return jnp.expand_dims(row, axis)

    def _parts(self, staging: Staging, i: Any) -> Iterator[tuple[Ref, int, tuple[int, ...], bool]]:
        """The parts of the granule in place ``i`` that rows go into.

        Each with its token axis, with the numbers of the arrays of `new_rows` that go there, and whether it is scales.
        """
        for which, pool in enumerate(pools_of(self.layout)):
            axis = token_axis(self.layout, pool)
            if self.is_plain and self.layout.order == "packed":
                yield from ((staging.granules[0].at[i, part], axis - 1, (part,), False) for part in range(2))
            else:
                is_both = self.is_plain and self.layout.order == "joined"
                yield staging.granules[which].at[i], axis, (0, 1) if is_both else (which,), pool.is_scale
