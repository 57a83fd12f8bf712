"""Edges of `docs/semantics.md` on the TPU lowering for mixed batches: faults of the caller, unseen data, length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower import DecodeSchedule, RaggedSchedule
from paged.lower.program import Wanted
from paged.lower.tpu import CHIPS, TpuDecode
from paged.lower.tpu.prefill.launch import PrefillLaunch
from paged.spec import AttentionSpec
from tests.support import CORNERS, Case, Corner, assert_bitwise, build, exact_state
from tests.support.specs import PLAIN

from .edges import (
    assert_close_to,
    assert_gradients_are_those_of_xla,
    assert_nothing_is_seen,
    assert_num_seqs_is_clamped,
    assert_update_drops_rows_past_the_table,
    assert_update_is_write_then_attend,
    items_of_launches,
    with_batch,
    with_scalar_memory,
)
from .interpreter import assert_equals_reference, interpreted, state_of


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
LONG = Corner(((4, 0), (0, 1), (4, -1), (2, 0), (3, 1)), (17, 1, 33, 1, 4))


def _attend():
    return interpreted(CASE, SCHEDULE)


def _built(corner=LONG, **how):
    return build(CASE.replace(corner=corner), **how)


def _rows_of(built, *seqs):
    return np.array([i for i, owner in enumerate(built.row_of) if owner is not None and owner[0] in seqs])


@pytest.mark.parametrize("corner", [LONG, *CORNERS])
def test_every_corner_equals_the_reference(corner):
    """Among them several tiles per sequence, first pages wholly masked, empty rows and padding rows."""
    assert_equals_reference(_attend(), _built(corner))


def test_a_needed_entry_that_is_a_hole_hides_its_tokens():
    """Table entries outside the pool: for the only page of a sequence of one row, and for last and middle pages of
    sequences of many rows."""
    built = _built()
    table = built.batch.block_tables
    for s, page, hole in ((0, 3, -1), (1, 0, built.pages.num_pages), (2, 2, 2**31 - 1), (3, 1, -(2**31))):
        table = table.at[s, page].set(hole)
    holed = with_batch(built, block_tables=table)
    got = state_of(_attend(), holed)
    assert_close_to(got, exact_state(holed))
    assert np.isneginf(np.asarray(got.lse)[_rows_of(built, 1)]).all()
    assert not np.array_equal(exact_state(holed).out, exact_state(built).out)
    assert_bitwise(got, state_of(_attend(), built), rows=_rows_of(built, 4))


def test_lengths_past_the_table_keep_positions_and_negative_ones_are_none():
    corner = Corner(((4, 0), (1, 0), (4, 0), (1, 0), (4, -1)), (18, 20, 1, 1, 5))
    built = _built(corner, hold_new=False)
    wild = with_batch(built, lengths=jnp.array([257, -1, 2**31 - 1, -(2**31), 255], jnp.int32))
    got = assert_update_drops_rows_past_the_table(_attend(), wild)
    assert_nothing_is_seen(got, _rows_of(built, 1, 3))


@pytest.mark.parametrize("num_seqs", [0, -3, 10**6])
def test_the_number_of_sequences_is_clamped(num_seqs):
    assert_num_seqs_is_clamped(_attend(), _built(), num_seqs)


@pytest.mark.parametrize("corner", [LONG, "few live"])
def test_page_order_and_stale_entries_are_invisible_bitwise(corner):
    """Pages lie elsewhere in the pool. Unused entries, dead slots and padding rows have other values."""
    states = [state_of(_attend(), _built(corner, physical_seed=seed, padding_seed=seed)) for seed in range(2)]
    assert_bitwise(*states)


def test_other_sequences_are_invisible_bitwise():
    built = _built()
    before, after = (state_of(_attend(), _built(changed=changed)) for changed in ((), (0, 3, 4)))
    assert_bitwise(before, after, rows=_rows_of(built, 1, 2))
    others = _rows_of(built, 0, 3, 4)
    assert (np.asarray(before.lse)[others] != np.asarray(after.lse)[others]).all()


@pytest.mark.parametrize(
    "starts",
    [
        [0, 17, 5, 51, 52, 56],  # decreasing: a sequence without rows
        [0, 20, 17, 51, 52, 56],  # overlapping: rows belong to the first that claims them
        [-9, 17, 18, 51, 10**6, -(2**31)],
        [3, 3, 3, 4, 60, 64],  # rows before the first start belong to no sequence
        [64, 0, 0, 0, 0, 64],
    ],
)
def test_starts_that_are_faults_show_no_row_of_anothers(starts):
    """The reference does not define these, so the result is compared with the XLA lowering's. Both clamp the starts."""
    faulty = with_batch(_built(), query_starts=jnp.array(starts, jnp.int32))
    xla = paged.lower(CASE.spec, CASE.layout, "xla")
    assert_close_to(state_of(_attend(), faulty), xla.state(faulty.q, faulty.pages, faulty.batch))


# Every sequence has two tiles, one of 16 rows and one of a single row. A page is a whole block. In these corners no
# page, one, two or all six are visible in full, and after them one in part or none. The second tile sees its last page
# in full where the sequence ends with that page.
WHOLE = Case(spec=PLAIN, page_size=128, phase="decode", rows=17, pages_per_seq=6)
WHOLE_CORNERS = {
    "then none": Corner(((1, 0), (2, 0), (3, 0), (6, 0), (1, 0)), (17,) * 5),
    "then a part": Corner(((1, 1), (2, 5), (3, 100), (6, -1), (0, 1)), (17,) * 5),
    "in the second tile alone": Corner(((1, 8), (3, 15), (2, 16), (4, 17), (5, 18)), (17,) * 5),
}


@pytest.mark.parametrize("corner", WHOLE_CORNERS)
def test_whole_blocks_visible_in_full(corner):
    assert_equals_reference(
        interpreted(WHOLE, _schedule(pages_per_block=1, buffers=3)), build(WHOLE.replace(corner=WHOLE_CORNERS[corner]))
    )


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


@pytest.mark.kernels
@pytest.mark.parametrize("name", SLOW_WHOLE)
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
    decoded, run_state = [], TpuDecode.run_state
    monkeypatch.setattr(TpuDecode, "run_state", lambda *args: decoded.append(args[2]) or run_state(*args))
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
def test_update_equals_write_then_attend_in_one_trace(monkeypatch):
    """For every corner."""
    items = items_of_launches(monkeypatch, PrefillLaunch)
    attend = interpreted(CASE, SCHEDULE, generation="v5p")
    for corner in (LONG, *CORNERS):
        assert_update_is_write_then_attend(attend, *(_built(corner, hold_new=held) for held in (False, True)))
    assert len(items) == 1


@pytest.mark.kernels
def test_gradients_are_those_of_the_xla_lowering():
    assert_gradients_are_those_of_xla(_attend(), _built())
