"""Faults that other paged-attention kernels have had; each test is named after the property that such a fault broke."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.spec import AttentionSpec, AttentionState, RaggedBatch
from tests.support import (
    Case,
    assert_bitwise,
    assert_state_close,
    build,
    case_of,
    every_lowering,
    exact_state,
    lowered,
    state_of,
)

PLAIN = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)


def _decode(spec, **facts):
    return Case(spec=spec, phase="decode", **facts)


@every_lowering
def test_a_window_changes_a_decode_step(lowering):
    """A kernel that ignores its window gives the same output with and without one."""
    wide, narrow = (
        _decode(PLAIN, corner="first page masked"),
        _decode(PLAIN.replace(window=5), corner="first page masked"),
    )
    outs = [state_of(lowered(lowering, case.replace(corner="mixed")), build(case)).out for case in (wide, narrow)]
    assert np.abs(np.asarray(outs[0] - outs[1])).max() > 0.1


@every_lowering
def test_a_soft_cap_is_taken_in_decode_and_changes_it(lowering):
    """A decode step with a soft cap used to raise in kernels that support the cap for prompts only."""
    cases = [case_of("plain", "decode"), _decode(PLAIN.replace(soft_cap=3.0))]
    outs = [state_of(lowered(lowering, case), build(case)).out for case in cases]
    assert np.abs(np.asarray(outs[0] - outs[1])).max() > 0.1


@every_lowering
def test_length_0_gives_0_and_not_a_mean_of_other_requests_values(lowering):
    built = build(_decode(PLAIN, corner="empty"))
    state = state_of(lowered(lowering, _decode(PLAIN)), built)
    assert not np.asarray(state.out).any() and np.isneginf(state.lse).all()


@every_lowering
@pytest.mark.parametrize("q_dtype", ["float16", "bfloat16", "float32"])
def test_the_output_has_the_queries_dtype_with_scales_or_without(lowering, q_dtype):
    for facts in ({}, {"dtype": "int8", "scales": "head"}):
        case = _decode(PLAIN, q_dtype=q_dtype, **facts)
        state = state_of(lowered(lowering, case), build(case))
        assert state.out.dtype == q_dtype and state.lse.dtype == np.float32


def test_the_page_order_is_said_and_never_guessed_from_divisibility():
    """Two heads and two pages: every order has arrays of plausible shapes, and only the right one is taken."""
    facts = {"page_size": 2, "num_kv_heads": 2, "head_dim": 2, "dtype": jnp.float32}
    split, inter = (paged.PageLayout(order=order, **facts) for order in ("split", "interleaved"))
    pool = jnp.zeros((2, 2, 2, 2))
    with pytest.raises(ValueError, match=r"kv must have shape \(2, 2, 4, 2\)"):
        inter.wrap(pool)
    assert split.wrap(pool, pool).num_pages == 2


@every_lowering
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_one_bad_value_in_an_unwritten_slot_poisons_no_row(lowering, poison):
    """An additive mask leaves 0 * NaN. One slot of the last page, keys and values, past the length."""
    case = _decode(PLAIN, corner="one token")
    built = build(case)
    clean = case.layout.wrap(jnp.nan_to_num(built.pages.arrays[0], nan=0.0, posinf=0.0, neginf=0.0))
    page = int(built.batch.block_tables[0, 0])
    bad = case.layout.wrap(clean.arrays[0].at[page, :, :, 1].set(poison))
    attend = lowered(lowering, _decode(PLAIN))
    for got, want in zip(
        attend.state(built.q, bad, built.batch), attend.state(built.q, clean, built.batch), strict=True
    ):
        np.testing.assert_array_equal(got, want)


@every_lowering
def test_an_empty_sequence_does_not_show_the_row_before_it(lowering):
    built = build(_decode(PLAIN, corner="mixed"))
    assert int(built.batch.lengths[2]) == 0
    out = np.asarray(state_of(lowered(lowering, _decode(PLAIN)), built).out)
    assert np.abs(out[1]).max() > 0.1 and not out[2].any()


@every_lowering
def test_a_length_past_the_table_reads_nothing_of_the_next_sequence(lowering):
    """Positions follow the length, so that a window counts from there; keys past the table do not exist."""
    case = _decode(PLAIN.replace(window=5), corner="exact pages")
    built, attend = build(case), lowered(lowering, case.replace(corner="mixed"))
    assert int(built.batch.lengths[3]) == 16
    plain, others = state_of(attend, built), np.array([0, 1, 2, 4])
    for length, keys in ((17, 4), (20, 1), (21, 0), (10**6, 0), (2**31 - 1, 0)):
        batch = RaggedBatch.decode(built.batch.lengths.at[3].set(length), built.batch.block_tables)
        long = dataclasses.replace(built, batch=batch)
        got, want = state_of(attend, long), exact_state(long)
        assert_bitwise(got, plain, rows=others)
        np.testing.assert_allclose(got.out, want.out, rtol=0, atol=1e-5)
        assert (np.isneginf(got.lse[3]) == (keys == 0)).all() and (np.isneginf(want.lse[3]) == (keys == 0)).all()
        assert (np.asarray(got.out[3]).any() != 0) == (keys > 0)


@every_lowering
def test_float32_pages_are_not_rounded_to_bfloat16(lowering):
    built = build(_decode(PLAIN, corner="exact pages"))
    out = np.asarray(state_of(lowered(lowering, _decode(PLAIN)), built).out, np.float64)
    error = np.abs(out - exact_state(built).out).max()
    assert error < 1e-5 < np.abs(out).max() * 2.0**-9


@every_lowering
@pytest.mark.parametrize("rows", [5, 6])
def test_a_chunk_is_the_last_rows_of_its_sequence_whatever_divides_what(lowering, rows):
    """The chunk's start was taken as a multiple of the chunk, and trailing pages were dropped."""
    case = Case(spec=PLAIN, phase="prefill", rows=rows)
    for corner in ("mixed", "exact pages", "first page masked", "one live"):
        built = build(case.replace(corner=corner))
        assert_state_close(state_of(lowered(lowering, case), built), built)


