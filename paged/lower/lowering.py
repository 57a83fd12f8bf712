"""`Lowering`: the interface between a program and a target."""

import abc
from collections.abc import Iterator
from typing import Any

from jaxtyping import Array

from paged.spec import AttentionState, PageLayout, Pages, RaggedBatch

from .call import Call
from .program import Program
from .schedule import Schedule


class Lowering(abc.ABC):
    """One way to run a program. It owns data movement only, and says beforehand what it does not take."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What a schedule, a refusal and `explain` call it."""

    @property
    @abc.abstractmethod
    def target(self) -> str:
        """The target it runs on."""

    @property
    @abc.abstractmethod
    def choices(self) -> frozenset[str]:
        """The fields of a `Schedule` that it heeds."""

    @abc.abstractmethod
    def refuses(self, program: Program, layout: PageLayout, call: Call | None = None) -> str | None:
        """Why it does not take this program over this layout, or None when it does. Decided from static facts: those
        of one call where it is given, and else what holds for any."""

    @abc.abstractmethod
    def schedule(self, program: Program, layout: PageLayout, call: Call | None = None) -> Schedule:
        """The schedule it would choose; without a call, for a common one."""

    def cannot_honour(self, program: Program, layout: PageLayout, call: Call, schedule: Schedule) -> str | None:
        """Why this schedule cannot run in this call, or None when it can."""
        del program, layout, call, schedule
        return None

    def alternatives(self, program: Program, layout: PageLayout, call: Call, own: Schedule) -> Iterator[Schedule]:
        """Schedules that might be faster than its ``own`` choice in this call: few, and not all of them need run."""
        del program, layout, call, own
        yield from ()

    def candidates(self, program: Program, layout: PageLayout, call: Call) -> tuple[Schedule, ...]:
        """What is worth timing in this call: its own choice first, then the alternatives that it can honour."""
        own = self.schedule(program, layout, call)
        others = self.alternatives(program, layout, call, own)
        honoured = (one for one in others if self.cannot_honour(program, layout, call, one) is None)
        return tuple(dict.fromkeys((own, *honoured)))

    @property
    def is_interpreted(self) -> bool:
        """Whether it has kernels that are interpreted, so that its times say nothing."""
        return False

    def interpreted(self, interpret: Any) -> "Lowering":
        """This lowering with its kernels interpreted as told. Raises ``ValueError`` where there are no kernels."""
        raise ValueError(f'interpret={interpret!r} is for kernels, and the lowering "{self.name}" has none.')

    def on_chip(self, chip: Any) -> "Lowering":
        """This lowering as it would be on another chip than this process's."""
        del chip
        return self

    def within_vmem(self, limit: int) -> "Lowering":
        """This lowering with kernels that take no more than ``limit`` bytes of vector memory, where it has any."""
        del limit
        return self

    def describe(
        self, program: Program, layout: PageLayout, call: Call, schedule: Schedule, bytes_visited: int
    ) -> list[str]:
        """Lines for `explain`: what the schedule takes of the machine, and the least time that it could need."""
        del program, layout, call, schedule, bytes_visited
        return []

    @abc.abstractmethod
    def state(self, program: Program, schedule: Schedule, q: Array, pages: Pages, batch: RaggedBatch) -> AttentionState:
        """The batch's state in float32, without sinks; ``(0, -inf)`` in empty rows and rows of no sequence."""

    def refuses_write(self, layout: PageLayout) -> str | None:
        """Why its `write` is not for pages of this layout, or None when it is."""
        del layout
        return None

    @abc.abstractmethod
    def write(self, k: Array, v: Array, pages: Pages, batch: RaggedBatch) -> Pages:
        """The pages with this step's keys and values in their slots; rows without a slot are dropped."""

    def update(
        self, program: Program, schedule: Schedule, q: Array, k: Array, v: Array, pages: Pages, batch: RaggedBatch
    ) -> tuple[AttentionState, Pages]:
        """`write`, then `state` over what was written."""
        pages = self.write(k, v, pages, batch)
        return self.state(program, schedule, q, pages, batch), pages
