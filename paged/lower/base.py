"""`Lowering`, the interface between a program and a target, and `Schedule`, the choices that it leaves open."""

import abc
import dataclasses
import json
from collections.abc import Iterator
from typing import Any, Literal

from jaxtyping import Array

from paged.spec import AttentionState, PageLayout, Pages, RaggedBatch

from .program import Call, Program

SEQUENCES = ("inline", "grid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a lowering cuts its work. Any schedule gives the same attention; only speed and memory differ.

    * ``lowering``: the name of the lowering it is for. A lowering heeds some of the fields below, and refuses a
      schedule that sets others.
    * ``pages_per_block``: pages taken in one step of the online softmax.
    * ``query_rows``: the most query rows of one sequence that are worked on together.
    * ``lanes``: how many such blocks of rows the forward pass works on side by side; the gradient takes one at a time.
    * ``blocks_per_step``: how many blocks of pages one step of the forward pass takes where query rows are few.
    * ``sequence``: where a kernel's loop over sequences is, ``"inline"`` in its body or on its ``"grid"``.
    * ``buffers``: blocks of pages in a kernel's memory at once: one is worked on while the others arrive.
    * ``kv_splits``: parts that each sequence's pages are split into, worked on as if they were sequences, and merged.
    * ``cores``: cores of one device ("megacore") that share the sequences.

    >>> schedule = Schedule(lowering="xla-blocks", pages_per_block=8, query_rows=64)
    >>> Schedule.from_json(schedule.to_json()) == schedule
    True
    >>> print(schedule)
    xla-blocks(pages_per_block=8, query_rows=64)
    """

    lowering: str
    pages_per_block: int
    query_rows: int = 1
    lanes: int = 1
    blocks_per_step: int = 1
    sequence: Literal["inline", "grid"] = "inline"
    buffers: int = 2
    kv_splits: int = 1
    cores: int = 1

    def __post_init__(self):
        if not isinstance(self.lowering, str):
            raise TypeError(f"lowering must be a lowering's name; got {self.lowering!r}.")
        if self.sequence not in SEQUENCES:
            raise ValueError(f"sequence must be one of {SEQUENCES}; got {self.sequence!r}.")
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 2 if field.name == "buffers" else 1
            if field.name in ("lowering", "sequence"):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{field.name} must be a Python int; got {value!r}.")
            if value < least:
                raise ValueError(f"{field.name} must be at least {least}; got {value}.")

    @property
    def chosen(self) -> dict[str, Any]:
        """The fields that differ from their defaults, without the lowering's name."""
        fields = [field for field in dataclasses.fields(self) if field.name != "lowering"]
        return {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}

    def replace(self, **changes: Any) -> "Schedule":
        """This schedule with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Schedule":
        """The schedule that `to_json` wrote. Raises ``ValueError`` for anything else, naming what is wrong."""
        values = json.loads(text)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            got = sorted(values) if isinstance(values, dict) else values
            raise ValueError(f"A schedule's JSON has the fields {sorted(names)}; got {got}.")
        return cls(**values)

    def __str__(self) -> str:
        return f"{self.lowering}({', '.join(f'{name}={value}' for name, value in self.chosen.items())})"


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


def ignores(lowering: Lowering, schedule: Schedule) -> str | None:
    """What a schedule asks for that its lowering would ignore, as a reason not to run it; or None."""
    ignored = [name for name in schedule.chosen if name not in lowering.choices]
    if not ignored:
        return None
    return (
        f'it sets {ignored}, which the lowering "{lowering.name}" has no use for; it heeds {sorted(lowering.choices)}.'
    )
