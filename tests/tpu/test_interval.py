"""The decode kernel on page intervals: the scalar core computes the work from lengths and block tables.

A window makes every phase of an item: masked blocks at its beginning, blocks that are seen in full, and masked ones at
its end. One kernel serves most of this file; `test_edges` has the edges of `docs/semantics.md`, on intervals as well.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from paged.lower import Call, DecodeSchedule
from paged.lower.tpu import CHIPS
from paged.lower.tpu.decode.plan import intervals_of
from paged.lower.tpu.pages.stream import Stream
from paged.spec import Prefix, Window
from paged.testing import Corner
from tests.mutants.planting import all_of, method, nothing, planted
from tests.support import Case, build, exact_state
from tests.support.listed import Listed
from tests.support.specs import PLAIN

from .interpreter import assert_equals_reference, interpreted, without_page

# Windows that begin in the middle of a page: 44 of at most 80 tokens.
CASE = Case(spec=PLAIN.replace(window=44), page_size=8, phase="decode", pages_per_seq=10)
SCHEDULE = DecodeSchedule(pages_per_block=2, buffers=3)
LONG = Corner(((10, 0), (10, -3), (9, 1), (7, 4), (8, 0)), (1,) * 5)
# Slots without a token between slots with some, and slots that see less than a page.
SPARSE = Corner(((0, 0), (8, 3), (0, 0), (0, 0), (10, 0)), (1,) * 5)
SPLIT = DecodeSchedule(pages_per_block=2, buffers=2, kv_splits=2, cores=2, sequence="grid")


def _built(corner, **changes):
    return build(CASE.replace(corner=corner), **changes)


def _attend(schedule=SCHEDULE, case=CASE):
    return interpreted(case.replace(corner="mixed"), schedule)


def _with_tables(built, tables):
    return dataclasses.replace(built, batch=dataclasses.replace(built.batch, block_tables=tables))


def _assert_nothing_is_seen(state, rows):
    assert not np.asarray(state.out)[rows].any() and np.isneginf(np.asarray(state.lse)[rows]).all()


def _with_holes(built, holes):
    """Built arrays with holes in the tables, ``holes`` of a sequence and a page, and what is visible then."""
    table = built.batch.block_tables
    for i, (seq, page) in enumerate(holes):
        table = table.at[seq, page].set([-1, built.pages.num_pages, 2**31 - 1, -(2**31)][i % 4])
        built = without_page(built, [seq], page)
    return _with_tables(built, table)


def test_the_kernel_of_this_file_has_no_lists():
    """And what is no run of pages, rows that are not even, or a table of holes has them."""
    attend, built = _attend(), _built(LONG)
    call = Call.of(built.q, built.pages, built.batch)

    def has_intervals(call, mask=None):
        program = dataclasses.replace(attend.program, **({} if mask is None else {"visibility": mask}))
        return intervals_of(program, attend.layout, call, SCHEDULE, CHIPS["v4"]) is not None

    assert has_intervals(call) and has_intervals(call, Prefix(3))
    assert not has_intervals(call, Listed())
    for facts in ({"has_holes": True}, {"has_even_starts": False}, {"num_pages": 0}, {"pages_per_seq": 2**18}):
        assert not has_intervals(dataclasses.replace(call, **facts))


@pytest.mark.parametrize("corner", [LONG, SPARSE, "few live", "one token"], ids=["long", "sparse", "few", "one"])
def test_windows_slots_without_tokens_and_dead_slots(corner):
    got = assert_equals_reference(_attend(), _built(corner))
    if corner == SPARSE:
        _assert_nothing_is_seen(got, np.array([0, 2, 3]))


@pytest.mark.kernels
@pytest.mark.parametrize("is_split", [False, True])
def test_holes_in_every_phase_of_a_sequence_hide_their_tokens(is_split):
    """In the masked blocks at both ends, in blocks seen in full, two in one block, a whole block, and everywhere."""
    holes = [(0, 5), (1, 9), (1, 7), (2, 4), (2, 5), (3, 1), (3, 3), *((4, page) for page in range(2, 8))]
    got = assert_equals_reference(_attend(SPLIT if is_split else SCHEDULE), _with_holes(_built(LONG), holes))
    _assert_nothing_is_seen(got, slice(4, 5))


def test_holes_that_no_visible_key_needs_change_nothing():
    """Pages before the window were given back: their entries are -1, and those past the length hold anything."""
    built = _built(LONG)
    first = np.array([int(seen[0]) // CASE.page_size for seen in built.visible])
    page = np.arange(CASE.pages_per_seq)[None]
    given_back = jnp.where(page < first[:, None], -1, built.batch.block_tables)
    assert_equals_reference(_attend(), _with_tables(built, given_back))


@pytest.mark.kernels
@pytest.mark.parametrize("corner", [LONG, SPARSE], ids=["long", "sparse"])
def test_splits_on_two_cores(corner):
    assert_equals_reference(_attend(SPLIT), _built(corner))


@pytest.mark.kernels
@pytest.mark.parametrize("scales", ["token", "head"])
def test_holes_of_quantised_pages(scales):
    """Scales of a page that another sequence owns may be NaN."""
    case = CASE.replace(dtype="int8", scales=scales, corner=LONG)
    holed = _with_holes(build(case), [(0, 6), (1, 9), (3, 7)])
    assert_equals_reference(interpreted(case.replace(corner="mixed"), SCHEDULE, "eager"), holed)


BUGS = {
    "holes not looked for": method(Stream, "has_holes", lambda original: lambda self, stage: jnp.bool_(False)),
    "holes not hidden": all_of(
        method(Stream, "hide_holes", nothing),
        method(Stream, "present", lambda original: lambda self, views, stage: None),
    ),
}
_FAST = ("holes not hidden",)


@pytest.mark.parametrize("bug", [pytest.param(bug, marks=[pytest.mark.kernels] * (bug not in _FAST)) for bug in BUGS])
def test_a_planted_bug_of_holes_is_seen(bug):
    holed = _with_holes(_built(LONG), [(0, 6), (1, 9)])
    exact_state(holed)  # by code without the bug
    with planted(BUGS[bug]), pytest.raises(AssertionError):
        assert_equals_reference(_attend(), holed)


def test_scales_of_pages_that_a_block_lacks_are_not_read():
    """The last visible page is not the sequence's last one. Beside it is memory that nothing has written yet."""
    spec = CASE.spec.replace(window=None, mask=~Window(20))
    case = CASE.replace(spec=spec, dtype="int8", scales="token", corner=Corner(((5, 2),) * 5, (1,) * 5))
    assert_equals_reference(interpreted(case.replace(corner="mixed"), SCHEDULE), build(case))
