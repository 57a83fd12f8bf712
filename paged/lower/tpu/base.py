"""What the lowerings for TPUs have in common: a chip, an interpreter in its place, rules of kernels, and writing."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, Self

import jax.numpy as jnp
from jaxtyping import Array

from paged.spec import PageLayout, Pages, RaggedBatch

from ..base import Lowering, Schedule
from ..program import Call, Program, refused_operations
from ..xla import XLA_BLOCKS
from .chips import LANES, SUBLANES, Chip, this_chip
from .write.kernels import refuses_write, write_rows


class KernelRules(NamedTuple):
    """What a kernel does on a chip, decided from static facts.

    ``refuses(program, layout, call, chip)`` and ``fits(program, layout, call, schedule, chip)`` say why a call or a
    schedule cannot be, or None; ``plan(name, program, layout, call, chip)`` is the kernel's own schedule, and
    ``alternatives(layout, call, own)`` are others, to be timed.
    """

    refuses: Callable[[Program, PageLayout, Call, Chip], str | None]
    plan: Callable[[str, Program, PageLayout, Call | None, Chip], Schedule]
    fits: Callable[[Program, PageLayout, Call, Schedule, Chip], str | None]
    alternatives: Callable[[PageLayout, Call, Schedule], Iterator[Schedule]]


@dataclasses.dataclass(frozen=True)
class TpuLowering(Lowering):
    """A lowering for ``chip``, None for this process's own; ``interpret`` is passed to Pallas."""

    rules: ClassVar[KernelRules]
    target: str = "tpu"
    chip: Chip | None = dataclasses.field(default=None, kw_only=True)
    interpret: Any = dataclasses.field(default=False, kw_only=True)

    @property
    def the_chip(self) -> Chip:
        """The chip that it is for."""
        return self.chip or this_chip()

    @property
    def is_interpreted(self) -> bool:
        """Whether Pallas was told to interpret."""
        return bool(self.interpret)

    def refuses(self, program: Program, layout: PageLayout, call: Call | None = None) -> str | None:
        """Pages that a TPU cannot move, terms that no kernel can compute, and calls that are not for this one."""
        reason = refuses_program(program, layout)
        if reason is None and call is not None:
            reason = self.rules.refuses(program, layout, call, self.the_chip)
        return reason

    def schedule(self, program: Program, layout: PageLayout, call: Call | None = None) -> Schedule:
        """What fits the chip, with blocks large enough to hide transfers behind work."""
        return self.rules.plan(self.name, program, layout, call, self.the_chip)

    def cannot_honour(self, program: Program, layout: PageLayout, call: Call, schedule: Schedule) -> str | None:
        """A schedule must fit the chip's memory, and have no more cores than it."""
        return self.rules.fits(program, layout, call, schedule, self.the_chip)

    def alternatives(self, program: Program, layout: PageLayout, call: Call, own: Schedule) -> Iterator[Schedule]:
        """What the kernel has besides, around its own choice."""
        del program
        return self.rules.alternatives(layout, call, own)

    def interpreted(self, interpret: Any) -> Self:
        """With kernels interpreted as told."""
        return dataclasses.replace(self, interpret=interpret)

    def on_chip(self, chip: Chip) -> Self:
        """For that chip, compiled."""
        return dataclasses.replace(self, chip=chip, interpret=False)

    def within_vmem(self, limit: int) -> Self:
        """For the same chip with less vector memory."""
        chip = dataclasses.replace(self.the_chip, vmem_bytes=min(limit, self.the_chip.vmem_bytes))
        return dataclasses.replace(self, chip=chip)

    def refuses_write(self, layout: PageLayout) -> str | None:
        """Pages that a TPU cannot move by granules."""
        return refuses_write(layout, self.the_chip)

    def write(self, k: Array, v: Array, pages: Pages, batch: RaggedBatch) -> Pages:
        """By kernels of their own, in place; by XLA what these refuse."""
        if self.refuses_write(pages.layout) is not None:
            return XLA_BLOCKS.write(k, v, pages, batch)
        return write_rows(self.the_chip, self.interpret, k, v, pages, batch)


def refuses_program(program: Program, layout: PageLayout) -> str | None:
    """Why no decode kernel takes this program over this layout, or None."""
    if layout.page_size % SUBLANES:
        return f"pages of {layout.page_size} tokens are no whole tiles: page_size must be a multiple of {SUBLANES}"
    if layout.dtype == jnp.float16:
        return "a TPU has no float16: pages must be bfloat16, float32, int8 or float8"
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
