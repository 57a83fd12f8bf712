"""`Timing`: how candidates are compared on a machine that other programs use as well."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from paged.spec import require_positive_int

Name = TypeVar("Name", bound=Hashable)
# A call that is shorter than this is timed several times in one sample, without waiting in between. So the device stays
# busy, and the cost of waiting for it is shared.
_LEAST_SECONDS = 2e-3


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long and how strictly `tune` times its candidates.

    Candidates take turns, and each turn begins with another one. What counts are medians: of a candidate's seconds, and
    of its ratios to the heuristic's schedule in the same turn. So whatever slows the machine for a while slows all
    candidates. All of them are timed in a first round. The best and the heuristic's are timed again, and only that
    second round decides.

    **Arguments:**

    - `seconds`: time for both rounds together. Compiling comes on top.
    - `margin`: a schedule wins only if it takes less than ``1 - margin`` of the heuristic's time. A smaller difference
      is noise.
    - `finalists`: how many schedules are in the second round, besides the heuristic's.
    - `least_turns`, `most_turns`: bounds of the turns of a round, whatever `seconds` says.
    - `clock`: a function that returns seconds, such as ``time.perf_counter``.

    >>> Timing(seconds=1.0).turns_within(seconds=0.5, a_turn=0.02)
    25
    """

    seconds: float = 10.0
    margin: float = 0.05
    finalists: int = 3
    least_turns: int = 3
    most_turns: int = 50
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self):
        for name, most in (("seconds", math.inf), ("margin", 1)):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value < most:
                raise ValueError(f"{name} must be a number in [0, {most:g}); got {value!r}.")
        for name in ("finalists", "least_turns", "most_turns"):
            require_positive_int(name, getattr(self, name))

    def once(self, call: Callable[[], Any]) -> float:
        """Seconds of one call, until its results are there."""
        start = self.clock()
        jax.block_until_ready(call())
        return self.clock() - start

    def turns_within(self, seconds: float, a_turn: float) -> int:
        """How many turns of ``a_turn`` seconds fit into ``seconds``."""
        return int(min(max(seconds / max(a_turn, 1e-9), self.least_turns), self.most_turns))

    def samples(
        self,
        calls: Mapping[Name, Callable[[], Any]],
        turns: int,
        on_turn: Callable[[], None] = lambda: None,
    ) -> dict[Name, list[float]]:
        """Seconds per call of each, turn by turn. Before the first turn each is called once without being counted."""
        names = list(calls)
        warm = {name: self.once(calls[name]) for name in names}
        repeats = {name: max(1, math.ceil(_LEAST_SECONDS / max(warm[name], 1e-9))) for name in names}
        seconds: dict[Name, list[float]] = {name: [] for name in names}
        for turn in range(turns):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                call, many = calls[name], repeats[name]
                seconds[name].append(self.once(lambda c=call, n=many: [c() for _ in range(n)]) / many)
            on_turn()
        return seconds


DEFAULT = Timing()


def median_ratio(seconds: Sequence[float], to: Sequence[float]) -> float:
    """The median, over turns, of the ratio of one candidate's seconds to another's."""
    return statistics.median(a / max(b, 1e-12) for a, b in zip(seconds, to, strict=True))
