"""`tune`: time the candidate schedules of a call on this process's device, and store the fastest."""

import dataclasses
import os
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged.spec import Flag, Pages, RaggedBatch, Sinks, as_bool, require_sinks

from ..attend import Attend
from ..base import Lowering, Schedule
from ..program import Call
from ..require import require_pages, require_queries
from ..schedule import Entry, Key, TuningFile, warn_once
from .result import Trial, Tuned
from .timing import DEFAULT, Timing, median_ratio

Progress = Callable[[int, int, str], None]

# Two schedules' results differ by rounding. Where they differ by more than this part of the largest value, one of them
# is wrong.
_MOST_DIFFERENCE = 0.05


def tune(
    attend: Attend,
    q: Float[Array, "tokens q_heads head_dim"],
    pages: Pages,
    batch: RaggedBatch,
    sinks: Sinks | None = None,
    *,
    file: str | os.PathLike[str] | TuningFile | None = None,
    again: Flag = False,
    timing: Timing = DEFAULT,
    progress: Progress | None = None,
) -> Tuned:
    """Time the schedules that a call could have on this device, and store the fastest for `lower` to find.

    A stored schedule serves every call of one class of shapes: each number rounded up to a power of two. Attentions
    that are lowered from then on use it. Time follows what is visible, so tune with lengths and tables like those that
    will be served.

    A candidate that does not compile, or whose results differ from the heuristic's, is left out, with the reason in its
    `Trial`. Another schedule wins over the heuristic's only where it is better by a margin, see `Timing`.

    **Arguments:**

    - `attend`: an attention on one device, lowered without ``schedule=`` and ``interpret=``.
    - `q`, `pages`, `batch`, `sinks`: the arrays of the call ``attend(q, pages, batch, sinks)``.
    - `file`: where to store the result: a path, a `TuningFile`, ``"off"`` for nowhere, or None for the process's file,
      see `TuningFile.at`.
    - `again`: whether to time a call that the file already has an entry for. False returns that entry.
    - `timing`: how long and how strictly to time.
    - `progress`: called on the way with the number of steps done, the number of all steps, and what is being done.

    **Returns:** the best schedule, and how it is known.

    Raises ``TypeError`` unless ``attend`` is an `Attend`; ``ValueError`` for one that has its schedule already or is
    interpreted, and for arrays without values; and what the heuristic's own schedule raises. A file that cannot be
    written is a `TuningWarning`.

    >>> spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=8)
    >>> layout = PageLayout(page_size=8, num_kv_heads=1, head_dim=8)
    >>> batch = RaggedBatch.decode(lengths=[9], block_tables=[[0, 1]])
    >>> q = jnp.ones((1, 2, 8))
    >>> tuned = tune(lower(spec, layout), q, layout.init(2), batch, file="off", timing=Timing(seconds=0.01))
    >>> tuned.schedule in [trial.schedule for trial in tuned.trials], tuned.stored
    (True, None)
    """
    _require_tunable(attend, (q, pages, batch, sinks))
    again = as_bool("again", again)
    require_queries(attend.spec, q, batch)
    require_pages(attend.layout, pages)
    require_sinks(attend.spec, sinks)
    if not isinstance(timing, Timing):
        raise TypeError(f"timing must be a paged.Timing, such as Timing(seconds=1.0); got {timing!r}.")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function (done, all, what), or None; got {progress!r}.")
    attend = dataclasses.replace(attend, check=False)
    call, where = Call.of(q, pages, batch), TuningFile.at(file)
    key = Key.of(attend.program, attend.layout, [lowering.name for lowering in attend.lowerings], call)
    candidates = _candidates(attend, call)
    known = None if where is None or again else _known(where, key, attend, call)
    if where is not None and known is not None:
        entry, schedule = known
        return Tuned(schedule, candidates[0][1], entry.ratio, str(where), stored=where.path)
    trials = _Trials(attend, (q, pages, batch, sinks), timing, progress).run(candidates)
    tuned = _decide(trials, timing)
    return tuned if where is None else _stored(where, key, tuned)


def _require_tunable(attend: Attend, arrays: Any) -> None:
    if not isinstance(attend, Attend):
        raise TypeError(f"tune takes an attention on one device, a paged.Attend; got {type(attend).__name__}.")
    if attend.pinned is not None:
        raise ValueError(
            f"There is nothing to tune: this attention was lowered with the schedule {attend.pinned}. Tune one that "
            "was lowered without schedule=."
        )
    if any(lowering.is_interpreted for lowering in attend.lowerings):
        raise ValueError(
            "Interpreted kernels cannot be tuned: their times say nothing about a chip. Lower without interpret=."
        )
    if any(isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(arrays)):
        raise ValueError("tune needs arrays with values, to time what they cost: call it outside of jax.jit.")


def _candidates(attend: Attend, call: Call) -> list[tuple[Lowering, Schedule]]:
    """The preferred lowering's candidates, the heuristic's first; and the heuristic's of each other lowering."""
    takers = [low for low in attend.lowerings if low.refuses(attend.program, attend.layout, call) is None]
    if not takers:
        attend.choice(call)  # raises, with every reason
    first, *others = takers
    found = [(first, schedule) for schedule in first.candidates(attend.program, attend.layout, call)]
    return found + [(low, low.schedule(attend.program, attend.layout, call)) for low in others]


