"""What the lowerings for TPUs have in common: the chip, or an interpreter in its place; gradients; and the write."""

import abc
import dataclasses
import functools
import itertools
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from paged.spec import AttentionState, PageLayout, Pages

from ..base import Lowering, Schedule
from ..program import Call, PageCopies, Program, Results, Sequences, Wanted, refused_operations
from ..transforms import run_kernels
from ..work import Work, items_of, with_pages
from ..xla import XLA_BLOCKS
from .chips import CHIPS, LANES, Chip, chip_named, this_chip
from .copy import copy_pages, refuses_copy
from .pages import WorkList, refuses_layout
from .write import refuses_write, write_rows

# What a state is: exact enough to be merged, and without sinks, which enter once.
STATE = Wanted(jnp.dtype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class TpuLowering(Lowering):
    """A lowering for ``chip``, or for this process's chip if that is None.

    ``interpret`` is passed to Pallas: False, or the settings of its interpreter of TPU kernels.
    """

    target: ClassVar[str] = "tpu"
    has_kernels: ClassVar[bool] = True
    generations: ClassVar[dict[str, tuple[str, ...]]] = {name: chip.device_kinds for name, chip in CHIPS.items()}

    chip: Chip | None = dataclasses.field(default=None, kw_only=True)
    interpret: Any = dataclasses.field(default=False, kw_only=True)

    @property
    def target_chip(self) -> Chip:
        """The chip that it is lowered for."""
        return self.chip or this_chip()

    @property
    def is_interpreted(self) -> bool:
        """Whether kernels are interpreted."""
        return bool(self.interpret)

    def refuses(self, program: Program, layout: PageLayout, call: Call | None = None) -> str | None:
        """Why this lowering refuses the program, the layout or the call; None if it accepts them."""
        reason = refuses_program(program, layout) or self._refuses_brought(program, call)
        return reason if reason is not None or call is None else self._refuses_call(program, layout, call)

    def _refuses_brought(self, program: Program, call: Call | None) -> str | None:
        """Why this lowering refuses what a batch brings, or masks that differ by head; None if it accepts them."""
        del program, call
        return None

    @abc.abstractmethod
    def _refuses_call(self, program: Program, layout: PageLayout, call: Call) -> str | None:
        """Why this call is refused, or None. The program and the layout are accepted."""

    def interpreted(self, interpret: Any) -> Self:
        """This lowering with its kernels interpreted as told: True stands for the interpreter's default settings."""
        return dataclasses.replace(self, interpret=_interpreter(interpret))

    def on_chip(self, generation: str | Chip) -> Self:
        """This lowering for another chip, compiled."""
        return dataclasses.replace(self, chip=chip_named(generation), interpret=False)

    def within_memory(self, limit: int) -> Self:
        """This lowering for a chip with less vector memory."""
        chip = dataclasses.replace(self.target_chip, vmem_bytes=min(limit, self.target_chip.vmem_bytes))
        return dataclasses.replace(self, chip=chip)

    def state(
        self, program: Program, schedule: Schedule, call: Call, q: Array, pages: Pages, seqs: Sequences
    ) -> AttentionState:
        """The results in float32, without sinks."""
        return self.results(program, schedule, call, STATE, q, pages, None, seqs).state

    def update(
        self,
        program: Program,
        schedule: Schedule,
        call: Call,
        q: Array,
        k: Array,
        v: Array,
        pages: Pages,
        seqs: Sequences,
    ) -> tuple[AttentionState, Pages]:
        """The results of an update in float32, without sinks, and the pages."""
        results, pages = self.update_results(program, schedule, call, STATE, q, k, v, pages, None, seqs)
        return results.state, pages

    def results(
        self,
        program: Program,
        schedule: Schedule,
        call: Call,
        wanted: Wanted,
        q: Array,
        pages: Pages,
        sinks: Array | None,
        seqs: Sequences,
    ) -> Results:
        """`run_results`, with the XLA lowering's derivatives."""
        run = functools.partial(self.run_results, program, schedule, call, wanted)
        blocks = XLA_BLOCKS.schedule(program, pages.layout)
        like = functools.partial(XLA_BLOCKS.results, program, blocks, call, wanted)
        return run_kernels(run, like, q, pages, sinks, seqs, is_interpreted=self.is_interpreted)

    def update_results(
        self,
        program: Program,
        schedule: Schedule,
        call: Call,
        wanted: Wanted,
        q: Array,
        k: Array,
        v: Array,
        pages: Pages,
        sinks: Array | None,
        seqs: Sequences,
    ) -> tuple[Results, Pages]:
        """`run_update_results`, with the XLA lowering's derivatives."""
        run = functools.partial(self.run_update_results, program, schedule, call, wanted)
        blocks = XLA_BLOCKS.schedule(program, pages.layout)
        like = functools.partial(XLA_BLOCKS.update_results, program, blocks, call, wanted)
        return run_kernels(run, like, q, k, v, pages, sinks, seqs, is_interpreted=self.is_interpreted)

    @abc.abstractmethod
    def run_state(
        self, program: Program, schedule: Any, call: Call, q: Array, pages: Pages, seqs: Sequences
    ) -> AttentionState:
        """`state` by kernels, which has no rule for transforms."""

    def run_results(
        self,
        program: Program,
        schedule: Any,
        call: Call,
        wanted: Wanted,
        q: Array,
        pages: Pages,
        sinks: Array | None,
        seqs: Sequences,
    ) -> Results:
        """`results` by kernels, which has no rule for transforms."""
        return wanted.of(self.run_state(program, schedule, call, q, pages, seqs), seqs, sinks)

    def run_update(
        self,
        program: Program,
        schedule: Any,
        call: Call,
        q: Array,
        k: Array,
        v: Array,
        pages: Pages,
        seqs: Sequences,
    ) -> tuple[AttentionState, Pages]:
        """`update` by kernels: the write, then the attention. No page is read before the kernels that write end."""
        pages = self.write(k, v, pages, seqs, call.query_rows)
        return self.run_state(program, schedule, call, q, pages, seqs), pages

    def run_update_results(
        self,
        program: Program,
        schedule: Any,
        call: Call,
        wanted: Wanted,
        q: Array,
        k: Array,
        v: Array,
        pages: Pages,
        sinks: Array | None,
        seqs: Sequences,
    ) -> tuple[Results, Pages]:
        """`update_results` by kernels."""
        state, pages = self.run_update(program, schedule, call, q, k, v, pages, seqs)
        return wanted.of(state, seqs, sinks), pages

    def refuses_write(self, layout: PageLayout) -> str | None:
        """Why no kernel writes pages of this layout, or None."""
        return refuses_write(layout, self.target_chip)

    def write(self, k: Array, v: Array, pages: Pages, seqs: Sequences, query_rows: int | None) -> Pages:
        """The pages with new rows written: by kernels in place, or by XLA if the kernels refuse the layout."""
        if self.refuses_write(pages.layout) is not None:
            return XLA_BLOCKS.write(k, v, pages, seqs, query_rows)
        # Where rows are written follows from their places alone.
        seqs = seqs._replace(numbers={}, own=None)
        return write_rows(self.target_chip, self.interpret, query_rows, k, v, pages, seqs)

    def copy(self, pages: Pages, copies: PageCopies) -> Pages:
        """The pages with some of them copied to others: by a kernel, or by XLA where no kernel can read the pages."""
        if refuses_copy(pages.layout) is not None:
            return XLA_BLOCKS.copy(pages, copies)
        return copy_pages(self.target_chip, self.interpret, pages, copies)


def work_of(words: str, work: WorkList, schedule: Any, chip: Chip, parts: int = 1) -> Work:
    """A work list in the form that pictures read: the items of each core that have a page."""
    items, bounds = (
        items_of(work.row, work.rows, work.count, work.num_full, parts=parts),
        np.asarray(work.bounds).tolist(),
    )
    cores = tuple(with_pages(items[first:last]) for first, last in itertools.pairwise(bounds))
    return Work(words, cores, schedule.pages_per_block, schedule.buffers, chip.hbm_bytes_per_second / len(cores))


def _interpreter(interpret: Any) -> Any:
    """Settings of the interpreter of TPU kernels, or False.

    Pallas reads True as its interpreter of kernels in general, which refuses copies of powers of two that are longer
    than an array, though they do not run. So True becomes the default settings of the interpreter of TPU kernels.
    """
    if isinstance(interpret, (bool, np.bool_)):
        return pltpu.InterpretParams() if interpret else False
    if not isinstance(interpret, pltpu.InterpretParams):
        raise TypeError(
            f"interpret must be True, False or a jax.experimental.pallas.tpu.InterpretParams; got {interpret!r}."
        )
    return interpret


def refuses_program(program: Program, layout: PageLayout) -> str | None:
    """Why no kernel accepts this program over this layout, or None."""
    reason = refuses_layout(layout)
    if reason is not None:
        return reason
    if layout.order == "interleaved" and layout.scales == "token":
        return 'scales="token" with order="interleaved" would have to be transposed: use order="packed" or "split"'
    if layout.num_kv_heads > LANES:
        return f"{layout.num_kv_heads} KV heads are more than the {LANES} lanes that log-sum-exps are kept in"
    operations = refused_operations(program)
    if operations:
        return (
            f"a mask or bias uses {', '.join(operations)}, which kernels have no rule for: only elementwise arithmetic "
            "of positions, and anything of the head alone"
        )
    return None
