"""The TPU decode lowering's front: what it takes, its schedule, and a batch's state by one kernel or a few."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged.spec import AttentionState, PageLayout, Pages, RaggedBatch, merge

from ..call import Call
from ..lowering import Lowering
from ..program import Program
from ..schedule import Schedule
from ..sequences import Sequences
from ..xla import XLA_BLOCKS
from .chips import Chip, this_chip
from .launch import Launch
from .limits import chunks, fits, refuses_call, refuses_program
from .planning import launch_of, plan_schedule
from .work import Visited


@dataclasses.dataclass(frozen=True)
class TpuDecode(Lowering):
    """Decode on TPUs, one or a few query rows a sequence; every term that is elementwise, every page order.

    ``chip`` None means this process's own; ``interpret`` is passed to Pallas.
    """

    name: str = "tpu-decode"
    target: str = "tpu"
    choices: frozenset[str] = frozenset({"pages_per_block", "sequence", "buffers", "kv_splits", "cores"})
    chip: Chip | None = None
    interpret: Any = False

    def refuses(self, program: Program, layout: PageLayout, call: Call | None = None) -> str | None:
        """Pages that a TPU cannot move, terms that a kernel cannot compute, calls that are not decoding."""
        reason = refuses_program(program, layout)
        if reason is None and call is not None:
            reason = refuses_call(program, layout, call, self._chip)
        return reason

    def schedule(self, program: Program, layout: PageLayout, call: Call | None = None) -> Schedule:
        """What fits the chip, with blocks large enough to hide the work behind the transfer of the next."""
        return plan_schedule(self.name, program, layout, call, self._chip)

    def cannot_honour(self, program: Program, layout: PageLayout, call: Call, schedule: Schedule) -> str | None:
        """A schedule must fit the chip's memory, and have no more cores than it."""
        return fits(program, layout, call, schedule, self._chip)

    def interpreted(self, interpret: Any) -> "TpuDecode":
        """With kernels interpreted as told."""
        return dataclasses.replace(self, interpret=interpret)

    def on_chip(self, chip: Chip) -> "TpuDecode":
        """For that chip, compiled."""
        return dataclasses.replace(self, chip=chip, interpret=False)

    def state(
        self,
        program: Program,
        schedule: Schedule,
        q: Float[Array, "tokens q_heads head_dim"],
        pages: Pages,
        batch: RaggedBatch,
    ) -> AttentionState:
        """The batch's state in float32, without sinks. Its gradient is the XLA lowering's."""
        return _differentiable_state(self, program, schedule, q, pages, batch)

    def write(self, k: Array, v: Array, pages: Pages, batch: RaggedBatch) -> Pages:
        """One scatter, by XLA."""
        return XLA_BLOCKS.write(k, v, pages, batch)

    @property
    def _chip(self) -> Chip:
        return self.chip or this_chip()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiable_state(
    lowering: TpuDecode, program: Program, schedule: Schedule, q: Array, pages: Pages, batch: RaggedBatch
) -> AttentionState:
    call, layout = Call.of(q, pages, batch), pages.layout
    seqs = Sequences.of(batch, call.tokens, layout.page_size)
    launch = launch_of(program, layout, call, schedule, lowering._chip, lowering.interpret)
    return _attend(launch, program, schedule, q, pages, seqs)


def _forward(lowering: TpuDecode, program: Program, schedule: Schedule, q: Array, pages: Pages, batch: RaggedBatch):
    return _differentiable_state(lowering, program, schedule, q, pages, batch), (q, pages, batch)


def _backward(lowering: TpuDecode, program: Program, schedule: Schedule, residuals: Any, cotangent: AttentionState):
    q, pages, batch = residuals
    del lowering, schedule
    own = XLA_BLOCKS.schedule(program, pages.layout)
    _, pull = jax.vjp(lambda q, pages: XLA_BLOCKS.state(program, own, q, pages, batch), q, pages)
    return (*pull(cotangent), None)


_differentiable_state.defvjp(_forward, _backward)


def _attend(
    launch: Launch, program: Program, schedule: Schedule, q: Array, pages: Pages, seqs: Sequences
) -> AttentionState:
    """By as many kernels as scalar memory needs: each takes some sequences, and a part of what they visit."""
    layout, states = pages.layout, []
    visited = Visited.of(program, seqs, layout.page_size, pages.num_pages)
    cut = {"splits": schedule.kv_splits, "pages_per_block": schedule.pages_per_block, "cores": schedule.cores}
    for rows, entries in chunks(seqs.tables.shape, schedule, launch.chip):
        work = visited.work(rows, entries, **cut)
        state = launch(work, q, pages)
        row = jnp.arange(q.shape[0])
        # The rows that the kernel writes: no more than the static number, whatever the batch's values say.
        first, count = seqs.starts[rows], jnp.minimum(seqs.counts[rows], launch.views.rows)
        is_own = jnp.any((row[:, None] >= first) & (row[:, None] < first + count), axis=1)
        out = jnp.where(is_own[:, None, None], state.out, 0.0)
        states.append(AttentionState(out, jnp.where(is_own[:, None], state.lse, -jnp.inf)))
    return functools.reduce(merge, states)


TPU_DECODE = TpuDecode()
