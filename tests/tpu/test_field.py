"""Faults that other paged-attention kernels have had, asked of the TPU kernels: the ones that no entry point can show.

The others are in `tests/compat/test_faults.py`. One semaphore for all transfers is among the planted bugs.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower import DecodeSchedule, RaggedSchedule
from paged.spec import AttentionState
from tests.support import Case, assert_bitwise, build
from tests.support.specs import PLAIN

from .interpreter import assert_equals_reference, interpreted, state_of, watched

PHASES = {
    "decode": ({"page_size": 8, "phase": "decode"}, DecodeSchedule(pages_per_block=2)),
    "ragged": (
        {"page_size": 64},
        RaggedSchedule(pages_per_block=2, rows_per_tile=16, single_rows=DecodeSchedule(pages_per_block=2)),
    ),
}
every_phase = pytest.mark.parametrize("phase", ["decode", pytest.param("ragged", marks=pytest.mark.kernels)])
each_slow = pytest.mark.parametrize("phase", PHASES)


def _case(phase, spec=PLAIN, **facts):
    how, schedule = PHASES[phase]
    return Case(spec=spec, **{**how, **facts}), schedule


def _state(attend, built, q) -> AttentionState:
    return watched(attend.state, q, built.pages, built.batch)


def _owned(built):
    """The rows that sequences own, and how many tokens each of them sees."""
    return [(row, len(seen)) for row, seen in enumerate(built.visible) if seen is not None and len(seen)]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("q_dtype", ["float16", "bfloat16", "float32"])
def test_the_output_has_the_queries_dtype_with_scales_or_without(phase, q_dtype):
    for facts in ({}, {"dtype": "int8", "scales": "head"}):
        case, schedule = _case(phase, q_dtype=q_dtype, **facts)
        built = build(case)
        state = jax.eval_shape(interpreted(case, schedule).state, built.q, built.pages, built.batch)
        assert state.out.dtype == q_dtype and state.lse.dtype == np.float32


@pytest.mark.kernels
@each_slow
@pytest.mark.parametrize("poison", [np.inf, -np.inf])
def test_one_bad_value_in_an_unwritten_slot_poisons_no_row(phase, poison):
    """NaN is in all of them, in every test."""
    case, _ = _case(phase, corner="one token")
    built, attend = build(case), interpreted(*_case(phase))
    pools = [jnp.where(jnp.isnan(x), poison, x) for x in built.pages.arrays]
    bad = watched(attend.state, built.q, case.layout.wrap(*pools), built.batch)
    rows = np.array([row for row, _ in _owned(built)])
    assert_bitwise(bad, state_of(attend, built), rows)


@every_phase
def test_sums_over_blocks_are_float32(phase):
    """One key weighs 1 and the others exp(-9) each: in bfloat16 a block of these would be lost beside the first."""
    spec = PLAIN.replace(scores=(paged.Bias(lambda p, j, h: jnp.where(j == 0, 0.0, -9.0)),))
    facts = {"dtype": "bfloat16", "q_dtype": "bfloat16"}
    built = build(_case(phase, spec, corner="exact pages", **facts)[0])
    state = _state(interpreted(*_case(phase, spec, **facts)), built, jnp.zeros_like(built.q))
    assert max(count for _, count in _owned(built)) > 8, "one block would hold all"
    for row, count in _owned(built):
        np.testing.assert_allclose(state.lse[row], np.log1p((count - 1) * np.exp(-9.0)), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("phase", PHASES)
def test_no_kernel_holds_scores_of_the_whole_table(phase):
    """Its buffers in vector memory are the same for tables of 16 and of 64 thousand tokens."""
    few, many = (_buffers(phase, pages_per_seq) for pages_per_seq in (1024, 4096))
    assert few == many
    assert few


def _buffers(phase, pages_per_seq):
    layout = paged.PageLayout(page_size=16, num_kv_heads=2, head_dim=128, dtype=jnp.float32)
    schedule = PHASES[phase][1].replace(pages_per_block=8)
    attend = paged.lower(
        paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=128), layout, "tpu", schedule=schedule
    )
    batch = paged.RaggedBatch(*(np.zeros(n, np.int32) for n in ((3,), (3, pages_per_seq), (4,))), query_rows=None)
    if phase == "decode":
        batch = paged.RaggedBatch.decode(batch.lengths, batch.block_tables)
    q, pages = jax.ShapeDtypeStruct((3, 4, 128), jnp.float32), jax.eval_shape(lambda: layout.init(64))
    return set(re.findall(r"<vmem>\{[^}]*\}", str(jax.make_jaxpr(attend)(q, pages, batch))))


@every_phase
def test_the_log_sum_exp_is_natural(phase):
    """Of scores of 0: the natural log of how many there are."""
    built = build(_case(phase, corner="exact pages")[0])
    state = _state(interpreted(*_case(phase)), built, jnp.zeros_like(built.q))
    for row, count in _owned(built):
        np.testing.assert_allclose(state.lse[row], np.log(count), rtol=1e-6)


@pytest.mark.kernels
@each_slow
def test_alibi_after_a_cap_is_neither_capped_nor_scaled(phase):
    """q = 0 leaves the bias alone: lse is the log of the sum of its exponentials."""
    slopes = (2.0, 1.0, 0.5, 0.25)
    spec = PLAIN.replace(soft_cap=0.5, scale=0.01, scores=(paged.ALiBi(slopes),))
    built = build(_case(phase, spec, corner="exact pages")[0])
    state = _state(interpreted(*_case(phase, spec)), built, jnp.zeros_like(built.q))
    for row, count in _owned(built):
        want = [np.log(np.exp(-slope * np.arange(count)).sum()) for slope in slopes]
        np.testing.assert_allclose(state.lse[row], want, rtol=1e-5, atol=1e-6)


@pytest.mark.kernels
@each_slow
@pytest.mark.parametrize("size", [1e15, -1e15])
def test_no_finite_sentinel_hides_a_valid_row(phase, size):
    """Scores far below any sentinel: a row that sees one token has its value."""
    spec = PLAIN.replace(scale=1.0)
    built = build(_case(phase, spec, corner="one token")[0])
    state = _state(interpreted(*_case(phase, spec)), built, jnp.full_like(built.q, size))
    alone = [row for row, count in _owned(built) if count == 1]
    for row in alone:
        seq, _ = built.row_of[row]
        page = int(built.batch.block_tables[seq, 0])
        np.testing.assert_allclose(state.out[row], jnp.repeat(built.pages.values()[page, :, 0], 2, axis=0), rtol=1e-6)
        assert np.isfinite(np.asarray(state.lse[row])).all() and np.abs(np.asarray(state.lse[row])).min() > 1e3
    assert alone


@pytest.mark.kernels
@each_slow
def test_a_page_that_is_full_in_the_mask_still_ends_at_the_length(phase):
    spec = PLAIN.replace(causal=False)
    attend = interpreted(*_case(phase, spec))
    for corner in ("one past a page", "one token", "first page masked"):
        assert_equals_reference(attend, build(_case(phase, spec, corner=corner)[0]))
