"""The decode lowering for Hopper GPUs: attention by one kernel, writes by XLA."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array

from paged.spec import AttentionState, PageLayout, Pages

from ..base import Lowering, Schedule
from ..gpu_targets import GPU_TARGETS, GpuTarget
from ..jax_version import gpu_interpreter
from ..program import Call, PageCopies, Program, Sequences
from ..transforms import run_kernels
from ..work import Work, items_of, with_pages
from ..xla import XLA_BLOCKS
from .chips import another_gpu, this_gpu
from .kernel import split_of
from .launch import Visited, shared_bytes
from .plan import (
    alternatives,
    fits,
    launch_of,
    neighbours,
    plan_schedule,
    refuses_call,
    refuses_program,
    rows_of,
)
from .schedule import GpuDecodeSchedule


@dataclasses.dataclass(frozen=True)
class GpuDecode(Lowering):
    """Decode on Hopper GPUs: one query row per sequence, or a few, the same number for all.

    No GPU has run it yet: it was proven in Pallas's interpreter and by the compiler. So it runs by name only. ``gpu``
    is the GPU that it is for, or this process's if that is None; ``interpret`` is passed to Pallas.
    """

    target: ClassVar[str] = "gpu"
    schedule_type: ClassVar[type[Schedule]] = GpuDecodeSchedule
    has_kernels: ClassVar[bool] = True
    by_name_only: ClassVar[bool] = True
    generations: ClassVar[dict[str, tuple[str, ...]]] = {name: gpu.device_kinds for name, gpu in GPU_TARGETS.items()}

    gpu: GpuTarget | None = dataclasses.field(default=None, kw_only=True)
    interpret: Any = dataclasses.field(default=False, kw_only=True)

    @property
    def target_gpu(self) -> GpuTarget:
        """The GPU that it is lowered for."""
        return self.gpu or this_gpu()

    @property
    def is_interpreted(self) -> bool:
        """Whether kernels are interpreted."""
        return bool(self.interpret)

    def interpreted(self, interpret: Any) -> Self:
        """This lowering with its kernel interpreted as told: True stands for the interpreter's default settings."""
        return dataclasses.replace(self, interpret=gpu_interpreter(interpret))

    def on_chip(self, generation: Any) -> Self:
        """This lowering for another GPU, compiled. For a chip that is no GPU it stays as it is."""
        gpu = GPU_TARGETS.get(generation) if isinstance(generation, str) else None
        return self if gpu is None else dataclasses.replace(self, gpu=gpu, interpret=False)

    def refuses(self, program: Program, layout: PageLayout, call: Call | None = None) -> str | None:
        """Why this lowering refuses the program, the layout or the call; None if it accepts them."""
        reason = refuses_program(program, layout) or self._refuses_device()
        return reason if reason is not None or call is None else refuses_call(program, layout, call)

    def _refuses_device(self) -> str | None:
        other = None if self.interpret else another_gpu(self.gpu)
        return f"its instructions are those of Hopper, H100 and H200; this is another GPU: {other}" if other else None

    def schedule(self, program: Program, layout: PageLayout, call: Call | None = None) -> GpuDecodeSchedule:
        """A schedule of which two blocks of threads fit a multiprocessor, with KV splits to fill the GPU."""
        return plan_schedule(program, layout, call, self.target_gpu)

    def cannot_honour(
        self, program: Program, layout: PageLayout, call: Call, schedule: GpuDecodeSchedule
    ) -> str | None:
        """Why a schedule does not fit shared memory or the block tables, or None."""
        return fits(program, layout, call, schedule, self.target_gpu)

    def alternatives(
        self, program: Program, layout: PageLayout, call: Call, own: GpuDecodeSchedule
    ) -> Iterator[GpuDecodeSchedule]:
        """Blocks of 64 and 128 tokens, fewer stages, and other KV splits."""
        del program
        return alternatives(layout, call, own)

    def neighbours(self, layout: PageLayout, call: Call, asked: GpuDecodeSchedule) -> Iterator[GpuDecodeSchedule]:
        """Blocks of 64 or 128 tokens, fewer stages and splits."""
        return neighbours(layout, call, asked)

    def describe(
        self, program: Program, layout: PageLayout, call: Call, schedule: GpuDecodeSchedule, bytes_visited: int
    ) -> list[str]:
        """Shared memory, the least time of the transfers, and that no GPU has run it."""
        gpu, taken = self.target_gpu, shared_bytes(layout, rows_of(program, call), schedule) / 2**10
        microseconds = 1e6 * bytes_visited / gpu.bytes_per_second
        return [
            f"{call.slots * program.num_kv_heads * schedule.kv_splits} blocks of threads, two on each of "
            f"{gpu.multiprocessors} multiprocessors, each with {schedule.stages} tiles of "
            f"{schedule.pages_per_block * layout.page_size} tokens and {taken:.0f} KiB of shared memory",
            f"at least {microseconds:.1f} us for its transfers at {gpu.bytes_per_second / 1e9:.0f} GB/s ({gpu.name})",
            "never timed: proven in Pallas's interpreter and by the compiler, and no GPU has run it",
        ]

    def state(
        self, program: Program, schedule: GpuDecodeSchedule, call: Call, q: Array, pages: Pages, seqs: Sequences
    ) -> AttentionState:
        """The state in float32, with the XLA lowering's derivatives."""
        like = functools.partial(XLA_BLOCKS.state, program, XLA_BLOCKS.schedule(program, pages.layout), call)
        launch = launch_of(program, pages.layout, call, schedule, self.interpret)
        return run_kernels(launch, like, q, pages, seqs, is_interpreted=self.is_interpreted)

    def plan(
        self, program: Program, schedule: GpuDecodeSchedule, call: Call, layout: PageLayout, seqs: Sequences
    ) -> Visited | None:
        """The pages that each sequence visits, where they are listed; None where they are one run."""
        launch = launch_of(program, layout, call, schedule, self.interpret)
        return launch.visited(seqs, layout.page_size, call.num_pages) if launch.intervals is None else None

    def work(
        self, program: Program, schedule: GpuDecodeSchedule, call: Call, layout: PageLayout, seqs: Sequences
    ) -> tuple[Work, ...]:
        """The sequences, or their KV splits. Every page takes a mask."""
        launch, splits = launch_of(program, layout, call, schedule, self.interpret), schedule.kv_splits

        def of_one(first: Array, end: Array, split: Array) -> Array:
            begin, blocks = split_of(first, end, split, splits, schedule.pages_per_block)
            return jnp.clip(blocks * schedule.pages_per_block, 0, jnp.maximum(end - begin, 0))

        def of_all(seqs: Sequences) -> Array:
            visited = launch.visited(seqs, layout.page_size, call.num_pages)
            first, end = (jnp.repeat(x, splits) for x in (visited.first, visited.end))
            return jax.vmap(of_one)(first, end, jnp.tile(jnp.arange(splits, dtype=jnp.int32), call.slots))

        pages = jax.jit(of_all)(seqs)
        row, rows = (jnp.repeat(x, splits) for x in (seqs.starts, seqs.counts))
        items = with_pages(items_of(row, rows, pages, jnp.zeros_like(pages), parts=splits))
        words = "sequences" if splits == 1 else f"sequences in {splits} KV splits"
        words += ", each KV head by a block of threads of its own, all side by side"
        speed = self.target_gpu.bytes_per_second
        return (Work(words, (items,), schedule.pages_per_block, schedule.stages // 2, speed),)

    def write(self, k: Array, v: Array, pages: Pages, seqs: Sequences, query_rows: int | None) -> Pages:
        """The pages with new rows written, by XLA, in place where they are donated."""
        return XLA_BLOCKS.write(k, v, pages, seqs, query_rows)

    def copy(self, pages: Pages, copies: PageCopies) -> Pages:
        """The pages with some of them copied to others, by XLA."""
        return XLA_BLOCKS.copy(pages, copies)


GPU_DECODE = GpuDecode()
