"""`Schedule`: the choices a lowering leaves open, as a value that can be printed, saved, passed and tuned."""

import dataclasses
import json
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a lowering cuts its work. Any schedule gives the same attention; only speed and memory differ.

    * ``lowering``: the name of the lowering it is for.
    * ``pages_per_block``: pages taken in one step of the online softmax.
    * ``query_rows``: the most query rows of one sequence that are worked on together.
    * ``lanes``: how many such blocks of rows the forward pass works on side by side; the gradient takes one at a time.
    * ``blocks_per_step``: how many blocks of pages one step of the forward pass takes where query rows are few.

    >>> schedule = Schedule(lowering="xla-blocks", pages_per_block=8, query_rows=64, lanes=1)
    >>> Schedule.from_json(schedule.to_json()) == schedule
    True
    """

    lowering: str
    pages_per_block: int
    query_rows: int
    lanes: int = 1
    blocks_per_step: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "lowering":
                if not isinstance(value, str):
                    raise TypeError(f"lowering must be a lowering's name; got {value!r}.")
            elif isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{field.name} must be a Python int; got {value!r}.")
            elif value < 1:
                raise ValueError(f"{field.name} must be at least 1; got {value}.")

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
