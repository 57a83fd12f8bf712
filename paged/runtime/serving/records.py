"""`StepRecord`: what one step did, by request, as pictures and people read it; and `Recorder`, which keeps them."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from .._prefix_pools import pools_of_groups
from .requests import Reason
from .state import Queue


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One step of serving. Requests are numbered from 0 on, in the order in which they first had a slot.

    * ``rows``: how many rows each request had, by its number. A request with a slot but without rows has 0.
    * ``prompts``: the requests whose rows were of a prompt, or of tokens that are prefilled again.
    * ``drawn``: how many tokens each request drew, where it drew any.
    * ``drafted``: how many drafts of each request were verified, besides its rows, where there were any. Of the tokens
      that such a request drew all but one were drafts.
    * ``ended``: the requests that ended with the step.
    * ``preempted``: the requests that gave up their slot before it, and wait again.
    * ``waiting``: how many requests waited while it ran.
    * ``pages``, ``used``, ``shared``, ``cached``: of each group of layers the pages of its pool; those that sequences
      held; those of them that several held; and those that only the prefix cache held. All others were free.

    >>> StepRecord(rows={0: 7}, prompts=(0,), pages=(8,), used=(4,)).free
    (4,)
    """

    rows: Mapping[int, int]
    prompts: tuple[int, ...] = ()
    drawn: Mapping[int, int] = dataclasses.field(default_factory=dict)
    ended: tuple[int, ...] = ()
    preempted: tuple[int, ...] = ()
    waiting: int = 0
    drafted: Mapping[int, int] = dataclasses.field(default_factory=dict)
    pages: tuple[int, ...] = (0,)
    used: tuple[int, ...] = (0,)
    shared: tuple[int, ...] = (0,)
    cached: tuple[int, ...] = (0,)

    @property
    def free(self) -> tuple[int, ...]:
        """The pages of each group that nobody held."""
        return tuple(a - b - c for a, b, c in zip(self.pages, self.used, self.cached, strict=True))


def pages_of_groups(queue: Queue) -> tuple[int, ...]:
    """How many pages the pool of each group of layers has, of all shards of sequences together."""
    return tuple(pool.ref_counts.size for pool in pools_of_groups(queue.pool))


class Recorder:
    """Makes records of the events of launches, in order.

    * ``records``: of all steps so far.
    """

    def __init__(self, pages: tuple[int, ...]):
        """**Arguments:**

        - `pages`: how many pages the pool of each group of layers has.
        """
        self.records: list[StepRecord] = []
        self._pages = pages
        self._numbers: dict[Hashable, int] = {}
        self._running: set[int] = set()  # those with a slot after the latest step

    def add(self, events: Any, steps: int, whose: Mapping[int, Hashable]) -> None:
        """Take in the events of one launch.

        **Arguments:**

        - `events`: its `StepEvents` with figures, on the host.
        - `steps`: how many steps it ran.
        - `whose`: what tells requests apart, by the row of the table that each had while the launch ran.
        """
        for step in range(steps):
            self._add(events, step, whose)

    def _add(self, events: Any, step: int, whose: Mapping[int, Hashable]) -> None:
        figures, rows, prompts = events.figures, {}, []
        for slot in np.flatnonzero(figures.request[step] >= 0):
            number = self._number(whose[int(figures.request[step, slot])])
            rows[number] = int(figures.slot_rows[step, slot])
            prompts += [number] if figures.is_prompt[step, slot] else []
        drawn, drafted, ended = {}, {}, []
        for slot in np.flatnonzero(events.request[step] >= 0):
            number = self._number(whose[int(events.request[step, slot])])
            drawn |= {number: int(events.count[step, slot])} if events.count[step, slot] else {}
            count = 0 if events.drafted is None else int(events.drafted[step, slot])
            drafted |= {number: count} if count else {}
            ended += [number] if events.reason[step, slot] != Reason.NONE else []
        preempted = tuple(sorted(self._running - rows.keys())) if figures.preempted[step] else ()
        self._running = rows.keys() - set(ended)
        used, shared, cached, _ = (tuple(x) for x in figures.pages[step].tolist())
        counts = {"pages": self._pages, "used": used, "shared": shared, "cached": cached}
        told = rows, tuple(prompts), drawn, tuple(ended), preempted, int(figures.waiting[step]), drafted
        self.records.append(StepRecord(*told, **counts))

    def _number(self, who: Hashable) -> int:
        return self._numbers.setdefault(who, len(self._numbers))
