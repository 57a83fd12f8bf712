"""The TPU decode lowering: the state of a batch by one kernel, or by several if its work list is too long for one."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from paged.spec import AttentionState, PageLayout, Pages, merge

from ...base import Schedule
from ...program import Call, Program, Results, Sequences, Wanted
from ...work import Work
from ..base import STATE, TpuLowering, work_of
from ..pages import Brought, PageTables, TileVisits, WorkList, copies_of_pages, kernel_slices
from .launch import DecodeLaunch, New, Tables
from .plan import (
    alternatives,
    fits,
    intervals_of,
    kernels_of,
    launch_of,
    neighbours,
    plan_schedule,
    refuses_call,
    slots_per_kernel,
    vmem_bytes,
)
from .schedule import DecodeSchedule
from .update import Targets, new_rows

# What XLA needs while it makes the work lists (compiled, v5e and v6e, 256 sequences of 512 to 8192 entries), and from
# how many entries on `explain` says so.
_BYTES_PER_ENTRY, _MANY_ENTRIES = 66, 2**18


@dataclasses.dataclass(frozen=True)
class TpuDecode(TpuLowering):
    """Decode on TPUs: one query row per sequence, or a few, the same number for all.

    The kernel accepts every page order, and every term that is elementwise in positions.
    """

    schedule_type: ClassVar[type[Schedule]] = DecodeSchedule

    def _refuses_call(self, program: Program, layout: PageLayout, call: Call) -> str | None:
        return refuses_call(program, layout, call, self.target_chip)

    def schedule(self, program: Program, layout: PageLayout, call: Call | None = None) -> DecodeSchedule:
        """A schedule that fits the chip, with page blocks large enough to hide copies behind work."""
        return plan_schedule(program, layout, call, self.target_chip)

    def cannot_honour(self, program: Program, layout: PageLayout, call: Call, schedule: DecodeSchedule) -> str | None:
        """Why a schedule does not fit the chip's memory, its cores or the block tables, or None."""
        return fits(program, layout, call, schedule, self.target_chip)

    def alternatives(
        self, program: Program, layout: PageLayout, call: Call, own: DecodeSchedule
    ) -> Iterator[DecodeSchedule]:
        """Half and twice as much of each field."""
        del program, layout
        return alternatives(call, own)

    def neighbours(self, layout: PageLayout, call: Call, asked: DecodeSchedule) -> Iterator[DecodeSchedule]:
        """Smaller page blocks and fewer buffers."""
        del layout
        return neighbours(call, asked, self.target_chip)

    def describe(
        self, program: Program, layout: PageLayout, call: Call, schedule: DecodeSchedule, bytes_visited: int
    ) -> list[str]:
        """Memory of the kernel, how many kernels there are, the time of its transfers alone, and copies by XLA."""
        chip, mebibytes = self.target_chip, vmem_bytes(program, layout, call, schedule) / 2**20
        has_lists = intervals_of(program, layout, call, schedule, chip) is None
        kernels = kernels_of(program, layout, call, schedule, chip)
        microseconds = 1e6 * bytes_visited / chip.hbm_bytes_per_second
        lines = [
            f"{kernels} kernel(s) on {chip.words}, each with {schedule.buffers} buffers of "
            f"{schedule.pages_per_block} pages, {mebibytes:.2f} of {chip.vmem_bytes / 2**20:.0f} MiB of vector memory",
            f"at least {microseconds:.1f} us for its transfers, modelled at {chip.hbm_bytes_per_second / 1e9:.0f} GB/s",
        ]
        entries = call.slots * call.pages_per_seq
        if has_lists and entries >= _MANY_ENTRIES:
            lines.append(
                f"about {entries * _BYTES_PER_ENTRY / 2**20:.0f} MiB of device memory for the work lists of "
                f"{call.slots} x {call.pages_per_seq} table entries: narrower tables need less"
            )
        return lines + copies_of_pages(layout, call.num_pages, program.scale)

    def plan(
        self, program: Program, schedule: DecodeSchedule, call: Call, layout: PageLayout, seqs: Sequences
    ) -> "DecodeLists | None":
        """The work list of each kernel, and where new rows go; None where the scalar core finds them by itself."""
        chip = self.target_chip
        if intervals_of(program, layout, call, schedule, chip) is not None:
            return None
        launch = launch_of(program, layout, call, schedule, chip, self.interpret)
        with jax.enable_x64(False):  # as all that kernels are given
            works = tuple(_lists(launch, call.num_pages, seqs))
            return DecodeLists(works, Targets.of(seqs, launch.views.query_rows, layout.page_size, call.num_pages))

    def work(
        self, program: Program, schedule: DecodeSchedule, call: Call, layout: PageLayout, seqs: Sequences
    ) -> tuple[Work, ...]:
        """The items of each kernel. The scalar core computes the same from intervals, where there is no list."""
        launch = launch_of(program, layout, call, schedule, self.target_chip, self.interpret)
        words = "sequences" if schedule.kv_splits == 1 else f"sequences in {schedule.kv_splits} KV splits"
        lists = jax.jit(lambda seqs: tuple(_lists(launch, call.num_pages, seqs)))(seqs)
        return tuple(work_of(words, one, schedule, self.target_chip, schedule.kv_splits) for one in lists)

    def run_state(
        self, program: Program, schedule: DecodeSchedule, call: Call, q: Array, pages: Pages, seqs: Sequences
    ) -> AttentionState:
        """The state of sequences that have at most ``call.query_rows`` rows each."""
        return self.run_results(program, schedule, call, STATE, q, pages, None, seqs).state

    def run_results(
        self,
        program: Program,
        schedule: DecodeSchedule,
        call: Call,
        wanted: Wanted,
        q: Array,
        pages: Pages,
        sinks: Array | None,
        seqs: Sequences,
    ) -> Results:
        """The results of sequences that have at most ``call.query_rows`` rows each."""
        layout, chip = pages.layout, self.target_chip
        launch = launch_of(program, layout, call, schedule, chip, self.interpret)
        intervals = intervals_of(program, layout, call, schedule, chip)
        if intervals is None:
            return _of_lists(launch, wanted, q, pages, sinks, seqs)
        parts, slots, rows = [], slots_per_kernel(program, call, schedule, chip), launch.views.query_rows
        # Usually one kernel, and nothing is cut or joined.
        for first in range(0, call.slots, slots):
            part, q_part = _slots(seqs, first, slots, rows), q[first * rows : (first + slots) * rows]
            work = Tables(intervals, PageTables.of(part, Brought.of(program, part, rows, are_even=True)))
            parts.append(_finished(launch, work, wanted, q_part, pages, sinks, part)[0])
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

    def run_single_rows(
        self,
        program: Program,
        schedule: DecodeSchedule,
        call: Call,
        wanted: Wanted,
        q: Array,
        pages: Pages,
        sinks: Array | None,
        seqs: Sequences,
    ) -> Results:
        """The results of sequences that have one row, which may be any row of ``q``. Other sequences have no rows.

        Rows of ``q`` that no sequence has hold anything, so that somebody else can write them in place.
        """
        layout, chip = pages.layout, self.target_chip
        of_slots, launch = self._of_single_rows(program, schedule, call, layout)
        if schedule.kv_splits > 1 or kernels_of(program, layout, of_slots, schedule, chip) > 1:
            return _of_lists(launch, wanted, q, pages, sinks, seqs)
        intervals = intervals_of(program, layout, of_slots, schedule, chip)
        if intervals is None:
            lists = _planned(seqs)
            work = lists.works[0] if lists else next(iter(_lists(launch, pages.num_pages, seqs)))
        else:
            brought = Brought.of(program, seqs, 1, are_even=False)
            work = Tables(intervals, PageTables.of(seqs, brought, has_even_rows=False))
        return launch(work, q, pages, wanted, sinks)[0]

    def plan_single_rows(
        self, program: Program, schedule: DecodeSchedule, call: Call, layout: PageLayout, seqs: Sequences
    ) -> "DecodeLists | None":
        """The work lists of `run_single_rows`; None where the scalar core finds the pages by itself."""
        of_slots, launch = self._of_single_rows(program, schedule, call, layout)
        is_listed = schedule.kv_splits > 1 or kernels_of(program, layout, of_slots, schedule, self.target_chip) > 1
        if not is_listed and intervals_of(program, layout, of_slots, schedule, self.target_chip) is not None:
            return None
        return DecodeLists(tuple(_lists(launch, call.num_pages, seqs)), None)

    def _of_single_rows(
        self, program: Program, schedule: DecodeSchedule, call: Call, layout: PageLayout
    ) -> tuple[Call, DecodeLaunch]:
        """The call in which every slot has one row, and the kernel for such rows anywhere among the batch's."""
        of_slots = dataclasses.replace(call, tokens=call.slots, query_rows=1, has_even_starts=True)
        launch = launch_of(program, layout, of_slots, schedule, self.target_chip, self.interpret)
        return of_slots, dataclasses.replace(launch, has_even_rows=False)

    def run_update_results(
        self,
        program: Program,
        schedule: DecodeSchedule,
        call: Call,
        wanted: Wanted,
        q: Array,
        k: Array,
        v: Array,
        pages: Pages,
        sinks: Array | None,
        seqs: Sequences,
    ) -> tuple[Results, Pages]:
        """The write and the attention in one kernel.

        `write` goes first where a sequence is split, where one kernel cannot hold the lists of pages, and on chips with
        two cores: one core might read a page while the other writes it.
        """
        layout, chip = pages.layout, self.target_chip
        launch = launch_of(program, layout, call, schedule, chip, self.interpret)
        if schedule.cores > 1 or schedule.kv_splits > 1 or kernels_of(program, layout, call, schedule, chip) > 1:
            pages = self.write(k, v, pages, seqs, call.query_rows)
            return self.run_results(program, schedule, call, wanted, q, pages, sinks, seqs), pages
        intervals = intervals_of(program, layout, call, schedule, chip)
        if intervals is not None:
            brought = Brought.of(program, seqs, launch.views.query_rows, are_even=True)
            work, targets = Tables(intervals, PageTables.of(seqs, brought)), None
        else:
            lists = _planned(seqs)
            work = lists.works[0] if lists else next(iter(_lists(launch, pages.num_pages, seqs)))
            rows, size = launch.views.query_rows, layout.page_size
            targets = lists.targets if lists else Targets.of(seqs, rows, size, pages.num_pages)
        return _finished(launch, work, wanted, q, pages, sinks, seqs, New(targets, new_rows(k, v, pages)))