def _known(file: TuningFile, key: Key, attend: Attend, call: Call) -> tuple[Entry, Schedule] | None:
    """The file's entry for exactly this call, and its schedule, if that can run."""
    entry = next((entry for entry in file.entries() if entry.key == key), None)
    if entry is None:
        return None
    try:
        schedule = entry.parsed()
    except (ValueError, TypeError) as error:
        warn_once(f"An entry of the {file} is ignored and tuned again: {error} It is for {key}.")
        return None
    lowering = next((low for low in attend.lowerings if low.name == schedule.lowering), None)
    if lowering is None:
        reason: str | None = f'there is no lowering "{schedule.lowering}" here.'
    else:
        reason = lowering.cannot_honour(attend.program, attend.layout, call, schedule)
    if reason is not None:
        warn_once(f"The {file} has the schedule {schedule}, which cannot run here: {reason} The call is tuned again.")
        return None
    return entry, schedule


@dataclasses.dataclass
class _Trials:
    """The trials of one `tune`: compiled calls, reasons for those left out, and how much is done."""

    attend: Attend
    arrays: tuple[Any, ...]
    timing: Timing
    progress: Progress | None
    done: int = 0
    total: int = 0

    def run(self, candidates: list[tuple[Lowering, Schedule]]) -> list[Trial]:
        """A trial per candidate, timed or left out. The first candidate is the heuristic's."""
        own = candidates[0][1]
        self.total = len(candidates)
        calls, reasons = self._compiled(candidates)
        a_turn = {schedule: self.timing.once(call) for schedule, call in calls.items()}
        first = self._round(calls, a_turn)
        ranked = sorted(first, key=lambda schedule: median_ratio(first[schedule], first[own]))
        best = [schedule for schedule in ranked if schedule != own][: self.timing.finalists]
        last = self._round({schedule: calls[schedule] for schedule in (own, *best)}, a_turn)
        self._say(0, "done")

        def trial(schedule: Schedule) -> Trial:
            if schedule in reasons:
                return Trial(schedule, reason=reasons[schedule])
            times = last if schedule in last else first
            ratio = median_ratio(times[schedule], times[own])
            return Trial(schedule, statistics.median(times[schedule]), ratio, schedule in last)

        return [trial(schedule) for _, schedule in candidates]

    def _compiled(self, candidates: Any) -> tuple[dict[Schedule, Callable[[], Any]], dict[Schedule, str]]:
        """Calls that ran once with the results of the first candidate, and for the other candidates the reason."""
        calls: dict[Schedule, Callable[[], Any]] = {}
        reasons: dict[Schedule, str] = {}
        wanted = None
        for lowering, schedule in candidates:
            self._say(0, f"compiling {schedule}")
            pinned = dataclasses.replace(self.attend, lowerings=(lowering,), pinned=schedule)
            function = _jitted(pinned)
            try:
                out = jax.block_until_ready(function(*self.arrays))
            except Exception as error:  # compilers raise many kinds, none of them public
                if wanted is None:
                    raise  # this one would run without tuning too, so the fault is the call's and not a candidate's
                reasons[schedule] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            else:
                wanted = out if wanted is None else wanted
                if _differ(out, wanted):
                    reasons[schedule] = "its results differ from those of the heuristic's choice"
                else:
                    calls[schedule] = lambda function=function: function(*self.arrays)
            self._say(1, f"compiled {schedule}")
        return calls, reasons

    def _round(self, calls: dict[Schedule, Callable[[], Any]], a_turn: dict[Schedule, float]) -> dict[Schedule, Any]:
        """Samples of each call, in half of the time that there is."""
        expected = sum(a_turn[schedule] for schedule in calls)
        turns = self.timing.turns_within(self.timing.seconds / 2, expected)
        self.total += turns
        what = f"timing {len(calls)} candidates"
        return self.timing.samples(calls, turns, lambda: self._say(1, what))

    def _say(self, steps: int, what: str) -> None:
        self.done += steps
        if self.progress is not None:
            self.progress(self.done, self.total, what)


def _jitted(attend: Attend) -> Callable[..., Array]:
    """The call as a larger program would contain it: compiled, without the checks of its arguments."""
    return jax.jit(attend.__call__)


def _differ(out: Array, wanted: Array) -> bool:
    a, b = out.astype(jnp.float32), wanted.astype(jnp.float32)
    largest = jnp.max(jnp.where(jnp.isfinite(b), jnp.abs(b), 0.0))
    close = (jnp.abs(a - b) <= _MOST_DIFFERENCE * largest) | (a == b) | (jnp.isnan(a) & jnp.isnan(b))
    return not bool(jnp.all(close))


def _decide(trials: list[Trial], timing: Timing) -> Tuned:
    """The best schedule of the last round, if it is better than the heuristic's by the margin; else the heuristic's."""
    own = trials[0]
    finalists = [trial for trial in trials if trial.is_final and trial.ratio is not None]
    best = min(finalists, key=lambda trial: trial.ratio or 0.0)
    winner = best if best.ratio is not None and best.ratio < 1 - timing.margin else own
    return Tuned(winner.schedule, own.schedule, winner.ratio or 1.0, "timed", tuple(trials))


def _stored(file: TuningFile, key: Key, tuned: Tuned) -> Tuned:
    (best,) = (trial for trial in tuned.trials if trial.schedule == tuned.schedule)
    entry = Entry(key, tuned.schedule.to_json(), best.seconds or 0.0, tuned.ratio)
    try:
        file.store([entry])
    except OSError as error:
        warn_once(f"The schedule is not stored: {error}.")
        return tuned
    return dataclasses.replace(tuned, stored=file.path)
