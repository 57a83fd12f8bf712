"""`Lowering`: the interface between a program and a target."""

import abc

from jaxtyping import Array

from paged.spec import AttentionState, PageLayout, Pages, RaggedBatch

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

    @abc.abstractmethod
    def refuses(self, program: Program, layout: PageLayout) -> str | None:
        """Why it does not take this program over this layout, or None when it does. Decided from static facts."""

    @abc.abstractmethod
    def schedule(self, program: Program, layout: PageLayout) -> Schedule:
        """The schedule it would choose."""

    @abc.abstractmethod
    def state(self, program: Program, schedule: Schedule, q: Array, pages: Pages, batch: RaggedBatch) -> AttentionState:
        """The batch's state in float32, without sinks; ``(0, -inf)`` in empty rows and rows of no sequence."""

    @abc.abstractmethod
    def write(self, k: Array, v: Array, pages: Pages, batch: RaggedBatch) -> Pages:
        """The pages with this step's keys and values in their slots; rows without a slot are dropped."""
