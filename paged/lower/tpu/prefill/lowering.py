"""The TPU lowering for prompts and mixed batches: many rows by the prefill kernel, single rows by the decode kernel."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged.spec import AttentionState, PageLayout, Pages, RaggedBatch, merge

from ...base import Schedule
from ...program import COMMON, Call, Program, Sequences
from ..base import TpuLowering
from ..decode import DecodeSchedule, TpuDecode
from ..pages import QueryTiles, Visited, Work, rows_and_entries
from ..transforms import state_with_gradient, update_with_gradient
from .launch import PrefillLaunch
from .plan import alternatives, fits, launch_of, plan_schedule, refuses_call
from .schedule import RaggedSchedule
from .shape import most_tiles


@dataclasses.dataclass(frozen=True)
class TpuRagged(TpuLowering):
    """Prompts, chunks of them and batches of any mix on TPUs; every term that is elementwise, every page order."""

    schedule_type: ClassVar[type[Schedule]] = RaggedSchedule

    def _refuses_call(self, program: Program, layout: PageLayout, call: Call) -> str | None:
        return refuses_call(program, layout, call, self.target_chip)

    def schedule(self, program: Program, layout: PageLayout, call: Call | None = None) -> RaggedSchedule:
        """What fits the chip, with tiles of rows enough for the matrix units; and decode's own for single rows."""
        call = call or dataclasses.replace(COMMON, query_rows=None)
        own = plan_schedule(program, layout, call, self.target_chip)
        alone = _decode_call(call)
        if call.query_rows is not None or self._decode.refuses(program, layout, alone) is not None:
            return own
        return own.replace(single_rows=self._decode.schedule(program, layout, alone))

    def cannot_honour(self, program: Program, layout: PageLayout, call: Call, schedule: RaggedSchedule) -> str | None:
        """A schedule must fit the chip's memory, and have no more cores than it; so must that of single rows."""
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
        """Half and twice as much of each field; single rows stay with their schedule."""
        del program, call
        return alternatives(layout, own)

    def describe(
        self, program: Program, layout: PageLayout, call: Call, schedule: RaggedSchedule, bytes_visited: int
    ) -> list[str]:
        """Memory of the kernel, how many kernels there may be, and what decodes single rows."""
        chip = self.target_chip
        launch = launch_of(program, layout, call, schedule, chip)
        tiles = most_tiles(call.tokens, call.slots, schedule.rows_per_tile)
        some, entries = rows_and_entries((tiles, call.pages_per_seq), chip)
        kernels = -(-tiles // some) * -(-call.pages_per_seq // entries)
        lines = [
            f"at most {kernels} kernel(s) on {chip.generation} for at most {tiles} tiles of {schedule.rows_per_tile} "
            f"query rows, each with {schedule.buffers} buffers of {schedule.pages_per_block} pages, "
            f"{launch.vmem_bytes / 2**20:.2f} of {chip.vmem_bytes / 2**20:.0f} MiB of vector memory",
        ]
        return lines

    def state(
        self,
        program: Program,
        schedule: RaggedSchedule,
        q: Float[Array, "tokens q_heads head_dim"],
        pages: Pages,
        batch: RaggedBatch,
    ) -> AttentionState:
        """The batch's state in float32, without sinks. Its gradient is the XLA lowering's."""
        return state_with_gradient(_state, self, program, schedule, q, pages, batch)

    def update(
        self, program: Program, schedule: RaggedSchedule, q: Array, k: Array, v: Array, pages: Pages, batch: RaggedBatch
    ) -> tuple[AttentionState, Pages]:
        """The write, and when all of it is done, the attention: no page is read that is still to be written."""
        return update_with_gradient(_update, self, program, schedule, q, k, v, pages, batch)

    @property
    def _decode(self) -> TpuDecode:
        return TpuDecode(chip=self.chip, interpret=self.interpret)


def _state(
    lowering: TpuRagged, program: Program, schedule: RaggedSchedule, q: Array, pages: Pages, batch: RaggedBatch
) -> AttentionState:
    call = Call.of(q, pages, batch)
    seqs = Sequences.of(batch, call.tokens, pages.layout.page_size)
    launch = launch_of(program, pages.layout, call, schedule, lowering.target_chip, lowering.interpret)
    decoded = schedule.single_rows if call.query_rows is None else None
    is_long = seqs.counts > 0 if decoded is None else seqs.counts > 1
    long = seqs._replace(counts=jnp.where(is_long, seqs.counts, 0))
    is_row = long.owner(call.tokens)[1]
    state = _prefill(launch, program, schedule, long, q, pages)
    out = jnp.where(is_row[:, None, None], state.out, 0.0)
    lse = jnp.where(is_row[:, None], state.lse, -jnp.inf)
    if decoded is not None:
        single = _single_rows(lowering._decode, program, decoded, seqs, q, pages)
        row = jnp.where(seqs.counts == 1, seqs.starts, call.tokens)
        out, lse = out.at[row].set(single.out, mode="drop"), lse.at[row].set(single.lse, mode="drop")
    return AttentionState(out, lse)


def _update(
    lowering: TpuRagged,
    program: Program,
    schedule: RaggedSchedule,
    q: Array,
    k: Array,
    v: Array,
    pages: Pages,
    batch: Any,
) -> tuple[AttentionState, Pages]:
    pages = lowering.write(k, v, pages, batch)
    return _state(lowering, program, schedule, q, pages, batch), pages


def _prefill(
    launch: PrefillLaunch, program: Program, schedule: RaggedSchedule, seqs: Sequences, q: Array, pages: Pages
) -> AttentionState:
    """The state of sequences' rows; in other rows anything."""
    layout, width = pages.layout, seqs.tables.shape[1]
    most = most_tiles(q.shape[0], seqs.starts.shape[0], schedule.rows_per_tile)
    some, entries = rows_and_entries((most, width), launch.chip)
    tiles = QueryTiles.cut(seqs, schedule.rows_per_tile, -(-most // some) * some)
    visited = Visited.of(program, tiles, layout.page_size, pages.num_pages)
    rows, states = launch.lay_out(q), []
    for first in range(0, width, entries):
        cut = functools.partial(_work, schedule, slice(first, min(first + entries, width)))
        states.append(launch.state_of(_results(launch, cut, visited, some, rows, pages), pages))
    return functools.reduce(merge, states)


def _work(schedule: RaggedSchedule, entries: slice, visited: Visited) -> Work:
    cut = {"pages_per_block": schedule.pages_per_block, "cores": schedule.cores}
    return visited.work(slice(None), entries, splits=1, **cut)


def _results(
    launch: PrefillLaunch, cut: Callable[[Visited], Work], visited: Visited, some: int, rows: Array, pages: Pages
) -> Array:
    """Results of all tiles, by a kernel for every ``some`` of them that has any to do."""
    if visited.page.shape[0] == some:
        return launch(cut(visited), rows, pages)

    def one(i: Any, results: Array) -> Array:
        return launch(cut(visited.part(i * some, some)), rows, pages, results)

    live = jnp.sum(visited.tiles.counts > 0, dtype=jnp.int32)
    return jax.lax.fori_loop(0, (live + some - 1) // some, one, launch.empty_results(rows))


def _single_rows(
    decode: TpuDecode, program: Program, schedule: DecodeSchedule, seqs: Sequences, q: Array, pages: Pages
) -> AttentionState:
    """The state of the sequences of one row, one row a slot; of others the empty state."""
    row = jnp.minimum(seqs.starts, q.shape[0] - 1)
    lengths = jnp.where(seqs.counts == 1, seqs.lengths, 0)
    batch = RaggedBatch.decode(lengths, seqs.tables)
    return decode.state(program, schedule, q[row], pages, batch)


def _decode_call(call: Call) -> Call:
    """The call in which every slot decodes one row."""
    return dataclasses.replace(call, tokens=call.slots, query_rows=1)


TPU_RAGGED = TpuRagged()
