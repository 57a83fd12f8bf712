"""Kernels accept a planned step: the same bits, and no list is made where the step is planned."""

import jax
import numpy as np
import pytest

from paged.lower import DecodeSchedule, RaggedSchedule
from paged.lower.tpu.prefill.lists import Listed
from paged.spec import Prefix, Window
from tests.support import Case, build
from tests.support.jaxprs import primitives
from tests.support.specs import PLAIN

from .edges import with_scalar_memory
from .interpreter import interpreted, watched

LISTED = PLAIN.replace(mask=Window(9) | Prefix(3))  # its pages are no interval, so they are listed
SMALL = RaggedSchedule(pages_per_block=16, single_rows=DecodeSchedule(pages_per_block=2), rows_per_tile=16)
LISTS = {"sort", "cumsum", "cummin"}
CASES = {
    "decode, listed": (Case(spec=LISTED, page_size=8, phase="decode", rows=2), DecodeSchedule(pages_per_block=2)),
    "ragged, listed": (Case(spec=LISTED, page_size=8, corner="few live"), SMALL),
    "ragged": (Case(spec=PLAIN, page_size=8), None),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("ragged")) for name in CASES]
)
def test_a_plan_gives_what_its_batch_gives_bitwise(name):
    case, schedule = CASES[name]
    built, attend = build(case, hold_new=False), interpreted(case, schedule, generation="v5e")
    plan = attend.plan(built.q, built.pages, built.batch)
    got, want = (
        watched(attend.update_state, built.q, built.k, built.v, built.pages, step) for step in (plan, built.batch)
    )
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(*(np.asarray(x).view(np.uint8) for x in (one, other)))
    if plan.seqs.planned is not None:
        assert not LISTS & set(primitives(jax.make_jaxpr(attend)(built.q, built.pages, plan).jaxpr))


def test_only_what_is_no_interval_is_listed():
    for spec, is_listed in ((LISTED, True), (PLAIN, False)):
        case = Case(spec=spec, page_size=8, phase="decode", rows=2)
        built = build(case)
        plan = interpreted(case, generation="v5e").plan(built.q, built.pages, built.batch)
        assert (plan.seqs.planned is not None) == is_listed


# One kernel, and a loop of kernels for some of the tiles and some of their pages each.
@pytest.mark.parametrize("smem_bytes", [2**20, pytest.param(481, marks=pytest.mark.kernels)])
def test_a_planned_ragged_call_sorts_nothing(smem_bytes):
    case, schedule = CASES["ragged, listed"]
    built, attend = build(case), with_scalar_memory(case, smem_bytes, schedule)
    plan = attend.plan(built.q, built.pages, built.batch)
    assert isinstance(plan.seqs.planned.tiled, Listed) == (smem_bytes < 2**20)
    assert "sort" not in set(primitives(jax.make_jaxpr(attend)(built.q, built.pages, plan).jaxpr))