def _slots(seqs: Sequences, first: int, slots: int, rows: int) -> Sequences:
    """The sequences in so many slots from slot ``first`` on, and their rows, ``rows`` of each, as those of a batch."""

    def of_slots(sequences: Any, per_slot: int = 1) -> Any:
        return jax.tree.map(lambda x: x[first * per_slot : (first + slots) * per_slot], sequences)

    if first == 0 and slots >= seqs.starts.shape[0]:
        return seqs
    part = of_slots(seqs._replace(own=None, planned=None))
    return part._replace(starts=part.starts - first * rows, own=of_slots(seqs.own, rows))


def _of_lists(
    launch: DecodeLaunch, wanted: Wanted, q: Array, pages: Pages, sinks: Array | None, seqs: Sequences
) -> Results:
    """The results by work lists, of which scalar memory may not hold all at once."""
    planned = _planned(seqs)
    lists = planned.works if planned else tuple(_lists(launch, pages.num_pages, seqs))
    if len(lists) == 1:
        return _finished(launch, lists[0], wanted, q, pages, sinks, seqs)[0]
    states = [_own_rows(launch(work, q, pages, STATE)[0].state, work, launch.views.query_rows) for work in lists]
    return wanted.of(functools.reduce(merge, states), seqs, sinks)


class DecodeLists(NamedTuple):
    """What a step's calls share: the work list of each kernel, and where new rows go if the kernel writes them."""

    works: tuple[WorkList, ...]
    targets: Targets | None

    def moved(self, first_page: Any) -> "DecodeLists":
        """The lists for pages that lie ``first_page`` pages further on in the pool."""
        works = tuple(work._replace(page=work.page + first_page) for work in self.works)
        if self.targets is None:
            return DecodeLists(works, None)
        page = self.targets.page
        return DecodeLists(works, self.targets._replace(page=jnp.where(page < 0, -1, page + first_page)))


