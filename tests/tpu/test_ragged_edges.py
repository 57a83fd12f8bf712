"""The TPU prefill kernel's own edges: whole blocks, tiles of every size, single rows, and lists that are too long."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import paged
from paged.lower import DecodeSchedule, RaggedSchedule
from paged.lower.program import Wanted
from paged.lower.tpu import CHIPS, TpuDecode
from paged.lower.tpu.prefill.launch import PrefillLaunch
from paged.spec import AttentionSpec
from paged.testing.runners import LONG
from tests.support import Case, Corner, build
from tests.support.specs import PLAIN

from .edges import (
    assert_gradients_are_those_of_xla,
    items_of_launches,
    with_scalar_memory,
)
from .interpreter import assert_equals_reference, interpreted, without_page


def _schedule(**choices):
    return RaggedSchedule(
        **{
            "pages_per_block": 2,
            "rows_per_tile": 16,
            "buffers": 2,
            "single_rows": DecodeSchedule(pages_per_block=2),
            **choices,
        }
    )


# Most of this file uses one pair of kernels, prefill and decode. The window hides some first pages wholly. A sequence
# has at most four pages, and a block has two. A tile has 16 rows, so a sequence of up to 64 rows has up to four tiles.
CASE = Case(spec=PLAIN.replace(window=100), page_size=64, tokens=64)
SCHEDULE = _schedule()


def _attend():
    return interpreted(CASE, SCHEDULE)


def _built(corner=LONG, **how):
    return build(CASE.replace(corner=corner), **how)


# Every sequence has two tiles, one of 16 rows and one of a single row. A page is a whole block. In these corners no
# page, one, two or all six are visible in full, and after them one in part or none. The second tile sees its last page
# in full where the sequence ends with that page.
WHOLE = Case(spec=PLAIN, page_size=128, phase="decode", rows=17, pages_per_seq=6)
WHOLE_CORNERS = {
    "then none": Corner(((1, 0), (2, 0), (3, 0), (6, 0), (1, 0)), (17,) * 5),
    "then a part": Corner(((1, 1), (2, 5), (3, 100), (6, -1), (0, 1)), (17,) * 5),
    "in the second tile alone": Corner(((1, 8), (3, 15), (2, 16), (4, 17), (5, 18)), (17,) * 5),
}


@pytest.mark.parametrize(
    "corner", [pytest.param(x, marks=[pytest.mark.kernels] * (x != "then a part")) for x in WHOLE_CORNERS]
)
def test_whole_blocks_visible_in_full(corner):
    assert_equals_reference(
        interpreted(WHOLE, _schedule(pages_per_block=1, buffers=3)), build(WHOLE.replace(corner=WHOLE_CORNERS[corner]))
    )


@pytest.mark.kernels
@pytest.mark.parametrize("buffers", [2, 3])
def test_holes_in_blocks_that_are_seen_in_full_hide_their_tokens(buffers):
    """The first block, one in the middle, the last one, two in turn, and all. The whole sequence is masked then."""
    built = build(WHOLE.replace(corner=Corner(((6, 0), (6, 3), (4, 0), (5, -1), (3, 0)), (17,) * 5)))
    table = built.batch.block_tables
    for i, (s, page) in enumerate([(0, 0), (0, 3), (1, 5), (2, 1), (2, 2), *((3, page) for page in range(5))]):
        table = table.at[s, page].set([-1, built.pages.num_pages, 2**31 - 1, -(2**31)][i % 4])
        built = without_page(built, range(17 * s, 17 * s + 17), page)
    holed = dataclasses.replace(built, batch=eqx.tree_at(lambda batch: batch.block_tables, built.batch, table))
    got = assert_equals_reference(interpreted(WHOLE, _schedule(pages_per_block=1, buffers=buffers)), holed)
    assert not got.out[3 * 17 : 4 * 17].any()


def _not_causal(**facts):
    return WHOLE.replace(spec=AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=8, causal=False, **facts))


# Other kinds of whole blocks: of several pages, with a part of a block left over; with more strip groups than a line of
# code has, or an odd number of them; with score operations, per-token scales or interleaved heads; on two cores; with
# copies that arrive at once.
SLOW_WHOLE = {
    "two buffers": (WHOLE, {"buffers": 2}, "on_wait"),
    "eager": (WHOLE, {"buffers": 3}, "eager"),
    "two cores": (WHOLE, {"buffers": 4, "cores": 2}, "on_wait"),
    "blocks of two pages": (WHOLE, {"pages_per_block": 2, "buffers": 3}, "on_wait"),
    "pages of 64": (WHOLE.replace(page_size=64), {"pages_per_block": 2, "buffers": 3}, "eager"),
    "not causal": (_not_causal(), {"buffers": 3}, "on_wait"),
    "soft cap and ALiBi": (_not_causal(soft_cap=20.0, scores=(paged.ALiBi(),)), {"buffers": 3}, "eager"),
    "three strip groups": (
        WHOLE.replace(spec=PLAIN.replace(num_q_heads=3, num_kv_heads=3)), {"buffers": 3}, "on_wait",
    ),
    "eight strip groups in turns": (
        WHOLE.replace(spec=PLAIN.replace(num_q_heads=8, num_kv_heads=8)), {"rows_per_tile": 64}, "on_wait",
    ),
    "per-token scales": (WHOLE.replace(dtype="int8", scales="token"), {"buffers": 3}, "on_wait"),
    "interleaved": (WHOLE.replace(order="interleaved"), {"buffers": 3}, "eager"),
    "joined, sinks": (
        WHOLE.replace(order="joined", spec=PLAIN.replace(sinks=True), sink_shape=(4,)), {"buffers": 3}, "on_wait",
    ),
}  # fmt: skip


# Much like others of the list.
SLOWEST = ("two buffers", "not causal", "eight strip groups in turns", "joined, sinks")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow if x in SLOWEST else pytest.mark.kernels) for x in SLOW_WHOLE]
)
def test_whole_blocks_of_every_kind(name):
    case, choices, mode = SLOW_WHOLE[name]
    attend = interpreted(case, _schedule(**{"pages_per_block": 1, **choices}), mode)
    for corner in WHOLE_CORNERS.values():
        assert_equals_reference(attend, build(case.replace(corner=corner)))


@pytest.mark.kernels
@pytest.mark.parametrize("lowering", ["tpu-decode", "tpu-ragged"])
def test_places_without_a_page_are_past_every_length_in_large_pages_too(lowering):
    """A block of four has three pages. The fourth place gets a position past every length, which must fit 32 bits."""
    spec, facts = PLAIN.replace(num_q_heads=1, num_kv_heads=1), {"phase": "prefill", "rows": 16}
    facts = {"phase": "decode"} if lowering == "tpu-decode" else facts
    case = Case(spec=spec, page_size=2048, corner=Corner(((2, 40),) * 5, (1,) * 5), **facts)
    schedule = (
        DecodeSchedule(pages_per_block=4, buffers=2)
        if lowering == "tpu-decode"
        else RaggedSchedule(pages_per_block=4, buffers=2, rows_per_tile=16)
    )
    assert_equals_reference(interpreted(case, schedule, generation="v5e"), build(case))


# For tiles of at most so many rows: how many rows a sequence's last tile has, so that code of every size runs.
TILE_ROWS = {64: (1, 16, 17, 63, 64), 256: (16, 17, 64, 65, 256)}


@pytest.mark.kernels
@pytest.mark.parametrize("query_rows", TILE_ROWS)
def test_tiles_of_every_size(query_rows):
    """Last tiles with as many rows as there is code for, and with one row more; and one last tile after a full one."""
    rows = (*TILE_ROWS[query_rows][:4], query_rows + TILE_ROWS[query_rows][2])
    tokens = -(-sum(rows) // 64) * 64
    case = CASE.replace(spec=PLAIN.replace(num_q_heads=2, num_kv_heads=1), tokens=tokens, page_size=128)
    attend = interpreted(case, _schedule(rows_per_tile=query_rows, pages_per_block=1, buffers=3))
    for corner in (
        Corner(((1, 1), (4, 0), (2, 0), (3, -1), (4, 0)), rows),
        Corner(((0, 5), (3, 0), (1, 7), (4, -1), (2, 9)), rows[::-1]),
    ):
        assert_equals_reference(attend, build(case.replace(corner=corner)))


@pytest.mark.parametrize(
    ("query_rows", "positions"), [(16, [16]), (32, [32]), (64, [16, 64]), (256, [16, 64, 256]), (512, [32, 128, 512])]
)
def test_there_is_code_for_tiles_of_a_quarter_of_the_rows(query_rows, positions):
    launch = _launch(CASE.spec, CASE.layout, query_rows)
    assert [shape.positions for shape in launch.shapes()] == positions


def _launch(spec, layout, query_rows):
    program = paged.lower(spec, layout, "xla").program
    dtype, schedule = jnp.float32, _schedule(rows_per_tile=query_rows)
    return PrefillLaunch(program, layout, dtype, Wanted(dtype), schedule, CHIPS["v4"], False)


@pytest.mark.parametrize("single_rows", [None, DecodeSchedule(pages_per_block=1, buffers=3)])
def test_single_rows_are_decoded_as_the_schedule_says(single_rows, monkeypatch):
    """By exactly that schedule, which `explain` shows; without one, the prefill kernel computes them."""
    decoded, run = [], TpuDecode.run_single_rows
    monkeypatch.setattr(TpuDecode, "run_single_rows", lambda *args: decoded.append(args[2]) or run(*args))
    attend, built = interpreted(CASE, _schedule(single_rows=single_rows)), _built()
    jax.eval_shape(attend.state, built.q, built.pages, built.batch)
    assert decoded == ([] if single_rows is None else [single_rows])
    explanation = str(attend.explain(built.q, built.pages, built.batch))
    assert f"sequences of one query row: {single_rows or 'tiles, as all others'}" in explanation


@pytest.mark.kernels
def test_single_rows_are_tiles_where_the_schedule_does_not_decode_them():
    assert_equals_reference(interpreted(CASE, _schedule(single_rows=None)), _built())


@pytest.mark.kernels
def test_page_lists_too_long_for_scalar_memory_are_cut_by_tile(monkeypatch):
    """There are more than four tiles, and four fit one kernel. A loop runs it until none is left. Each run keeps the
    results of the runs before."""
    items = items_of_launches(monkeypatch, PrefillLaunch)
    case = CASE.replace(tokens=32)
    attend = with_scalar_memory(case, 4 * 72 / 0.6 + 1, SCHEDULE)
    for corner in (Corner(LONG.lengths, (17, 2, 5, 3, 4)), "mixed", "few live", "more rows than tokens"):
        assert_equals_reference(attend, build(case.replace(corner=corner)))
    assert items == [4], "one kernel, traced once"


@pytest.mark.kernels
def test_a_page_list_too_long_for_scalar_memory_is_cut_and_merged(monkeypatch):
    """There are two tiles of up to four pages, and one tile with two pages fits one kernel. A loop runs the kernel for
    each tile, and the states over both halves of the pages are merged."""
    items = items_of_launches(monkeypatch, PrefillLaunch)
    spec = PLAIN.replace(sinks=True, num_q_heads=2, num_kv_heads=1)
    case = CASE.replace(phase="prefill", rows=17, spec=spec, sink_shape=(2,))
    attend = with_scalar_memory(case, (2 * 8 + 40) / 0.6 + 1, SCHEDULE)
    for corner in ("first page masked", "exact pages", "empty", "more rows than tokens"):
        assert_equals_reference(attend, build(case.replace(corner=corner)))
    assert items == [1, 1], "a kernel for either half, traced once"


@pytest.mark.kernels
def test_gradients_are_those_of_the_xla_lowering():
    assert_gradients_are_those_of_xla(_attend(), _built())
