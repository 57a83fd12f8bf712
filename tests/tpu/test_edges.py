"""The edges of `docs/semantics.md` on the TPU decode kernel: faults of the caller, unseen data, updates, gradients."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from paged.lower import DecodeSchedule
from paged.lower.tpu.decode.launch import DecodeLaunch
from tests.support import CORNERS, Case, assert_bitwise, build, exact_state
from tests.support.specs import PLAIN

from .edges import (
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

# One kernel for most of this file: two query rows, blocks of two pages of at most four.
CASE = Case(spec=PLAIN, page_size=8, phase="decode", rows=2)
SCHEDULE = DecodeSchedule(pages_per_block=2)


def _attend():
    return interpreted(CASE, SCHEDULE)


def test_a_needed_entry_that_is_a_hole_hides_its_tokens():
    """Table entries outside the pool: a sequence's first, a middle, its last and its only page."""
    built = build(CASE.replace(corner="exact pages"))
    table = built.batch.block_tables
    for s, page, hole in ((0, 0, -1), (1, 1, built.pages.num_pages), (3, 0, 2**31 - 1), (4, 1, -(2**31))):
        table = table.at[s, page].set(hole)
    holed = with_batch(built, block_tables=table)
    visible = [seen[:0] if row < 2 else seen for row, seen in enumerate(built.visible)]
    got = assert_equals_reference(_attend(), dataclasses.replace(holed, visible=visible))
    assert np.isneginf(np.asarray(got.lse)[:2]).all() and np.isfinite(np.asarray(got.lse)[2:]).all()
    assert not np.array_equal(exact_state(holed).out, exact_state(built).out)


def test_lengths_past_the_table_keep_positions_and_negative_ones_are_none():
    built = build(CASE.replace(corner="first page masked"), hold_new=False)
    assert built.batch.lengths.tolist() == [32, 31, 25, 32, 32]
    wild = with_batch(built, lengths=jnp.array([33, -1, -(2**31), 2**31 - 1, 34], jnp.int32))
    got = assert_update_drops_rows_past_the_table(_attend(), wild)
    assert_nothing_is_seen(got, slice(2, 6))


@pytest.mark.parametrize("num_seqs", [0, -3, 10**6])
def test_the_number_of_sequences_is_clamped(num_seqs):
    assert_num_seqs_is_clamped(_attend(), build(CASE), num_seqs)


@pytest.mark.parametrize("corner", ["mixed", "few live"])
def test_page_order_and_stale_entries_are_invisible_bitwise(corner):
    """Pages move, and unused data is drawn anew: table entries, dead slots, padding rows. No bit changes."""
    case = CASE.replace(corner=corner)
    states = [state_of(_attend(), build(case, physical_seed=seed, padding_seed=seed)) for seed in range(2)]
    assert_bitwise(*states)


def test_other_sequences_are_invisible_bitwise():
    case = CASE.replace(corner="one past a page")
    before, after = (state_of(_attend(), build(case, changed=changed)) for changed in ((), (0, 2, 4)))
    assert_bitwise(before, after, rows=np.array([2, 3, 6, 7]))
    assert (np.asarray(before.lse)[[0, 1, 4, 5, 8, 9]] != np.asarray(after.lse)[[0, 1, 4, 5, 8, 9]]).any()


@pytest.mark.parametrize("corner", ["more rows than tokens", "exact pages"])
def test_rows_before_the_first_token_see_nothing(corner):
    """And the log-sum-exp is the reference's: `assert_state_close` looks at both."""
    assert_equals_reference(_attend(), build(CASE.replace(corner=corner)))


def test_rows_that_the_starts_do_not_give_each_sequence_alike():
    """``query_rows`` says two rows each, and the starts say otherwise. No row shows another sequence's result."""
    built = build(CASE.replace(corner="first page masked"))
    for starts in ([0, 1, 3, 3, 5, 6], [0, 2, 4, 3, 6, 8], [1, 3, 5, 7, 9, 10]):
        faulty = with_batch(built, query_starts=jnp.array(starts, jnp.int32))
        want = exact_state(faulty)
        got = state_of(_attend(), faulty)
        np.testing.assert_allclose(got.out, want.out, rtol=0, atol=2e-5)
        np.testing.assert_array_equal(np.isneginf(got.lse), np.isneginf(want.lse))


def test_more_rows_than_the_static_number_give_no_row_what_nobody_wrote():
    """``query_rows`` says two rows, and the starts give one sequence five. No row shows unwritten memory."""
    built = build(CASE.replace(corner="first page masked"))
    faulty = with_batch(built, query_starts=jnp.array([0, 5, 7, 9, 10, 10], jnp.int32))
    got, want = state_of(_attend(), faulty), exact_state(faulty)
    assert np.isfinite(np.asarray(got.out)).all()
    is_empty = np.isneginf(np.asarray(got.lse))
    np.testing.assert_allclose(np.asarray(got.out)[~is_empty], np.asarray(want.out)[~is_empty], rtol=0, atol=2e-5)
    assert not np.asarray(got.out)[is_empty].any()


def test_update_equals_write_then_attend_in_one_trace(monkeypatch):
    """For every corner."""
    items = items_of_launches(monkeypatch, DecodeLaunch)
    attend = interpreted(CASE, SCHEDULE, generation="v5p")
    for corner in CORNERS:
        built, held = (build(CASE.replace(corner=corner), hold_new=held) for held in (False, True))
        assert_update_is_write_then_attend(attend, built, held)
    assert len(items) == 1


def test_gradients_are_those_of_the_xla_lowering():
    assert_gradients_are_those_of_xla(_attend(), build(CASE))


def test_page_lists_too_long_for_scalar_memory_are_cut_by_sequence(monkeypatch):
    """One kernel has three sequences and the next has two. Some or all of them may be dead."""
    items = items_of_launches(monkeypatch, DecodeLaunch)
    attend = with_scalar_memory(CASE, 3 * 72 / 0.6 + 1, SCHEDULE)
    for corner in ("mixed", "few live", "more rows than tokens"):
        assert_equals_reference(attend, build(CASE.replace(corner=corner)))
    assert items == [3, 2]


def test_a_page_list_too_long_for_scalar_memory_is_cut_and_merged(monkeypatch):
    """One sequence of four pages: two kernels of two pages, each with two KV splits. Four states are merged."""
    items = items_of_launches(monkeypatch, DecodeLaunch)
    case = CASE.replace(phase="prefill", spec=PLAIN.replace(sinks=True), sink_shape=(4, 3))
    attend = with_scalar_memory(case, (2 * 8 + 80) / 0.6 + 1, SCHEDULE.replace(pages_per_block=1, kv_splits=2))
    for corner in ("first page masked", "exact pages", "empty"):
        assert_equals_reference(attend, build(case.replace(corner=corner)))
    assert items == [2, 2]
