"""The TPU lowering for prompts and mixed batches: many rows by the prefill kernel, single rows by the decode kernel."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged.spec import AttentionState, PageLayout, Pages, RaggedBatch, merge

from ...base import Schedule
from ...program import Call, Program, Sequences
from ..base import KernelRules, TpuLowering
from ..decode import TpuDecode
from ..pages import QueryTiles, Visited, Work, rows_and_entries
from ..transforms import state_with_gradient, update_with_gradient
from .launch import PrefillLaunch
from .plan import plan_prefill, prefill_alternatives, prefill_fits, prefill_launch_of, refuses_prefill
from .shape import most_tiles


@dataclasses.dataclass(frozen=True)
class TpuRagged(TpuLowering):
    """Prompts, chunks of them and batches of any mix on TPUs; every term that is elementwise, every page order."""

    rules: ClassVar[KernelRules] = KernelRules(refuses_prefill, plan_prefill, prefill_fits, prefill_alternatives)
    name: str = "tpu-ragged"
    choices: frozenset[str] = frozenset({"pages_per_block", "query_rows", "buffers", "cores"})

    def describe(
        self, program: Program, layout: PageLayout, call: Call, schedule: Schedule, bytes_visited: int
    ) -> list[str]:
        """Memory of the kernel, how many kernels there may be, and what decodes single rows."""
        chip = self.the_chip
        launch = prefill_launch_of(program, layout, call, schedule, chip)
        tiles = most_tiles(call.tokens, call.slots, schedule.query_rows)
        some, entries = rows_and_entries((tiles, call.pages_per_seq), schedule, chip)
        kernels = -(-tiles // some) * -(-call.pages_per_seq // entries)
        lines = [
            f"at most {kernels} kernel(s) on {chip.generation} for at most {tiles} tiles of {schedule.query_rows} "
            f"query rows, each with {schedule.buffers} buffers of {schedule.pages_per_block} pages, "
            f"{launch.vmem_bytes / 2**20:.2f} of {chip.vmem_bytes / 2**20:.0f} MiB of vector memory",
        ]
        if call.query_rows is None:
            decode = self._decode
            alone = _decode_call(call)
            lines.append(f"sequences of one row: {decode.schedule(program, layout, alone)}")
        return lines

    def state(
        self,
        program: Program,
        schedule: Schedule,
        q: Float[Array, "tokens q_heads head_dim"],
        pages: Pages,
        batch: RaggedBatch,
    ) -> AttentionState:
        """The batch's state in float32, without sinks. Its gradient is the XLA lowering's."""
        return state_with_gradient(_state, self, program, schedule, q, pages, batch)

    def update(
        self, program: Program, schedule: Schedule, q: Array, k: Array, v: Array, pages: Pages, batch: RaggedBatch
    ) -> tuple[AttentionState, Pages]:
        """The write, and when all of it is done, the attention: no page is read that is still to be written."""
        return update_with_gradient(_update, self, program, schedule, q, k, v, pages, batch)

    @property
    def _decode(self) -> TpuDecode:
        return TpuDecode(chip=self.chip, interpret=self.interpret)


def _state(
    lowering: TpuRagged, program: Program, schedule: Schedule, q: Array, pages: Pages, batch: RaggedBatch
) -> AttentionState:
    call = Call.of(q, pages, batch)
    seqs = Sequences.of(batch, call.tokens, pages.layout.page_size)
    launch = prefill_launch_of(program, pages.layout, call, schedule, lowering.the_chip, lowering.interpret)
    alone = _decode_call(call)
    decodes = call.query_rows is None and lowering._decode.refuses(program, pages.layout, alone) is None
    is_long = seqs.counts > 1 if decodes else seqs.counts > 0
    long = seqs._replace(counts=jnp.where(is_long, seqs.counts, 0))
    is_row = long.owner(call.tokens)[1]
    state = _prefill(launch, program, schedule, long, q, pages)
    out = jnp.where(is_row[:, None, None], state.out, 0.0)
    lse = jnp.where(is_row[:, None], state.lse, -jnp.inf)
    if decodes:
        single = _single_rows(lowering._decode, program, alone, seqs, q, pages)
        row = jnp.where(seqs.counts == 1, seqs.starts, call.tokens)
        out, lse = out.at[row].set(single.out, mode="drop"), lse.at[row].set(single.lse, mode="drop")
    return AttentionState(out, lse)


def _update(
    lowering: TpuRagged, program: Program, schedule: Schedule, q: Array, k: Array, v: Array, pages: Pages, batch: Any
) -> tuple[AttentionState, Pages]:
    pages = lowering.write(k, v, pages, batch)
    return _state(lowering, program, schedule, q, pages, batch), pages


def _prefill(
    launch: PrefillLaunch, program: Program, schedule: Schedule, seqs: Sequences, q: Array, pages: Pages
) -> AttentionState:
    """The state of sequences' rows; in other rows anything."""
    layout, width = pages.layout, seqs.tables.shape[1]
    most = most_tiles(q.shape[0], seqs.starts.shape[0], schedule.query_rows)
    some, entries = rows_and_entries((most, width), schedule, launch.chip)
    tiles = QueryTiles.cut(seqs, schedule.query_rows, -(-most // some) * some)
    visited = Visited.of(program, tiles, layout.page_size, pages.num_pages)
    rows, states = launch.rows_of(q), []
    for first in range(0, width, entries):
        cut = functools.partial(_work, schedule, slice(first, min(first + entries, width)))
        states.append(launch.state_of(_results(launch, cut, visited, some, rows, pages), pages))
    return functools.reduce(merge, states)


def _work(schedule: Schedule, entries: slice, visited: Visited) -> Work:
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
    return jax.lax.fori_loop(0, (live + some - 1) // some, one, launch.empty(rows))


def _single_rows(
    decode: TpuDecode, program: Program, call: Call, seqs: Sequences, q: Array, pages: Pages
) -> AttentionState:
    """The state of the sequences of one row, one row a slot; of others the empty state."""
    row = jnp.minimum(seqs.starts, q.shape[0] - 1)
    lengths = jnp.where(seqs.counts == 1, seqs.lengths, 0)
    batch = RaggedBatch.decode(lengths, seqs.tables)
    schedule = decode.schedule(program, pages.layout, call)
    return decode.state(program, schedule, q[row], pages, batch)


def _decode_call(call: Call) -> Call:
    """The call in which every slot decodes one row."""
    return dataclasses.replace(call, tokens=call.slots, query_rows=1)


TPU_RAGGED = TpuRagged()
