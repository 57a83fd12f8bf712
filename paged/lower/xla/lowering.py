"""The XLA lowering: what it accepts, its schedule, and how a batch is cut into phases."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from paged.spec import AttentionState, PageLayout, Pages, merge

from ..base import Lowering, Schedule
from ..gpu_targets import GPU_TARGETS
from ..jax_version import vary_alike, varying_axes
from ..program import COMMON, Call, PageCopies, Program, Sequences, at_most, page_coverage, plain_terms
from ..work import Work, items_of, with_pages
from .alternatives import alternatives
from .blocks import RowBlocks
from .copy import copy_pages
from .cpu import FEW_ROWS
from .derivatives import attend
from .lists import XlaLists, with_visits
from .places import Places
from .schedule import AT_ONCE, XlaSchedule
from .sizes import at_once_schedule, described, most_row_blocks, walk_sizes
from .walk import Operands, Walk
from .write import write

# JAX's names for GPUs: as a backend, and as the platforms that a program is lowered for.
GPU_PLATFORMS = ("gpu", "cuda", "rocm")


@dataclasses.dataclass(frozen=True)
class XlaBlocks(Lowering):
    """Decode, prefill and ragged batches on any platform: every term, page order and dtype, and gradients.

    ``platform`` is whose heuristic proposes schedules, by JAX's name; None for that of this process.
    """

    platform: str | None = None

    target: ClassVar[str] = "xla"
    generations: ClassVar[dict[str, tuple[str, ...]]] = {name: gpu.device_kinds for name, gpu in GPU_TARGETS.items()}
    schedule_type: ClassVar[type[Schedule]] = XlaSchedule

    def on_chip(self, generation: Any) -> "XlaBlocks":
        """This lowering with the heuristic for GPUs, if the chip is one."""
        name = getattr(generation, "generation", generation)
        return dataclasses.replace(self, platform="cuda") if name in GPU_TARGETS else self

    def refuses(self, program: Program, layout: PageLayout, call: Call | None = None) -> str | None:
        """None: every valid spec over every valid layout runs on XLA."""
        del program, layout, call
        return None

    def schedule(self, program: Program, layout: PageLayout, call: Call | None = None) -> XlaSchedule:
        """By platform.

        On GPUs: the form ``"at_once"``, in steps of as many tiles as a bound on memory allows (`sizes`; compiled, not
        measured). On CPU: one row block at a time, and page blocks of 128 tokens, four per step. With all heads such a
        block stays in a core's cache while it is used (measured: benchmarks/xla_cpu). Elsewhere: many row blocks at
        once, to fill the machine, and larger page blocks, to take fewer steps (not measured).
        """
        platform = self.platform or jax.default_backend()
        if platform in GPU_PLATFORMS:
            return at_once_schedule(program, layout, call or COMMON)
        is_cpu = platform == "cpu"
        return XlaSchedule(
            pages_per_block=max(1, (128 if is_cpu else 256) // layout.page_size),
            rows_per_tile=64 if is_cpu else 128,
            row_blocks_at_once=1 if is_cpu else 32,
            blocks_per_step=4 if is_cpu else 1,
        )

    def cannot_honour(self, program: Program, layout: PageLayout, call: Call, schedule: XlaSchedule) -> str | None:
        """The form ``"at_once"`` takes one page block per step."""
        del program, layout, call
        if schedule.form == AT_ONCE and schedule.blocks_per_step > 1:
            return f'in form="at_once" blocks_per_step is 1; got {schedule.blocks_per_step}.'
        return None

    def alternatives(self, program: Program, layout: PageLayout, call: Call, own: XlaSchedule) -> Iterator[XlaSchedule]:
        """Sizes around the heuristic's, in the fields that matter in this call."""
        return alternatives(program, layout, call, own)

    def describe(
        self, program: Program, layout: PageLayout, call: Call, schedule: XlaSchedule, bytes_visited: int
    ) -> list[str]:
        """In the form ``"at_once"``: how many steps, and their memory."""
        del bytes_visited
        return described(program, layout, call, schedule) if schedule.form == AT_ONCE else []

    def state(
        self,
        program: Program,
        schedule: XlaSchedule,
        call: Call,
        q: Float[Array, "tokens q_heads head_dim"],
        pages: Pages,
        seqs: Sequences,
    ) -> AttentionState:
        """The state of every query row in float32, without sinks."""
        states, size, lists = [], pages.layout.page_size, _lists(seqs)
        at_once, pages_per_block = schedule.row_blocks_at_once, schedule.pages_per_block
        for i, (rows, is_member) in enumerate(_phases(schedule, call, seqs)):
            blocks = lists.phases[i] if lists else _row_blocks(schedule, call, seqs, rows, is_member)
            if schedule.form == AT_ONCE:
                at_once, pages_per_block = walk_sizes(program, pages.layout, call, schedule, rows)
            keys = pages_per_block * size
            shape = program.num_kv_heads, program.group * rows, keys
            terms = plain_terms(program, *shape)
            q, pages, own, blocks, _ = vary_alike(q, pages, seqs._replace(planned=None), blocks, terms.early())
            if varying_axes(q):
                terms = plain_terms(program, *shape, like=q)
            blocks_per_step = schedule.blocks_per_step if program.group * rows <= FEW_ROWS else 1
            walk = Walk(program, terms, rows, pages_per_block, blocks_per_step, at_once, schedule.form)
            states.append(attend(walk, Operands(q, pages, terms.early(), own, blocks)))
        # Each row belongs to one phase; in the other it is the empty state, so that the merge is exact.
        return states[0] if len(states) == 1 else merge(*states)

    def write(self, k: Array, v: Array, pages: Pages, seqs: Sequences, query_rows: int | None) -> Pages:
        """One scatter, or on CPU a loop over the rows."""
        del query_rows
        lists, layout = _lists(seqs), pages.layout
        places = lists.places if lists else Places.of(seqs, k.shape[0], layout.page_size, pages.num_pages)
        return write(k, v, pages, places)

    def copy(self, pages: Pages, copies: PageCopies) -> Pages:
        """A loop over the pages that are copied."""
        return copy_pages(pages, copies)

    def plan(
        self, program: Program, schedule: XlaSchedule, call: Call, layout: PageLayout, seqs: Sequences
    ) -> XlaLists:
        """The row blocks with the pages that each visits, and the places of new rows."""
        sizes, phases = (layout.page_size, call.num_pages), []
        for rows, is_member in _phases(schedule, call, seqs):
            row_blocks = _row_blocks(schedule, call, seqs, rows, is_member)
            phases.append(with_visits(program, row_blocks, seqs, rows, schedule, *sizes))
        return XlaLists(tuple(phases), Places.of(seqs, call.tokens, *sizes))

    def work(
        self, program: Program, schedule: XlaSchedule, call: Call, layout: PageLayout, seqs: Sequences
    ) -> tuple[Work, ...]:
        """The row blocks of each phase."""
        found = []
        for rows, is_member in _phases(schedule, call, seqs):
            row_blocks = RowBlocks.of(seqs, is_member, rows, call.tokens)

            def of_one(which: Array, row_blocks: RowBlocks = row_blocks, rows: int = rows) -> tuple[Array, ...]:
                block = row_blocks.block(seqs, which, rows)
                pages = page_coverage(
                    program, block.query_rows, seqs.tables[block.seq], layout.page_size, call.num_pages
                )
                return block.row[0], jnp.sum(block.is_row), jnp.sum(pages.some), jnp.sum(pages.full)

            items = items_of(*jax.jit(jax.vmap(of_one))(jnp.arange(row_blocks.seq.shape[0], dtype=jnp.int32)))
            blocks_per_step = schedule.blocks_per_step if program.group * rows <= FEW_ROWS else 1
            pages_per_step = schedule.pages_per_block * blocks_per_step
            words = "row blocks of one row" if rows == 1 else f"row blocks of up to {rows} rows"
            found.append(Work(words, (with_pages(items),), pages_per_step))
        return tuple(found)


