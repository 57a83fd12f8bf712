"""The table of lowerings that every property is crossed with, and cached calls of them."""

import functools

import pytest

import paged
from paged.lower import LOWERINGS, Attend, Lowering, Program
from paged.spec import AttentionState

from .arrays import Built
from .cases import Case

# One row a lowering: a new one in `paged.lower.LOWERINGS` is tested from the day it is listed.
ALL_LOWERINGS: dict[str, Lowering] = {lowering.name: lowering for lowering in LOWERINGS}

every_lowering = pytest.mark.parametrize("lowering", ALL_LOWERINGS)


@functools.cache
def lowered(lowering: str, case: Case, **schedule: int) -> Attend:
    """The case's attention on the named lowering, with changes to its schedule; a refusal skips the test."""
    chosen, program = ALL_LOWERINGS[lowering], Program.from_spec(case.spec)
    reason = chosen.refuses(program, case.layout)
    if reason is not None:
        pytest.skip(f"{lowering} refuses: {reason}")
    own = chosen.schedule(program, case.layout).replace(**schedule)
    return paged.lower(case.spec, case.layout, chosen.target, schedule=own)


def state_of(attend: Attend, built: Built) -> AttentionState:
    """The state of built arrays; compiled once for all cases of one shape class."""
    return attend.state(built.q, built.pages, built.batch, built.sinks)
