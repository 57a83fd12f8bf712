"""Tuning: what wins, what is left out and why, what is stored; times are invented, so that no machine decides."""

import dataclasses
import json
import os
import sys

import jax
import jax.numpy as jnp
import pytest

import paged
from paged.lower.tuning.timing import median_ratio
from paged.lower.xla import XLA_BLOCKS

from .small import BATCH, CALL, LAYOUT, PAGES, SPEC, Q, chosen, entry, key, stored

ATTEND = paged.lower(SPEC, LAYOUT)
OWN = ATTEND.choice(CALL)[1]
A, B, C = (OWN.replace(pages_per_block=pages, blocks_per_step=1) for pages in (1, 2, 4))


@dataclasses.dataclass(frozen=True)
class Invented(paged.Timing):
    """A timing with invented seconds per schedule and round; 1 second by default."""

    times: tuple[dict, ...] = ({}, {})
    rounds: list = dataclasses.field(default_factory=list)

    def samples(self, calls, turns, on_turn=lambda: None):
        for call in calls.values():
            call()
        for _ in range(turns):
            on_turn()
        times = self.times[len(self.rounds)]
        self.rounds.append(tuple(calls))
        return {schedule: [times.get(schedule, 1.0)] * turns for schedule in calls}


@pytest.fixture(autouse=True)
def _few_candidates(monkeypatch):
    """Three alternatives, each compiled once for all tests."""
    monkeypatch.setattr(type(XLA_BLOCKS), "alternatives", lambda *_: iter((A, B, C)))
    monkeypatch.setattr(sys.modules["paged.lower.tuning._tune"], "_jitted", lambda attend: attend)


def _tune(timing, attend=ATTEND, **options):
    return paged.tune(attend, Q, PAGES, BATCH, timing=timing, **{"file": "off", **options})


def test_the_best_of_the_last_round_wins():
    """A is faster in the first round only, and the second round decides."""
    timing = Invented(times=({A: 0.2, B: 0.5, C: 0.6}, {A: 1.5, B: 0.5, C: 0.6}), finalists=2)
    tuned = _tune(timing)
    assert (tuned.schedule, tuned.heuristic, tuned.ratio, tuned.source) == (B, OWN, 0.5, "timed")
    assert timing.rounds == [(OWN, A, B, C), (OWN, A, B)]
    assert [trial.schedule for trial in tuned.trials] == [OWN, A, B, C]
    assert [trial.is_final for trial in tuned.trials] == [True, True, True, False]
    assert [trial.ratio for trial in tuned.trials] == [1.0, 1.5, 0.5, 0.6]
    lines = str(tuned).splitlines()
    assert lines[4].endswith("first round:") and str(C) in lines[5] and len(lines) == 7
    assert "<- heuristic" in lines[1] and "<- best" in lines[3] and lines[-1].startswith(f"{B} wins at 0.50")


@pytest.mark.parametrize(("seconds", "winner"), [(0.96, OWN), (0.94, C)])
def test_the_heuristic_stays_unless_beaten_by_the_margin(seconds, winner):
    tuned = _tune(Invented(times=({C: seconds}, {C: seconds})))
    assert tuned.schedule == winner
    assert ("stays" in str(tuned)) == (winner == OWN) and tuned.ratio == (1.0 if winner == OWN else seconds)


def test_what_fails_or_is_wrong_is_left_out_with_its_reason(monkeypatch):
    state = type(XLA_BLOCKS).state

    def sabotaged(self, program, schedule, *args):
        if schedule == A:
            raise NotImplementedError("Mosaic: no such layout\nand a page of stack")
        found = state(self, program, schedule, *args)
        return found._replace(out=found.out * 1.2) if schedule == B else found

    monkeypatch.setattr(type(XLA_BLOCKS), "state", sabotaged)
    monkeypatch.setattr(type(XLA_BLOCKS), "alternatives", lambda *_: iter((A, B)))
    times = {A: 0.1, B: 0.1}
    fresh = paged.lower(SPEC.replace(window=6), LAYOUT)  # no other test has compiled this spec
    tuned = _tune(Invented(times=(times, times)), fresh)
    reasons = {trial.schedule: trial.reason for trial in tuned.trials}
    assert tuned.schedule == OWN and reasons[OWN] is None
    assert reasons[A] == "NotImplementedError: Mosaic: no such layout" and "results differ" in reasons[B]
    assert f"{A}: NotImplementedError" in str(tuned)


def test_a_fault_of_the_heuristics_own_choice_is_raised(monkeypatch):
    def broken(*_):
        raise NotImplementedError("a real bug")

    monkeypatch.setattr(type(XLA_BLOCKS), "state", broken)
    with pytest.raises(NotImplementedError, match="a real bug"):
        _tune(Invented(), paged.lower(SPEC.replace(window=7), LAYOUT))


def test_the_winner_is_stored_and_found_and_timed_again_when_asked(tmp_path):
    path = tmp_path / "tuned.json"
    first = _tune(Invented(times=({B: 0.5},) * 2), file=path)
    assert first.stored == path and first.schedule == B
    with paged.schedules(path):
        assert chosen(paged.lower(SPEC, LAYOUT)) == (B, "context, tuning file tuned.json")
    untimed = Invented(times=())
    found = _tune(untimed, file=path)
    assert (found.schedule, found.ratio, found.source, found.trials) == (B, 0.5, "tuning file tuned.json", ())
    assert not untimed.rounds
    again = _tune(Invented(times=({C: 0.5},) * 2), file=path, again=True)
    assert again.schedule == C and len(paged.TuningFile(path).entries()) == 1


