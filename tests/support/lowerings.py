"""The table of lowerings that every property is crossed with, and cached calls of them."""

import functools

import pytest

import paged
from paged.lower import LOWERINGS, Attend, Lowering, Program
from paged.spec import AttentionState
from paged.testing import Built, Case

# One row a lowering that runs compiled on any machine: a new one in `paged.lower.LOWERINGS` is tested from the day it
# is listed. Kernels are not here: off their device they are interpreted, which takes seconds a case where these take
# milliseconds, so `tests/tpu` and `tests/gpu` have a matrix of their own, chosen to be small.
ALL_LOWERINGS: dict[str, Lowering] = {lowering.name: lowering for lowering in LOWERINGS if not lowering.has_kernels}

# Tests' sequences have a few pages, so a schedule for real ones would take them in one step: these make several.
SMALL_SCHEDULES = {"xla-blocks": {"pages_per_block": 2, "rows_per_tile": 4, "blocks_per_step": 1}}

# What differs by phase: prefill takes one block a step, decode several, and a ragged batch several steps of several.
PHASE_SCHEDULES = {
    ("xla-blocks", "decode"): {"blocks_per_step": 2},
    ("xla-blocks", "ragged"): {"pages_per_block": 1, "blocks_per_step": 2},
}

every_lowering = pytest.mark.parametrize("lowering", ALL_LOWERINGS)


@functools.cache
def lowered(lowering: str, case: Case, **schedule: int) -> Attend:
    """The case's attention on the named lowering, with a schedule for small cases; a refusal skips the test.

    Changes to the lowering's own schedule may be given instead; with ``own=1`` there are none.
    """
    chosen, program = ALL_LOWERINGS[lowering], Program.from_spec(case.spec)
    reason = chosen.refuses(program, case.layout)
    if reason is not None:
        pytest.skip(f"{lowering} refuses: {reason}")
    small = SMALL_SCHEDULES.get(lowering, {}) | PHASE_SCHEDULES.get((lowering, case.phase), {})
    changes = schedule or small
    own = chosen.schedule(program, case.layout)
    own = own if "own" in schedule else own.replace(**changes)
    return paged.lower(case.spec, case.layout, chosen.target, schedule=own)


def state_of(attend: Attend, built: Built) -> AttentionState:
    """The state of built arrays; compiled once for all cases of one shape class."""
    return attend.state(built.q, built.pages, built.batch, built.sinks)