@every_lowering
def test_a_first_block_that_is_wholly_masked_gives_no_nan(lowering):
    """-inf minus -inf, as a running maximum: with one page a block, the window hides or partly hides the first."""
    spec = PLAIN.replace(causal=False, mask=paged.Where(_late))
    case = _decode(spec, corner="first page masked")
    attend = lowered(lowering, _decode(spec), pages_per_block=1)
    built = build(case)
    assert all(row[0] >= 9 for row in built.visible if row is not None)
    assert_state_close(state_of(attend, built), built)


def _late(p, j):
    """Opaque, so that every page is visited and the first two are masked there."""
    return (j >= 9) & (p == p)


@every_lowering
@pytest.mark.parametrize("pages_per_seq", [3, 5, 7])
def test_any_table_width_and_block_width_go_together(lowering, pages_per_seq):
    """A table wider than a block and no multiple of it read the wrong pages."""
    case = _decode(PLAIN, corner="first page masked", pages_per_seq=pages_per_seq, page_size=2)
    built = build(case)
    assert_state_close(state_of(lowered(lowering, case.replace(corner="mixed"), pages_per_block=2), built), built)


@every_lowering
@pytest.mark.parametrize("tokens", [9, 12, 13])
def test_batches_need_no_padding(lowering, tokens):
    """Any number of rows, the last of which may be somebody's."""
    case = Case(spec=PLAIN, tokens=tokens, corner="few live" if tokens < 12 else "mixed")
    built = build(case)
    assert_state_close(state_of(lowered(lowering, case.replace(corner="mixed")), built), built)


@every_lowering
def test_every_row_of_a_windowed_chunk_has_its_own_window(lowering):
    """The window started at the last query's, so earlier rows lost their oldest keys."""
    case = Case(spec=PLAIN.replace(window=3), phase="prefill", rows=6, corner="first page masked")
    built = build(case)
    assert [row.tolist() for row in built.visible[:2]] == [[8, 9, 10], [9, 10, 11]]
    assert_state_close(state_of(lowered(lowering, case.replace(corner="mixed")), built), built)


