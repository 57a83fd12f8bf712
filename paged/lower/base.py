"""The interface between a program and a target: `Lowering`, and `Schedule`, the choices that a lowering leaves open."""

import abc
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from jaxtyping import Array

from paged.spec import AttentionState, PageLayout, Pages, require_positive_int

from .program import Call, PageCopies, Program, Results, Sequences, Wanted
from .work import Work

# Every lowering's class of schedules, by the lowering's name.
_CLASSES: dict[str, type["Schedule"]] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a lowering divides its work. Any schedule gives the same attention; only speed and memory differ.

    Every lowering has a class of its own: `XlaSchedule`, `DecodeSchedule`, `RaggedSchedule`. A schedule can be printed,
    saved as JSON, passed to `lower`, and tuned. ``lowering`` is the name of the lowering that a schedule is for.

    A new class is made by ``class MySchedule(Schedule, lowering="my-lowering")``. Its fields are whole numbers of at
    least 1 (or ``metadata={"least": n}``), one of several strings (``metadata={"one_of": (...)}``), or a schedule.

    >>> schedule = paged.XlaSchedule(pages_per_block=8, rows_per_tile=64)
    >>> Schedule.from_json(schedule.to_json()) == schedule
    True
    >>> print(schedule)
    xla-blocks(pages_per_block=8, rows_per_tile=64)
    """

    lowering: ClassVar[str]

    def __init_subclass__(cls, *, lowering: str, **options: Any):
        super().__init_subclass__(**options)
        cls.lowering = lowering
        _CLASSES[lowering] = cls

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, rules = getattr(self, field.name), field.metadata
            if "one_of" in rules:
                if value not in rules["one_of"]:
                    raise ValueError(f"{field.name} must be one of {rules['one_of']}; got {value!r}.")
            elif "schedule" in rules:
                if value is not None and type(value) is not rules["schedule"]:
                    raise TypeError(f"{field.name} must be a {rules['schedule'].__name__} or None; got {value!r}.")
            else:
                require_positive_int(field.name, value, rules.get("least", 1))

    def replace(self, **changes: Any) -> Self:
        """This schedule with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """One line of JSON: the lowering's name and every field."""
        return json.dumps(_as_json(self))

    @staticmethod
    def from_json(text: str) -> "Schedule":
        """The schedule that `to_json` wrote. Raises ``ValueError`` for anything else, naming what is wrong."""
        return _from_json(json.loads(text))

    def __str__(self) -> str:
        fields = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        shown = (f"{name}={value}" for name, (value, default) in fields.items() if value != default)
        return f"{self.lowering}({', '.join(shown)})"


def _as_json(value: Any) -> Any:
    if not isinstance(value, Schedule):
        return value
    fields = {field.name: _as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"lowering": value.lowering, **fields}


def _from_json(values: Any) -> Schedule:
    lowering = values.get("lowering") if isinstance(values, dict) else None
    if not isinstance(lowering, str) or lowering not in _CLASSES:
        raise ValueError(f'A schedule\'s JSON names its "lowering", one of {sorted(_CLASSES)}; got {values!r}.')
    cls, fields = _CLASSES[lowering], {name: value for name, value in values.items() if name != "lowering"}
    names = {field.name for field in dataclasses.fields(cls)}
    if set(fields) != names:
        raise ValueError(f"The JSON of a schedule for {lowering} has the fields {sorted(names)}; got {sorted(fields)}.")
    return cls(**{name: _from_json(value) if isinstance(value, dict) else value for name, value in fields.items()})


def _distance(one: Schedule, asked: Schedule, given: Mapping[str, Any]) -> tuple[float, float]:
    """How far two schedules are apart: in the fields of ``given``, and in all others."""
    apart = [0.0, 0.0]
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(asked, field.name)
        is_size = isinstance(a, int) and isinstance(b, int)
        apart[field.name not in given] += abs(math.log2(a) - math.log2(b)) if is_size else float(a != b)
    return apart[0], apart[1]


