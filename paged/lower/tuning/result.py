"""`Tuned` and `Trial`: the result of tuning, as values and as a table."""

import dataclasses
import pathlib

from ..base import Schedule


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate of `tune`, timed or left out.

    * ``schedule``: the candidate.
    * ``seconds``: the median of its times; None where it was left out.
    * ``ratio``: its time over that of the heuristic's schedule, the median over turns in which both were timed.
    * ``is_final``: whether it was in the last round, which decides.
    * ``reason``: why it was left out; None where it was timed.
    """

    schedule: Schedule
    seconds: float | None = None
    ratio: float | None = None
    is_final: bool = False
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The result of `tune`: the best schedule for a call, and how it is known. ``str`` of it is a table.

    * ``schedule``: the best schedule.
    * ``heuristic``: the schedule that would run without tuning.
    * ``ratio``: the time of ``schedule`` over the time of ``heuristic``.
    * ``source``: ``"timed"``, or the name of the tuning file that already had the entry.
    * ``trials``: every candidate; empty where a tuning file had the entry.
    * ``stored``: the path of the file that holds the entry now; None where it is not stored.
    """

    schedule: Schedule
    heuristic: Schedule
    ratio: float
    source: str
    trials: tuple[Trial, ...] = ()
    stored: pathlib.Path | None = None

    def __str__(self) -> str:
        lines = [f"{'median':>10}  {'ratio':>5}  schedule"] if self.trials else []
        lines += [_line(trial, self) for trial in self.trials if trial.is_final]
        others = [_line(trial, self) for trial in self.trials if not trial.is_final]
        lines += ["left out, or slower in the first round:", *others] if others else []
        verb = "stays" if self.schedule == self.heuristic else "wins"
        lines.append(f"{self.schedule} {verb} at {self.ratio:.2f} of the heuristic's time ({self.source})")
        return "\n".join(lines)


def _line(trial: Trial, tuned: Tuned) -> str:
    if trial.seconds is None or trial.ratio is None:
        return f"{'-':>10}  {'-':>5}  {trial.schedule}: {trial.reason}"
    marks = [name for name, of in (("heuristic", tuned.heuristic), ("best", tuned.schedule)) if trial.schedule == of]
    return f"{_duration(trial.seconds):>10}  {trial.ratio:5.2f}  {trial.schedule}" + (
        f"  <- {', '.join(marks)}" if marks else ""
    )


def _duration(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} us" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms"