def _lists(seqs: Sequences) -> XlaLists | None:
    """This lowering's lists of the step, if it has been planned; another lowering's are not for it."""
    return seqs.planned if isinstance(seqs.planned, XlaLists) else None


def _row_blocks(
    schedule: XlaSchedule, call: Call, seqs: Sequences, rows: int, is_member: Bool[Array, " seqs"]
) -> RowBlocks:
    """The row blocks of a phase. Where every slot has as many rows, they are constants; but of those that are worked on
    in turn, none come after the last slot that has rows."""
    if call.query_rows is not None and call.has_even_starts and isinstance(call.slots, int):
        slot = np.arange(call.slots, dtype=np.int32)
        used = None if schedule.form == AT_ONCE else jnp.max(jnp.where(is_member, slot + 1, 0), initial=0)
        return RowBlocks.even(call.slots, call.query_rows, rows, used)
    if schedule.form != AT_ONCE:
        return RowBlocks.of(seqs, is_member, rows, call.tokens)
    is_single = rows == 1 and len(_phases(schedule, call, seqs)) > 1
    return RowBlocks.of(seqs, is_member, rows, call.tokens, most_row_blocks(call, rows, is_single))


def _phases(schedule: XlaSchedule, call: Call, seqs: Sequences) -> list[tuple[int, Bool[Array, " seqs"]]]:
    """The phases of a batch: the query rows per row block, and which sequences are cut into such row blocks.

    A batch whose sequences have one known number of rows is one phase. A batch with varying rows is two: sequences of
    one row, which would waste most of a larger row block, and all others. A phase without sequences costs nothing.
    """
    if call.query_rows is not None or call.tokens == 1:
        rows = min(call.query_rows or 1, schedule.rows_per_tile)
        return [(rows, seqs.counts > 0)]
    rows = at_most(schedule.rows_per_tile, call.tokens)
    return [(1, seqs.counts == 1), (rows, seqs.counts > 1)] if rows > 1 else [(1, seqs.counts > 0)]


XLA_BLOCKS = XlaBlocks()