def test_a_write_to_page_0_is_kept_when_unused_entries_are_0():
    """Zero-padded tables made a scatter with repeated page 0, which lost the write."""
    layout = paged.PageLayout(page_size=2, num_kv_heads=1, head_dim=2, dtype=jnp.float32)
    tables = [[0, 0, 0], [2, 0, 0], [1, 3, 0]]
    batch = RaggedBatch.decode([1, 2, 4], tables)
    k = jnp.arange(1.0, 7.0).reshape(3, 1, 2)
    pages = paged.write(k, -k, layout.init(4), batch)
    want = np.zeros((4, 1, 2, 2))
    want[0, 0, 0], want[2, 0, 1], want[3, 0, 1] = k[:, 0]
    np.testing.assert_array_equal(pages.keys(), want)
    np.testing.assert_array_equal(pages.values(), -want)


def test_lengths_count_this_steps_own_tokens_and_the_scale_is_one_over_root_d():
    """One new token of length 1 sees itself: its output is its own value, and its lse its own scaled score."""
    layout = paged.PageLayout(page_size=2, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
    attend = paged.lower(PLAIN, layout)
    q, k, v = (
        jnp.asarray(np.random.default_rng(i).normal(0, 3, (1, h, 8)), jnp.float32) for i, h in enumerate((4, 2, 2))
    )
    out, pages = attend.update(q, k, v, layout.init(1), RaggedBatch.decode([1], [[0]]))
    np.testing.assert_array_equal(out, jnp.repeat(v, 2, axis=1))
    state = attend.state(q, pages, RaggedBatch.decode([1], [[0]]))
    np.testing.assert_allclose(state.lse[0], (q * jnp.repeat(k, 2, axis=1)).sum(-1)[0] / np.sqrt(8), rtol=1e-5)


@every_lowering
def test_the_log_sum_exp_is_natural(lowering):
    """Two keys of score 0: log 2 in base e, 1 in base 2."""
    built = build(_decode(PLAIN, corner="exact pages"))
    state = lowered(lowering, _decode(PLAIN)).state(jnp.zeros_like(built.q), built.pages, built.batch)
    np.testing.assert_allclose(state.lse[:, 0], np.log(np.asarray(built.batch.lengths)), rtol=1e-6)


@every_lowering
def test_alibi_after_a_cap_is_neither_capped_nor_scaled(lowering):
    """q = 0 leaves the bias alone: lse is the log of the sum of its exponentials."""
    spec = PLAIN.replace(soft_cap=0.5, scale=0.01, scores=(paged.ALiBi((2.0, 1.0, 0.5, 0.25)),))
    built = build(_decode(spec, corner="exact pages"))
    state = lowered(lowering, _decode(spec)).state(jnp.zeros_like(built.q), built.pages, built.batch)
    for row, length in enumerate(built.batch.lengths.tolist()):
        for head, slope in enumerate((2.0, 1.0, 0.5, 0.25)):
            want = np.log(np.exp(-slope * np.arange(length)).sum())
            np.testing.assert_allclose(state.lse[row, head], want, rtol=1e-5, atol=1e-6)


@every_lowering
@pytest.mark.parametrize("size", [1e4, 1e15, -1e15])
def test_no_finite_sentinel_hides_a_valid_row(lowering, size):
    """Scores far below any sentinel, -1e30 or the least float16: the softmax only sees differences."""
    spec = PLAIN.replace(scale=1.0)
    built = build(_decode(spec, corner="one token"))
    q = jnp.full_like(built.q, size)
    state = lowered(lowering, _decode(spec)).state(q, built.pages, built.batch)
    for row, page in enumerate(built.batch.block_tables[:, 0].tolist()):
        np.testing.assert_array_equal(state.out[row], jnp.repeat(built.pages.values()[page, :, 0], 2, axis=0))
    assert np.isfinite(np.asarray(state.lse)).all() and np.abs(np.asarray(state.lse)).min() > 1e3


@every_lowering
def test_a_page_that_is_full_in_the_mask_still_ends_at_the_length(lowering):
    """Blocks that a mask calls full skipped the length test, and read past the sequence."""
    spec = PLAIN.replace(causal=False)
    for corner in ("one past a page", "one token", "first page masked"):
        built = build(_decode(spec, corner=corner))
        assert_state_close(state_of(lowered(lowering, _decode(spec)), built), built)


def test_merge_of_two_empty_states_is_empty_without_nan():
    empty = AttentionState(jnp.zeros((2, 1, 3)), jnp.full((2, 1), -jnp.inf))
    merged = paged.merge(empty, empty)
    assert not np.asarray(merged.out).any() and np.isneginf(merged.lse).all()
