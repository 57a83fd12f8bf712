"""Items of one block, which the TPU decode kernel works on together, beside longer and empty ones; paired heads."""

import dataclasses

import pytest

from paged.lower import Call, DecodeSchedule
from paged.lower.tpu import CHIPS
from paged.lower.tpu.decode import kernel as decode
from paged.lower.tpu.decode.plan import plan_schedule
from paged.lower.tpu.pages.views import Views
from paged.spec import AttentionSpec
from tests.support import Case, build

from .interpreter import assert_equals_reference, interpreted

# Corners, and which of their five sequences are worked on together, in blocks of three pages.
CORNERS = {
    "mixed": "the first two; then an empty one, one alone and a longer one",
    "one past a page": "the first two and, after a longer one, the last two, where a core ends",
    "one token": "two, two, and one is left over",
    "few live": "none: a longer one, a short one, and dead slots",
    "no rows in the middle": "the last two, after one alone",
}
CASE = Case(
    spec=AttentionSpec(num_q_heads=8, num_kv_heads=4, head_dim=64, sinks=True),
    page_size=16,
    order="joined",
    dtype="bfloat16",
    q_dtype="bfloat16",
    phase="decode",
    sink_shape=(8,),
)
SCHEDULE = DecodeSchedule(pages_per_block=3, buffers=4)
TWO_CORES = {"cores": 2, "kv_splits": 2}


def _counted(monkeypatch, name):
    calls, method = [], getattr(decode.Decode, name)
    monkeypatch.setattr(decode.Decode, name, lambda self, *args: calls.append(name) or method(self, *args))
    return calls


@pytest.mark.parametrize(
    ("rows", "schedule", "mode", "corners"),
    [
        (1, {}, "on_wait", CORNERS),
        (2, {"buffers": 5}, "eager", CORNERS),
        # Two cores are interpreted five times as slowly: here the corners in which a core begins or ends.
        (1, TWO_CORES, "on_wait", ("mixed", "one past a page")),
        (1, {"sequence": "grid"}, "eager", CORNERS),
    ],
)
@pytest.mark.kernels
def test_short_items_together_equal_the_reference(rows, schedule, mode, corners, monkeypatch):
    together = _counted(monkeypatch, "_run_together")
    case = CASE.replace(rows=rows, seed=rows)
    attend = interpreted(case, SCHEDULE.replace(**schedule), mode)
    for corner in corners:
        assert_equals_reference(attend, build(case.replace(corner=corner)))
    assert bool(together) == (schedule.get("sequence") != "grid")


@pytest.mark.slow
def test_two_cores_equal_the_reference_in_every_corner():
    attend = interpreted(CASE.replace(rows=1, seed=1), SCHEDULE.replace(**TWO_CORES), "on_wait")
    for corner in CORNERS:
        assert_equals_reference(attend, build(CASE.replace(rows=1, seed=1, corner=corner)))


@pytest.mark.parametrize(
    ("buffers", "generation"),
    [(3, "v4"), *(pytest.param(*x, marks=pytest.mark.kernels) for x in ((2, "v4"), (4, "v5e")))],
)
def test_with_few_buffers_or_slow_memory_items_go_alone(buffers, generation, monkeypatch):
    together = _counted(monkeypatch, "_run_together")
    case = CASE.replace(seed=9 + buffers)
    attend = interpreted(case, SCHEDULE.replace(buffers=buffers), generation=generation)
    assert_equals_reference(attend, build(case))
    assert not together


def _views(**changes):
    views = Views(CASE.layout, pages_per_block=3, query_rows=1, group=8, compute_dtype="bfloat16", is_paired=True)
    return dataclasses.replace(views, **changes)


def test_which_heads_can_be_paired():
    """Whole registers of keys and of values, an even number of heads, and no per-token scales."""
    assert _views().can_pair and _views().tiles == 2 and _views().tile_rows == 16
    wide = dataclasses.replace(CASE.spec, head_dim=128)
    odd = dataclasses.replace(CASE.spec, num_q_heads=3, num_kv_heads=3)
    for case in (CASE.replace(spec=wide), CASE.replace(spec=wide, order="packed")):
        assert _views(layout=case.layout, is_paired=False).can_pair
    for case in (
        CASE.replace(spec=odd),
        CASE.replace(order="packed"),
        CASE.replace(spec=wide, order="interleaved"),
        CASE.replace(spec=wide, order="packed", dtype="int8", scales="token"),
    ):
        assert not _views(layout=case.layout, is_paired=False).can_pair


@pytest.mark.parametrize("pages_per_seq", [19, 256])
def test_short_sequences_get_buffers_for_items_together(pages_per_seq):
    """The heuristic proposes more buffers where every sequence fits a block."""
    spec = AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128)
    case = Case(spec=spec, page_size=16, dtype="bfloat16", q_dtype="bfloat16")
    call = Call(
        tokens=64, slots=64, pages_per_seq=pages_per_seq, num_pages=2**14, query_rows=1, q_dtype=case.layout.dtype
    )
    program = interpreted(case.replace(phase="decode")).program
    schedule = plan_schedule(program, case.layout, call, CHIPS["tpu7x"])
    assert schedule.pages_per_block == 32 and schedule.buffers == (4 if pages_per_seq == 19 else 3)


@pytest.mark.kernels
def test_items_together_may_take_a_shorter_body_than_a_block(monkeypatch):
    """Blocks have four pages, and the scores of two items fit with two pages each. Items of three pages go alone."""
    monkeypatch.setattr(decode, "_SCORES_TOGETHER", 2 * 16 * 128)
    together = _counted(monkeypatch, "_run_together")
    case = CASE.replace(spec=AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=64), sink_shape=None, page_size=64)
    attend = interpreted(case, SCHEDULE.replace(pages_per_block=4))
    for corner in ("exact pages", "mixed"):
        assert_equals_reference(attend, build(case.replace(corner=corner)))
    assert together
