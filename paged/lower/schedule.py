"""`Schedule`: the choices a lowering leaves open, as a value that can be printed, saved, passed and tuned."""

import dataclasses
import json
from typing import Any, Literal

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