def test_the_heuristics_choice_is_stored_too(tmp_path, monkeypatch):
    """A stored heuristic is not timed again, and `explain` names the file."""
    monkeypatch.setenv("PAGED_TUNING", str(tmp_path / "tuned.json"))
    tuned = _tune(Invented(), file=None)
    assert tuned.stored == tmp_path / "tuned.json"
    assert chosen(paged.lower(SPEC, LAYOUT)) == (OWN, "tuning file tuned.json")


def test_with_tuning_off_nothing_is_stored():
    assert os.environ["PAGED_TUNING"] == "off" and _tune(Invented(), file=None).stored is None


@pytest.mark.parametrize(
    "schedule", ["magic", {"lowering": "elsewhere", "pages_per_block": 1}, {"pages_per_block": 0}, {"buffers": 9}]
)
def test_an_entry_that_cannot_run_is_warned_of_and_tuned_again(tmp_path, schedule):
    path = tmp_path / "tuned.json"
    stored(path, entry())
    content = json.loads(path.read_text())
    whole = content["entries"][0]["schedule"]
    content["entries"][0]["schedule"] = {**whole, **schedule} if isinstance(schedule, dict) else schedule
    path.write_text(json.dumps(content))
    with pytest.warns(paged.TuningWarning, match="tuned again"):
        tuned = _tune(Invented(times=({A: 0.5},) * 2), file=path)
    assert tuned.source == "timed" and paged.TuningFile(path).entries()[0].parsed() == A


def test_another_devices_entry_is_tuned_beside_it(tmp_path):
    file = stored(tmp_path / "tuned.json", entry(of=key(device="abacus")))
    assert _tune(Invented(), file=file).source == "timed" and len(file.entries()) == 2


def test_where_nothing_can_be_written_that_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(paged.TuningWarning) as caught:
        tuned = _tune(Invented(), file=tmp_path / "file" / "tuned.json")
    assert ["is ignored" in str(caught[0].message), "not stored" in str(caught[1].message), len(caught)] == [1, 1, 2]
    assert tuned.stored is None and tuned.schedule == OWN


def test_progress_goes_up_to_the_end():
    said = []
    _tune(Invented(seconds=1e-9), progress=lambda *step: said.append(step))
    done = [step[0] for step in said]
    assert done == sorted(done) and said[-1][:2] == (4 + 3 + 3, 4 + 3 + 3) and f"compiling {A}" in [s[2] for s in said]


def test_what_cannot_be_tuned_is_refused():
    with pytest.raises(TypeError, match=r"attention on one device.*got AttentionSpec"):
        _tune(Invented(), SPEC)
    with pytest.raises(ValueError, match=r"nothing to tune: .*lowered without schedule="):
        _tune(Invented(), paged.lower(SPEC, LAYOUT, schedule=A))
    interpreted = paged.lower(SPEC, dataclasses.replace(LAYOUT, page_size=8), "tpu", interpret=True)
    with pytest.raises(ValueError, match="times say nothing about a chip"):
        _tune(Invented(), interpreted)
    with pytest.raises(ValueError, match=r"outside of jax\.jit"):
        jax.jit(lambda q: paged.tune(ATTEND, q, PAGES, BATCH))(Q)


class Clock:
    """A clock that advances only in calls."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def call(self, *seconds):
        """A call that takes these times in turn, and then always the last one."""
        left = list(seconds)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return jnp.zeros(())

        return run


def test_candidates_take_turns_after_one_call_that_is_not_counted():
    clock, order = Clock(), []
    slow, fast = clock.call(9.0, 3.0, 5.0), clock.call(7.0, 1.0)
    calls = {"slow": lambda: (order.append("slow"), slow())[1], "fast": lambda: (order.append("fast"), fast())[1]}
    samples = paged.Timing(clock=clock).samples(calls, turns=3)
    assert samples == {"slow": [3.0, 5.0, 5.0], "fast": [1.0, 1.0, 1.0]}
    assert order == ["slow", "fast", "slow", "fast", "fast", "slow", "slow", "fast"]
    assert median_ratio(samples["slow"], samples["fast"]) == 5.0


def test_short_calls_are_timed_several_at_once():
    clock, calls = Clock(), []
    short = clock.call(2.0**-11)
    samples = paged.Timing(clock=clock).samples({"short": lambda: (calls.append(1), short())[1]}, turns=2)
    assert samples == {"short": [2.0**-11] * 2} and len(calls) == 1 + 2 * 5, "2 ms hold five of 0.49 ms"


@pytest.mark.parametrize(("seconds", "a_turn", "turns"), [(5.0, 0.5, 10), (5.0, 60.0, 3), (5.0, 1e-9, 50)])
def test_turns_fit_the_time_there_is_within_bounds(seconds, a_turn, turns):
    assert paged.Timing().turns_within(seconds, a_turn) == turns
