"""Every planted bug of the list dies by its check, and without a bug every trial passes."""

import collections

import pytest

from .base import run
from .table import MUTANTS
from .trials import TRIALS


def _few():
    """Of each kind of bug the first one that may run always: the others are much like it."""
    few, counts = [], collections.Counter()
    for mutant in MUTANTS:
        counts[mutant.kind] += mutant.in_every_run
        if mutant.in_every_run and (counts[mutant.kind] <= 1 or mutant.kind in ("masks", "scores")):
            few.append(mutant)
    return few


FEW = _few()
IN_EVERY_RUN = {mutant.trial for mutant in FEW}


# Trials of seconds each, of bugs that are much like others in the list.
LONGEST = (
    "pool, the shortest",
    "pool: a slot that does not fit stops the next ones",
    "pool: pages are freed while the next token sees them",
    "decode: an item past the end together with the last",
    "decode: an empty item together with another",
    "decode: cursor a block ahead",
    "pool: new pages fill the entries of freed ones",
    "xla at once, decode",
    "xla at once, holes",
    "at once: the list of pages is too short",
    "at once: the last step is left out",
    "at once: values are only weighted",
    "at once: a page in place is seen",
)


# Of bugs of the interpreted kernels, which take seconds too, `make test-kernels` tries every other one.
MANY = [mutant for mutant in MUTANTS if mutant.kind in ("prefill", "decode")]


def _marked(name, value, in_every_run):
    later = pytest.mark.slow if name in LONGEST or value in MANY[1::2] else pytest.mark.kernels
    return pytest.param(value, id=name, marks=[] if in_every_run else [later])


@pytest.mark.parametrize("name", [_marked(name, name, name in IN_EVERY_RUN) for name in TRIALS])
def test_without_a_bug_the_trial_passes(name):
    TRIALS[name]()


@pytest.mark.parametrize("mutant", [_marked(f"{m.kind}: {m.name}", m, m in FEW) for m in MUTANTS])
def test_a_planted_bug_dies_by_its_check(mutant):
    result = run(mutant)
    assert result.killed_by == mutant.killed_by, result.said
    assert mutant.sees in result.said


def test_every_row_has_a_name_of_its_own_and_every_trial_a_row():
    assert len({(mutant.kind, mutant.name) for mutant in MUTANTS}) == len(MUTANTS)
    assert {mutant.trial for mutant in MUTANTS} == set(TRIALS)
