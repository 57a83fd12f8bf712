"""Every planted bug of the list dies by its check, and without a bug every trial passes."""

import pytest

from .base import run
from .table import MUTANTS
from .trials import TRIALS

IN_EVERY_RUN = {mutant.trial for mutant in MUTANTS if mutant.in_every_run}


def _marked(name, value, in_every_run):
    return pytest.param(value, id=name, marks=[] if in_every_run else [pytest.mark.kernels])


@pytest.mark.parametrize("name", [_marked(name, name, name in IN_EVERY_RUN) for name in TRIALS])
def test_without_a_bug_the_trial_passes(name):
    TRIALS[name]()


@pytest.mark.parametrize("mutant", [_marked(f"{m.kind}: {m.name}", m, m.in_every_run) for m in MUTANTS])
def test_a_planted_bug_dies_by_its_check(mutant):
    result = run(mutant)
    assert result.killed_by == mutant.killed_by, result.said
    assert mutant.sees in result.said


def test_every_row_has_a_name_of_its_own_and_every_trial_a_row():
    assert len({(mutant.kind, mutant.name) for mutant in MUTANTS}) == len(MUTANTS)
    assert {mutant.trial for mutant in MUTANTS} == set(TRIALS)
