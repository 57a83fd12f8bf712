"""`Timing`: how candidates are timed beside each other on a machine that others use as well."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax

Name = TypeVar("Name", bound=Hashable)
# Calls that are shorter are timed several at once, one after the other without waiting: the device is then busy, and
# what it costs to wait for it is shared.
_LEAST_SECONDS = 2e-3


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long and how strictly to time. Candidates take turns, each turn begins with another one, and what counts are
    medians: of a candidate's seconds, and of its ratios to the heuristic's choice in the same turn. So whatever slows
    the machine for a while slows all of them.

    All candidates are timed once; the ``finalists`` best and the heuristic's choice once more, and only that decides.
    Another choice must take less than ``1 - margin`` of the heuristic's time, or else that stays: a smaller difference
    is noise.

    * ``seconds``: for timing alone, in all; compiling is not counted. At least ``least_turns`` are taken.
    * ``clock``: seconds, as of ``time.perf_counter``.
    """

    seconds: float = 10.0
    margin: float = 0.05
    finalists: int = 3
    least_turns: int = 3
    most_turns: int = 50
    clock: Callable[[], float] = time.perf_counter

    def once(self, call: Callable[[], Any]) -> float:
        """Seconds of one call, waited for."""
        start = self.clock()
        jax.block_until_ready(call())
        return self.clock() - start

    def turns_within(self, seconds: float, a_turn: float) -> int:
        """How many turns of ``a_turn`` seconds there is time for."""
        return int(min(max(seconds / max(a_turn, 1e-9), self.least_turns), self.most_turns))

    def samples(
        self,
        calls: Mapping[Name, Callable[[], Any]],
        turns: int,
        on_turn: Callable[[], None] = lambda: None,
    ) -> dict[Name, list[float]]:
        """Seconds a call of each, turn by turn, after one call of each that is not counted."""
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
    """The median over turns of one candidate's seconds over another's."""
    return statistics.median(a / max(b, 1e-12) for a, b in zip(seconds, to, strict=True))
