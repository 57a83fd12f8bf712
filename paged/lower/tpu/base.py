"""What the lowerings for TPUs have in common: a chip, an interpreter in its place, and writing."""

import dataclasses
from typing import Any, Self

from jaxtyping import Array

from paged.spec import PageLayout, Pages, RaggedBatch

from ..lowering import Lowering
from ..xla import XLA_BLOCKS
from .chips import Chip, this_chip
from .write import refuses_write, write_rows


@dataclasses.dataclass(frozen=True)
class TpuLowering(Lowering):
    """A lowering for ``chip``, None for this process's own; ``interpret`` is passed to Pallas."""

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
