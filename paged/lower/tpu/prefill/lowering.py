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
from ...program import COMMON, Call, Program, Sequences
from ..base import TpuLowering
from ..decode import TpuDecode
from ..pages import TileVisits, WorkList, copies_of_pages, rows_and_entries
from .launch import PrefillLaunch
from .plan import alternatives, fits, launch_of, neighbours, plan_schedule, refuses_call
from .schedule import RaggedSchedule
from .shape import most_tiles


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
        lines = [
            f"at most {kernels} kernel(s) on {chip.words} for at most {tiles} tiles of {schedule.rows_per_tile} "
            f"query rows, each with {schedule.buffers} buffers of {schedule.pages_per_block} pages, "
            f"{launch.vmem_bytes / 2**20:.2f} of {chip.vmem_bytes / 2**20:.0f} MiB of vector memory",
        ]
        if call.query_rows is None:
            lines.append(f"sequences of one query row: {schedule.single_rows or 'tiles, as all others'}")
        return lines + copies_of_pages(layout, call.num_pages, program.scale)

    def run_state(
        self, program: Program, schedule: RaggedSchedule, call: Call, q: Array, pages: Pages, seqs: Sequences
    ) -> AttentionState:
        """Tiles by the prefill kernel, and sequences of one row by the decode kernel where the schedule says so."""
        launch = launch_of(program, pages.layout, call, schedule, self.target_chip, self.interpret)
        # With a static number of rows per sequence, all sequences go to one kernel.
        single_rows = schedule.single_rows if call.query_rows is None else None
        is_tiled = seqs.counts > 0 if single_rows is None else seqs.counts > 1
        tiled = seqs._replace(counts=jnp.where(is_tiled, seqs.counts, 0))
        has_tile = tiled.owner(call.tokens)[1]
        state = _state_of_tiles(launch, tiled, q, pages)
        out = jnp.where(has_tile[:, None, None], state.out, 0.0)
        lse = jnp.where(has_tile[:, None], state.lse, -jnp.inf)
        if single_rows is not None:
            # The decode kernel is given one row for every slot. Slots with another number of rows see no key there, and
            # what it computes for them is dropped.
            is_single = seqs.counts == 1
            decoded = seqs._replace(
                starts=jnp.arange(call.slots, dtype=jnp.int32),
                counts=jnp.ones_like(seqs.counts),
                lengths=jnp.where(is_single, seqs.lengths, 0),
            )
            q_of_slots = q[jnp.minimum(seqs.starts, call.tokens - 1)]
            single = self._decode.run_state(program, single_rows, _decode_call(call), q_of_slots, pages, decoded)
            row = jnp.where(is_single, seqs.starts, call.tokens)
            out, lse = out.at[row].set(single.out, mode="drop"), lse.at[row].set(single.lse, mode="drop")
        return AttentionState(out, lse)

    @property
    def _decode(self) -> TpuDecode:
        return TpuDecode(chip=self.chip, interpret=self.interpret)


def _state_of_tiles(launch: PrefillLaunch, seqs: Sequences, q: Array, pages: Pages) -> AttentionState:
    """The state of the sequences' query rows by the prefill kernel. Other rows hold anything.

    Scalar memory limits how many tiles one kernel lists, and how many pages of each. Usually one kernel lists all. Else
    a loop runs it for some tiles at a time, and the states over some pages at a time are merged.
    """
    schedule, layout, width = launch.schedule, pages.layout, seqs.tables.shape[1]
    most = most_tiles(q.shape[0], seqs.starts.shape[0], schedule.rows_per_tile)
    tiles_per_kernel, entries_per_kernel = rows_and_entries((most, width), launch.chip)
    tiles = seqs.cut(schedule.rows_per_tile, -(-most // tiles_per_kernel) * tiles_per_kernel)
    visited = TileVisits.of(launch.program, tiles, layout.page_size, pages.num_pages)
    laid_out, states = launch.lay_out(q), []
    for first in range(0, width, entries_per_kernel):
        entries = slice(first, min(first + entries_per_kernel, width))
        work_of = functools.partial(_work, schedule, entries)
        results = _results(launch, work_of, visited, tiles_per_kernel, laid_out, pages)
        states.append(launch.state_of(results, pages))
    return functools.reduce(merge, states)


def _work(schedule: RaggedSchedule, entries: slice, visited: TileVisits) -> WorkList:
    """The work list for all tiles of ``visited``, over a range of their entries."""
    return visited.work_list(
        slice(None), entries, splits=1, pages_per_block=schedule.pages_per_block, cores=schedule.cores
    )


def _results(
    launch: PrefillLaunch,
    work_of: Callable[[TileVisits], WorkList],
    visited: TileVisits,
    tiles_per_kernel: int,
    q: Array,
    pages: Pages,
) -> Array:
    """Results of all tiles, as the kernel writes them. Each run of the kernel is for ``tiles_per_kernel`` tiles."""
    if visited.visits.page.shape[0] == tiles_per_kernel:
        return launch(work_of(visited), q, pages)

    def run(i: Any, results: Array) -> Array:
        return launch(work_of(visited.sliced(i * tiles_per_kernel, tiles_per_kernel)), q, pages, results)

    live = jnp.sum(visited.tiles.counts > 0, dtype=jnp.int32)
    return jax.lax.fori_loop(0, (live + tiles_per_kernel - 1) // tiles_per_kernel, run, launch.empty_results(q))


def _decode_call(call: Call) -> Call:
    """The call in which every slot decodes one row."""
    return dataclasses.replace(call, tokens=call.slots, query_rows=1)


TPU_RAGGED = TpuRagged()
