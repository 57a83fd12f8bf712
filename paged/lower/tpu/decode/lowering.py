"""The TPU decode lowering: the state of a batch by one kernel, or by several if its work list is too long for one."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from paged.spec import AttentionState, PageLayout, Pages, merge

from ...base import Schedule
from ...program import Call, Program, Sequences
from ...xla import token_rows
from ..base import TpuLowering
from ..pages import TileVisits, WorkList, copies_of_pages, kernel_slices, pools_of
from ..write.granules import row_shape
from .launch import New
from .plan import alternatives, fits, launch_of, neighbours, plan_schedule, refuses_call, vmem_bytes
from .schedule import DecodeSchedule
from .update import Targets

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
        kernels = len(list(kernel_slices((call.slots, call.pages_per_seq), chip, schedule.kv_splits)))
        microseconds = 1e6 * bytes_visited / chip.hbm_bytes_per_second
        lines = [
            f"{kernels} kernel(s) on {chip.words}, each with {schedule.buffers} buffers of "
            f"{schedule.pages_per_block} pages, {mebibytes:.2f} of {chip.vmem_bytes / 2**20:.0f} MiB of vector memory",
            f"at least {microseconds:.1f} us for its transfers, modelled at {chip.hbm_bytes_per_second / 1e9:.0f} GB/s",
        ]
        entries = call.slots * call.pages_per_seq
        if entries >= _MANY_ENTRIES:
            lines.append(
                f"about {entries * _BYTES_PER_ENTRY / 2**20:.0f} MiB of device memory for the work lists of "
                f"{call.slots} x {call.pages_per_seq} table entries: narrower tables need less"
            )
        return lines + copies_of_pages(layout, call.num_pages, program.scale)

    def run_state(
        self, program: Program, schedule: DecodeSchedule, call: Call, q: Array, pages: Pages, seqs: Sequences
    ) -> AttentionState:
        """The state of sequences that have at most ``call.query_rows`` rows each."""
        layout = pages.layout
        launch = launch_of(program, layout, call, schedule, self.target_chip, self.interpret)
        visited = TileVisits.of(program, seqs, layout.page_size, pages.num_pages)
        states = []
        for rows, entries in kernel_slices(seqs.tables.shape, launch.chip, schedule.kv_splits):
            work = visited.work_list(rows, entries, **_division(schedule))
            states.append(_own_rows(launch(work, q, pages)[0], work, launch.views.query_rows))
        return functools.reduce(merge, states)

    def run_update(
        self,
        program: Program,
        schedule: DecodeSchedule,
        call: Call,
        q: Array,
        k: Array,
        v: Array,
        pages: Pages,
        seqs: Sequences,
    ) -> tuple[AttentionState, Pages]:
        """The write and the attention in one kernel.

        `write` goes first where a sequence is split, where one kernel cannot hold the lists of pages, and on chips with
        two cores: one core might read a page while the other writes it.
        """
        layout = pages.layout
        launch = launch_of(program, layout, call, schedule, self.target_chip, self.interpret)
        kernels = list(kernel_slices(seqs.tables.shape, launch.chip, schedule.kv_splits))
        if schedule.cores > 1 or schedule.kv_splits > 1 or len(kernels) > 1:
            pages = self.write(k, v, pages, seqs, call.query_rows)
            return self.run_state(program, schedule, call, q, pages, seqs), pages
        targets = Targets.of(seqs, call.query_rows or 1, layout.page_size, pages.num_pages)
        visited = TileVisits.of(program, seqs, layout.page_size, pages.num_pages)
        work = visited.work_list(*kernels[0], **_division(schedule))
        rows = tuple(
            x.astype(jnp.float32).reshape(call.tokens, *row_shape(layout, pool))
            for x, pool in zip(token_rows(k, v, pages), pools_of(layout), strict=True)
        )
        state, pages = launch(work, q, pages, New(targets, rows))
        return _own_rows(state, work, launch.views.query_rows), pages


def _own_rows(state: AttentionState, work: WorkList, most: int) -> AttentionState:
    """The state with the empty state in every row that the kernel has not written.

    It writes the rows of the work list's sequences, and at most ``most`` rows of each, whatever the batch says.
    """
    row, first, count = jnp.arange(state.out.shape[0])[:, None], work.row[None], jnp.minimum(work.rows, most)[None]
    is_own = jnp.any((row >= first) & (row < first + count), axis=1)
    out = jnp.where(is_own[:, None, None], state.out, 0.0)
    return AttentionState(out, jnp.where(is_own[:, None], state.lse, -jnp.inf))


def _division(schedule: DecodeSchedule) -> dict[str, int]:
    return {"splits": schedule.kv_splits, "pages_per_block": schedule.pages_per_block, "cores": schedule.cores}


TPU_DECODE = TpuDecode()