def _planned(seqs: Sequences) -> DecodeLists | None:
    return seqs.planned if isinstance(seqs.planned, DecodeLists) else None


def _lists(launch: DecodeLaunch, num_pages: int, seqs: Sequences) -> Iterator[WorkList]:
    """The work list of each kernel."""
    program, schedule, rows_per_slot = launch.program, launch.schedule, launch.views.query_rows
    brought = Brought.of(program, seqs, rows_per_slot, launch.has_even_rows)
    if launch.has_even_rows:
        # Slots that are not live have rows too, of which the kernel writes the results.
        starts = rows_per_slot * jnp.arange(seqs.starts.shape[0], dtype=jnp.int32)
        seqs = seqs._replace(starts=starts)
    visited = TileVisits.of(program, seqs, launch.views.layout.page_size, num_pages, brought)
    for rows, entries in kernel_slices(seqs.tables.shape, launch.chip, schedule.kv_splits, brought.per_seq):
        yield visited.work_list(
            rows,
            entries,
            splits=schedule.kv_splits,
            pages_per_block=schedule.pages_per_block,
            cores=schedule.cores,
        )


def _finished(
    launch: DecodeLaunch,
    work: WorkList | Tables,
    wanted: Wanted,
    q: Array,
    pages: Pages,
    sinks: Array | None,
    seqs: Sequences,
    new: New | None = None,
) -> tuple[Results, Pages]:
    """The results of one kernel that does all work of the sequences, as they are wanted, and the pages."""
    if launch.has_even_rows and launch.schedule.kv_splits == 1:
        results, pages = launch(work, q, pages, wanted, sinks, new)
        return Results(results.out.astype(wanted.dtype), results.lse), pages
    results, pages = launch(work, q, pages, STATE, None, new)
    state = results.state
    if isinstance(work, WorkList):
        state = _own_rows(state, work, launch.views.query_rows)
    return wanted.of(state, seqs, sinks), pages


def _own_rows(state: AttentionState, work: WorkList, most: int) -> AttentionState:
    """The state with the empty state in every row that the kernel has not written.

    It writes the rows of the work list's sequences, and at most ``most`` rows of each, whatever the batch says.
    """
    row, first, count = jnp.arange(state.out.shape[0])[:, None], work.row[None], jnp.minimum(work.rows, most)[None]
    is_own = jnp.any((row >= first) & (row < first + count), axis=1)
    out = jnp.where(is_own[:, None, None], state.out, 0.0)
    return AttentionState(out, jnp.where(is_own[:, None], state.lse, -jnp.inf))


TPU_DECODE = TpuDecode()
