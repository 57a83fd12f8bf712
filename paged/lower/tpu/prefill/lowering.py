"""The TPU lowering for prompts and mixed batches.

Sequences with many query rows are cut into tiles for the prefill kernel. In a batch whose sequences may have any number
of rows, those with a single row go to the decode kernel instead, by `RaggedSchedule.single_rows`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from paged.spec import AttentionState, PageLayout, Pages, merge

from ...base import Schedule
from ...program import COMMON, Call, Program, Results, Sequences, Wanted
from ...work import Work
from ..base import STATE, TpuLowering, work_of
from ..decode import DecodeSchedule, TpuDecode
from ..pages import WorkList, copies_of_pages, rows_and_entries
from .intervals import Batch, Uncut, intervals_of
from .launch import PrefillLaunch, dtype_in_kernels
from .lists import Listed, RaggedLists, planned
from .own import OwnOperands, OwnShape
from .plan import alternatives, fits, launch_of, neighbours, plan_schedule, refuses_call
from .refs import Rows
from .schedule import RaggedSchedule
from .tiles import cut, most_tiles, owned


@dataclasses.dataclass(frozen=True)
class TpuRagged(TpuLowering):
    """Prompts, chunks of prompts and mixed batches on TPUs.

    It accepts every page order, and masks and score operations that are elementwise.
    """

    schedule_type: ClassVar[type[Schedule]] = RaggedSchedule

    def _refuses_call(self, program: Program, layout: PageLayout, call: Call) -> str | None:
        return refuses_call(program, layout, call, self.target_chip)

    def schedule(self, program: Program, layout: PageLayout, call: Call | None = None) -> RaggedSchedule:
        """Tiles with enough rows for the matrix unit, in the chip's memory; and the decode kernel's schedule for single
        rows, if it accepts them."""
        call = call or dataclasses.replace(COMMON, query_rows=None)
        own = plan_schedule(program, layout, call, self.target_chip)
        alone = _decode_call(call)
        if call.query_rows is not None or self._decode.refuses(program, layout, alone) is not None:
            return own
        return own.replace(single_rows=self._decode.schedule(program, layout, alone))

    def cannot_honour(self, program: Program, layout: PageLayout, call: Call, schedule: RaggedSchedule) -> str | None:
        """A schedule must fit the chip's memory, and have no more cores than the chip. So must ``single_rows``."""
        reason = fits(program, layout, call, schedule, self.target_chip)
        if reason is not None or schedule.single_rows is None or call.query_rows is not None:
            return reason
        alone = _decode_call(call)
        reason = self._decode.refuses(program, layout, alone)
        reason = reason or self._decode.cannot_honour(program, layout, alone, schedule.single_rows)
        return None if reason is None else f"its single_rows={schedule.single_rows} cannot run: {reason}"

    def alternatives(
        self, program: Program, layout: PageLayout, call: Call, own: RaggedSchedule
    ) -> Iterator[RaggedSchedule]:
        """Half and twice as much of each field. ``single_rows`` stays as it is."""
        del program, call
        return alternatives(layout, own)

    def neighbours(self, layout: PageLayout, call: Call, asked: RaggedSchedule) -> Iterator[RaggedSchedule]:
        """Page blocks of whole registers, tiles of a power of two of rows, and less of each."""
        return neighbours(layout, call, asked, self.target_chip)

    def describe(
        self, program: Program, layout: PageLayout, call: Call, schedule: RaggedSchedule, bytes_visited: int
    ) -> list[str]:
        """How many kernels there may be, their memory, what becomes of sequences of one row, and copies by XLA."""
        chip = self.target_chip
        launch = launch_of(program, layout, call, schedule, chip)
        tiles = most_tiles(call.tokens, call.slots, schedule.rows_per_tile)
        tiles_per_kernel, entries_per_kernel = rows_and_entries((tiles, call.pages_per_seq), chip)
        kernels = -(-tiles // tiles_per_kernel) * -(-call.pages_per_seq // entries_per_kernel)
        if intervals_of(program, layout, call, schedule.rows_per_tile, chip) is not None:
            kernels = 1
        lines = [
            f"at most {kernels} kernel(s) on {chip.words} for at most {tiles} tiles of {schedule.rows_per_tile} "
            f"query rows, each with {schedule.buffers} buffers of {schedule.pages_per_block} pages, "
            f"{launch.vmem_bytes / 2**20:.2f} of {chip.vmem_bytes / 2**20:.0f} MiB of vector memory",
        ]
        if call.query_rows is None:
            lines.append(f"sequences of one query row: {schedule.single_rows or 'tiles, as all others'}")
        return lines + copies_of_pages(layout, call.num_pages, program.scale)

    def work(
        self, program: Program, schedule: RaggedSchedule, call: Call, layout: PageLayout, seqs: Sequences
    ) -> tuple[Work, ...]:
        """Sequences of one row, where the decode kernel has them; then tiles."""
        chip, single_rows, found = self.target_chip, _single_rows(schedule, call), ()
        if single_rows is not None:
            of_many = dataclasses.replace(call, query_rows=None)
            found = self._decode.work(program, single_rows, of_many, layout, _alone(seqs))

        def listed(seqs: Sequences) -> WorkList:
            most = most_tiles(call.tokens, call.slots, schedule.rows_per_tile)
            tiles = self._tiles(program, schedule, call, layout, seqs, most)
            return tiles.work_list(schedule, slice(0, seqs.tables.shape[1]))

        tiles = f"tiles of up to {schedule.rows_per_tile} rows"
        return (*found, work_of(tiles, jax.jit(listed)(seqs), schedule, chip))

    def plan(
        self, program: Program, schedule: RaggedSchedule, call: Call, layout: PageLayout, seqs: Sequences
    ) -> RaggedLists | None:
        """The tiles with the pages that each visits, and the work list of single rows; None where no list is made."""
        chip, single_rows, tiled, single = self.target_chip, _single_rows(schedule, call), None, None
        with jax.enable_x64(False):  # as all that kernels are given
            if single_rows is not None:
                single = self._decode.plan_single_rows(program, single_rows, call, layout, _alone(seqs))
            if intervals_of(program, layout, call, schedule.rows_per_tile, chip) is None:
                tiled = self._work(program, schedule, call, layout, seqs)
        return None if tiled is None and single is None else RaggedLists(tiled, single)

    def run_state(
        self, program: Program, schedule: RaggedSchedule, call: Call, q: Array, pages: Pages, seqs: Sequences
    ) -> AttentionState:
        """`run_results` in float32, without sinks."""
        return self.run_results(program, schedule, call, STATE, q, pages, None, seqs).state

    def run_results(
        self,
        program: Program,
        schedule: RaggedSchedule,
        call: Call,
        wanted: Wanted,
        q: Array,
        pages: Pages,
        sinks: Array | None,
        seqs: Sequences,
    ) -> Results:
        """Tiles by the prefill kernel, and sequences of one row by the decode kernel where the schedule says so.

        The decode kernel writes the rows of its sequences, and the prefill kernel all others, into one array.
        """
        # With a static number of rows per sequence, all sequences go to one kernel.
        single_rows, single = _single_rows(schedule, call), None
        stored = dataclasses.replace(wanted, dtype=dtype_in_kernels(wanted.dtype))
        if single_rows is not None:
            single = self._decode.run_single_rows(program, single_rows, call, stored, q, pages, sinks, _alone(seqs))
        out, lse = self._tiled(program, schedule, call, stored, q, pages, sinks, seqs, single)
        return Results(out.astype(wanted.dtype), lse)

    def run_update_results(
        self,
        program: Program,
        schedule: RaggedSchedule,
        call: Call,
        wanted: Wanted,
        q: Array,
        k: Array,
        v: Array,
        pages: Pages,
        sinks: Array | None,
        seqs: Sequences,
    ) -> tuple[Results, Pages]:
        """The write, then the attention. No page is read before the kernels that write end."""
        pages = self.write(k, v, pages, seqs, call.query_rows)
        return self.run_results(program, schedule, call, wanted, q, pages, sinks, seqs), pages

    def _tiled(
        self,
        program: Program,
        schedule: RaggedSchedule,
        call: Call,
        wanted: Wanted,
        q: Array,
        pages: Pages,
        sinks: Array | None,
        seqs: Sequences,
        single: Results | None,
    ) -> Results:
        """The results of tiled sequences' rows and of rows of no sequence, beside ``single``, those of all others.

        Scalar memory limits how many tiles one kernel lists, and how many pages of each. Usually one kernel lists all.
        Else a loop runs it for some tiles at a time, and the states over some pages at a time are merged.
        """
        layout = pages.layout
        own = OwnOperands.of(seqs.own, OwnShape.of(seqs.own, program.has_ancestors))
        intervals = intervals_of(program, layout, call, schedule.rows_per_tile, self.target_chip)
        if intervals is not None:
            launch = self._launch(program, layout, call, schedule, wanted, seqs)
            first = None if single is None else _first(launch, call.tokens, single.out)
            uncut = Uncut(intervals, Batch.of(program, seqs), _least_rows(schedule, call))
            found = launch.results_of(launch(uncut, q, pages, sinks, first, own))
            return _with_own_lse(found, single, seqs, has_sinks=sinks is not None)
        per_kernel, slices = self._per_kernel(schedule, call, seqs.tables.shape[1])
        # Sinks enter once, after the last merge, and what is merged is float32.
        is_whole = len(slices) == 1
        of_slice, own_sinks = (wanted, sinks) if is_whole else (STATE, None)
        launch = self._launch(program, layout, call, schedule, of_slice, seqs)
        lists = planned(seqs)
        work = lists.tiled if lists else self._work(program, schedule, call, layout, seqs)
        # One kernel after the other writes into one array. What is merged of several has an array of its own.
        before, found = single.out if single is not None and is_whole else None, []

        def run(work: WorkList, rows: Rows | None) -> Rows:
            return launch(work, q, pages, own_sinks, rows, own)

        for i, entries in enumerate(slices):
            first = _first(launch, call.tokens, before)
            if isinstance(work, Listed):
                rows = _in_loop(run, schedule, entries, work, per_kernel, first)
            else:
                assert work is not None
                rows = run(work[i], None if before is None else first)
            found.append(launch.results_of(rows))
        if not is_whole:
            results = wanted.of(functools.reduce(merge, (results.state for results in found)), seqs, sinks)
            return _beside(single, results, seqs) if single else results
        return _with_own_lse(found[0], single, seqs, has_sinks=sinks is not None)

    def _per_kernel(self, schedule: RaggedSchedule, call: Call, width: int) -> tuple[int, list[slice]]:
        """How many tiles one kernel lists, and which of their ``width`` entries each kernel does."""
        most = most_tiles(call.tokens, call.slots, schedule.rows_per_tile)
        tiles, entries = rows_and_entries((most, width), self.target_chip)
        return tiles, [slice(first, min(first + entries, width)) for first in range(0, width, entries)]

    def _work(
        self, program: Program, schedule: RaggedSchedule, call: Call, layout: PageLayout, seqs: Sequences
    ) -> tuple[WorkList, ...] | Listed:
        """The work list of each kernel; or the tiles, if the kernels of some of these are a loop."""
        rows, (per_kernel, slices) = schedule.rows_per_tile, self._per_kernel(schedule, call, seqs.tables.shape[1])
        most = -(-most_tiles(call.tokens, call.slots, rows) // per_kernel) * per_kernel
        listed = self._tiles(program, schedule, call, layout, seqs, most)
        return listed if most > per_kernel else tuple(listed.work_list(schedule, entries) for entries in slices)

    def _tiles(
        self,
        program: Program,
        schedule: RaggedSchedule,
        call: Call,
        layout: PageLayout,
        seqs: Sequences,
        most: int,
    ) -> Listed:
        """``most`` tiles with the pages that each visits."""
        tiled = seqs.counts >= _least_rows(schedule, call)
        tiles = cut(seqs, tiled, call.tokens, schedule.rows_per_tile, most)
        return Listed.of(program, seqs, tiles, layout.page_size, call.num_pages)

    def _launch(
        self,
        program: Program,
        layout: PageLayout,
        call: Call,
        schedule: RaggedSchedule,
        wanted: Wanted,
        seqs: Sequences,
    ) -> PrefillLaunch:
        """The kernel for a batch with these sequences."""
        launch = launch_of(program, layout, call, schedule, self.target_chip, self.interpret, wanted)
        return dataclasses.replace(launch, own_shape=OwnShape.of(seqs.own, program.has_ancestors))

    @property
    def _decode(self) -> TpuDecode:
        return TpuDecode(chip=self.chip, interpret=self.interpret)


def _single_rows(schedule: RaggedSchedule, call: Call) -> DecodeSchedule | None:
    """The decode kernel's schedule for sequences of one row, if these do not go to the prefill kernel."""
    return schedule.single_rows if call.query_rows is None else None


def _least_rows(schedule: RaggedSchedule, call: Call) -> int:
    """How many rows a sequence of the prefill kernel has at least."""
    return 1 if _single_rows(schedule, call) is None else 2


def _alone(seqs: Sequences) -> Sequences:
    """The sequences of one row."""
    lists = planned(seqs)
    return seqs._replace(counts=(seqs.counts == 1).astype(jnp.int32), planned=lists.single if lists else None)


def _in_loop(
    run: Callable[[WorkList, Rows | None], Rows],
    schedule: RaggedSchedule,
    entries: slice,
    listed: Listed,
    per_kernel: int,
    first: Rows,
) -> Rows:
    """Results of all tiles, as the kernel writes them, in the memory of ``first``. Each run is for ``per_kernel``."""

    def run_some(i: Any, rows: Rows) -> Rows:
        return run(listed.sliced(i * per_kernel, per_kernel).work_list(schedule, entries), rows)

    live = jnp.sum(listed.visited.tiles.counts > 0, dtype=jnp.int32)
    return jax.lax.fori_loop(0, (live + per_kernel - 1) // per_kernel, run_some, first)


def _first(launch: PrefillLaunch, tokens: int, before: Array | None) -> Rows:
    """What rows hold before the kernel: it is kept from before, or some tile writes it."""
    first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), launch.rows(tokens))
    return first if before is None else first._replace(out=before)


def _with_own_lse(found: Results, single: Results | None, seqs: Sequences, has_sinks: bool) -> Results:
    """The results of a kernel that wrote beside ``single``, with the log-sum-exps of all rows."""
    out, lse = found if single is None else (found.out, _beside(single, found, seqs).lse)
    if lse is not None and has_sinks:
        # The kernel has put the sink into the log-sum-exp of every row that it has written.
        row, (first, end) = jnp.arange(out.shape[0], dtype=jnp.int32), owned(seqs)
        lse = jnp.where(((row >= first) & (row < end))[:, None], lse, -jnp.inf)
    return Results(out, lse)


def _beside(single: Results, others: Results, seqs: Sequences) -> Results:
    """The results of sequences of one row, and those of all other rows."""
    row = jnp.arange(others.out.shape[0], dtype=jnp.int32)[:, None]
    is_single = jnp.any((seqs.starts[None] == row) & (seqs.counts[None] == 1), axis=1)
    out = jnp.where(is_single[:, None, None], single.out, others.out)
    if single.lse is None or others.lse is None:
        return Results(out, None)
    return Results(out, jnp.where(is_single[:, None], single.lse, others.lse))


def _decode_call(call: Call) -> Call:
    """The call in which every slot decodes one row."""
    return dataclasses.replace(call, tokens=call.slots, query_rows=1, has_even_starts=True)


TPU_RAGGED = TpuRagged()