class Lowering(abc.ABC):
    """One way to run a program. It owns data movement only, and says beforehand what it refuses.

    ``target`` is what `lower` calls it by; ``schedule_type`` is its class of schedules. Everything is decided from
    static facts: the program, the page layout, and the shapes of a call. ``generations`` lists the chips that it can be
    lowered for by name, with JAX's names of their devices. ``has_kernels`` says whether it runs kernels of its own,
    which can be interpreted and which hints about kernels mean. ``by_name_only`` says that target "auto" leaves it out,
    because no device has timed it.
    """

    target: ClassVar[str]
    schedule_type: ClassVar[type[Schedule]]
    has_kernels: ClassVar[bool] = False
    by_name_only: ClassVar[bool] = False
    generations: ClassVar[dict[str, tuple[str, ...]]] = {}

    @property
    def name(self) -> str:
        """The name that schedules, refusals and `explain` use."""
        return self.schedule_type.lowering

    @abc.abstractmethod
    def refuses(self, program: Program, layout: PageLayout, call: Call | None = None) -> str | None:
        """Why this program over this layout is refused, or None. Without a call: the reasons that hold for any call."""

    @abc.abstractmethod
    def schedule(self, program: Program, layout: PageLayout, call: Call | None = None) -> Schedule:
        """The heuristic: the schedule that the lowering proposes for a call; without one, for a common call."""

    def cannot_honour(self, program: Program, layout: PageLayout, call: Call, schedule: Schedule) -> str | None:
        """Why this schedule cannot run in this call, or None."""
        del program, layout, call, schedule
        return None

    def alternatives(self, program: Program, layout: PageLayout, call: Call, own: Schedule) -> Iterator[Schedule]:
        """A few schedules that might be faster than the heuristic's ``own`` in this call; some may not run."""
        del program, layout, call, own
        yield from ()

    def candidates(self, program: Program, layout: PageLayout, call: Call) -> tuple[Schedule, ...]:
        """The schedules worth timing in this call: the heuristic's first, then the alternatives that can run."""
        own = self.schedule(program, layout, call)
        others = self.alternatives(program, layout, call, own)
        honoured = (one for one in others if self.cannot_honour(program, layout, call, one) is None)
        return tuple(dict.fromkeys((own, *honoured)))

    def neighbours(self, layout: PageLayout, call: Call, asked: Schedule) -> Iterator[Schedule]:
        """Schedules like ``asked``, rounded to what kernels can do, or with less of each field; some may not run."""
        del layout, call, asked
        yield from ()

    def nearest(self, program: Program, layout: PageLayout, call: Call, fields: Mapping[str, int | str]) -> Schedule:
        """The heuristic's schedule with these fields, or of those that can run the one that comes nearest to that.

        Fields that this lowering's schedules do not have are left out. Distances are ratios of sizes, first of the
        given fields and then of the others.
        """
        own = self.schedule(program, layout, call)
        given = {name: value for name, value in fields.items() if hasattr(own, name)}
        asked = own.replace(**given)
        if self.cannot_honour(program, layout, call, asked) is None:
            return asked
        others = (one for one in self.neighbours(layout, call, asked) if one != asked)
        honoured = (one for one in others if self.cannot_honour(program, layout, call, one) is None)
        return min((*honoured, own), key=lambda one: _distance(one, asked, given))

    @property
    def is_interpreted(self) -> bool:
        """Whether kernels are interpreted. Their times say nothing about a chip."""
        return False

    def interpreted(self, interpret: Any) -> "Lowering":
        """This lowering with its kernels interpreted as told. Raises ``ValueError`` where there are no kernels."""
        raise ValueError(f'interpret={interpret!r} is for kernels, and the lowering "{self.name}" has none.')

    def on_chip(self, generation: Any) -> "Lowering":
        """This lowering for another chip than this process's. A lowering without chips stays as it is."""
        del generation
        return self

    def within_memory(self, limit: int) -> "Lowering":
        """This lowering with kernels that use at most ``limit`` bytes of a core's memory, where there are kernels."""
        del limit
        return self

    def describe(
        self, program: Program, layout: PageLayout, call: Call, schedule: Schedule, bytes_visited: int
    ) -> list[str]:
        """Lines for `explain`: the memory that the schedule uses, and the least time that its transfers take."""
        del program, layout, call, schedule, bytes_visited
        return []

    def plan(self, program: Program, schedule: Any, call: Call, layout: PageLayout, seqs: Sequences) -> Any:
        """What this lowering computes from a step's sequences alone, once for all layers of one mask; None if nothing.

        Every method that is given sequences finds it in ``seqs.planned``, or None there where no step was planned. It
        is a pytree with a method ``moved(first_page)``, which gives the same for pages that lie ``first_page`` pages
        further on in the pool. Lists depend on the mask of ``program`` only, and not on its scores.
        """
        del program, schedule, call, layout, seqs

    def work(
        self, program: Program, schedule: Any, call: Call, layout: PageLayout, seqs: Sequences
    ) -> tuple[Work, ...]:
        """How a step of concrete sequences is divided, in the order of the work; () where that is not told."""
        del program, schedule, call, layout, seqs
        return ()

    @abc.abstractmethod
    def state(
        self, program: Program, schedule: Schedule, call: Call, q: Array, pages: Pages, seqs: Sequences
    ) -> AttentionState:
        """The state of every query row in float32, without sinks; ``(0, -inf)`` in empty rows and rows of no sequence.

        ``call`` holds the shapes of ``q``, ``pages`` and ``seqs``, and the number of rows that every sequence has.
        """

    def refuses_write(self, layout: PageLayout) -> str | None:
        """Why `write` refuses pages of this layout, or None."""
        del layout
        return None

    @abc.abstractmethod
    def write(self, k: Array, v: Array, pages: Pages, seqs: Sequences, query_rows: int | None) -> Pages:
        """The pages with this step's keys and values in their places; rows without a place are dropped.

        ``query_rows`` is the number of rows that every sequence has, None where it varies.
        """

    @abc.abstractmethod
    def copy(self, pages: Pages, copies: PageCopies) -> Pages:
        """The pages with some of them copied to others, before a step writes; in place, with per-token scales."""

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
        """`write`, then `state` over what was written."""
        pages = self.write(k, v, pages, seqs, call.query_rows)
        return self.state(program, schedule, call, q, pages, seqs), pages

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
        """`state`, with sinks and as the caller wants it. ``sinks`` are float32[q_heads], or None."""
        return wanted.of(self.state(program, schedule, call, q, pages, seqs), seqs, sinks)

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
        """`write`, then `results` over what was written."""
        state, pages = self.update(program, schedule, call, q, k, v, pages, seqs)
        return wanted.of(state, seqs, sinks), pages
