"""Properties of attention, crossed with every lowering: what it equals, what it may not see, and how it adds up."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower import attend as attend_module
from paged.spec import AttentionState, Prefix, RaggedBatch, add_sinks, sinks_per_head
from tests.support import (
    CORNERS,
    PHASES,
    SPECS,
    assert_bitwise,
    assert_state_close,
    assert_states_close,
    build,
    case_of,
    every_lowering,
    exact_state,
    lowered,
    state_of,
)

every_spec = pytest.mark.parametrize("spec", SPECS)
every_phase = pytest.mark.parametrize("phase", PHASES)
every_corner = pytest.mark.parametrize("corner", CORNERS)


def attend_of(lowering, case):
    return lowered(lowering, case.replace(corner="mixed", seed=0))


@every_lowering
@every_phase
@every_spec
@every_corner
def test_equals_reference(lowering, spec, phase, corner):
    """With (0, -inf) or (0, sink) in empty rows and 0 in padding rows, exactly; see `assert_state_close`."""
    case = case_of(spec, phase, corner=corner)
    built = build(case)
    assert_state_close(state_of(attend_of(lowering, case), built), built)


@pytest.mark.parametrize("corner", ["mixed", "more rows than tokens", "all dead", "first page masked"])
def test_corners_have_the_rows_they_promise(corner):
    """The cases do hold empty rows, padding rows and rows that see something: else the property above says little."""
    seen = build(case_of("rich", "ragged", corner=corner)).visible
    assert any(row is None for row in seen)
    assert any(row is not None and len(row) for row in seen) == (corner != "all dead")
    assert any(row is not None and not len(row) for row in seen) == (corner in ("mixed", "more rows than tokens"))


@every_lowering
@every_phase
@every_spec
def test_physical_page_order_is_invisible_bitwise(lowering, spec, phase):
    case = case_of(spec, phase)
    attend = attend_of(lowering, case)
    states = [state_of(attend, build(case, physical_seed=seed)) for seed in range(3)]
    for other in states[1:]:
        assert_bitwise(states[0], other)


@every_lowering
@pytest.mark.parametrize("phase", ["decode", "ragged"])
@every_spec
def test_other_sequences_are_invisible_bitwise(lowering, spec, phase):
    case = case_of(spec, phase, corner="one past a page")
    attend = attend_of(lowering, case)
    before, after = build(case), build(case, changed=(0, 2, 4))
    kept = [row for row, owner in enumerate(before.row_of) if owner is not None and owner[0] in (1, 3)]
    changed = [row for row, owner in enumerate(before.row_of) if owner is not None and owner[0] in (0, 2, 4)]
    before, after = state_of(attend, before), state_of(attend, after)
    assert_bitwise(*(AttentionState(s.out[jnp.array(kept)], s.lse[jnp.array(kept)]) for s in (before, after)))
    assert (np.asarray(before.lse)[changed] != np.asarray(after.lse)[changed]).any(), "the change changed nothing"


@every_lowering
@every_phase
def test_rerun_is_bitwise_equal(lowering, phase):
    built = build(case_of("rich", phase))
    attend = attend_of(lowering, built.case)
    assert_bitwise(state_of(attend, built), state_of(attend, built))


@every_lowering
@pytest.mark.parametrize("phase", ["decode", "ragged"])
@pytest.mark.parametrize("spec", ["plain", "rich"])
def test_split_then_merge_equals_whole(lowering, spec, phase):
    """The keys before 5 and the keys from 5 on, whatever the pages; the sink enters once, at the end."""
    built = build(case_of(spec, phase, corner="first page masked"))
    whole = built.case.spec
    states = []
    for part in (Prefix(5), ~Prefix(5)):
        half = built.case.replace(spec=whole.replace(mask=part, sinks=False), corner="mixed")
        states.append(lowered(lowering, half).state(built.q, built.pages, built.batch))
    assert not np.isneginf(states[1].lse[np.array([row is not None for row in built.visible])]).all()
    merged = paged.merge(*states)
    if whole.sinks:
        owned = np.array([row is not None for row in built.visible])[:, None]
        with_sinks = add_sinks(merged, sinks_per_head(whole, built.sinks))
        merged = AttentionState(with_sinks.out, jnp.where(owned, with_sinks.lse, merged.lse))
    assert_states_close(merged, exact_state(built), built.error_unit, "float32")


@every_lowering
@pytest.mark.parametrize(("phase", "width"), [("decode", 16), ("decode", 2**31 - 1), ("ragged", 16), ("prefill", 17)])
def test_a_window_as_long_as_the_sequence_is_no_window(lowering, phase, width):
    case = case_of("plain", phase, corner="exact pages")
    built = build(case)
    assert width >= int(built.batch.lengths.max())
    windowed = case.replace(spec=case.spec.replace(window=width), corner="mixed")
    assert_bitwise(state_of(lowered(lowering, windowed), built), state_of(attend_of(lowering, case), built))


@every_lowering
@pytest.mark.parametrize("spec", ["plain", "rich"])
def test_prefill_then_decode_equals_one_prefill(lowering, spec):
    case = case_of(spec, "prefill", rows=9, corner="one past a page").replace(page_size=8)
    built = build(case, hold_new=False)
    attend, table = attend_of(lowering, case), built.batch.block_tables[0]
    assert int(built.batch.lengths[0]) == 9
    whole, pages_whole = attend.update(built.q, built.k, built.v, built.pages, built.batch, built.sinks)
    pages, states = built.pages, []
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 9)):
        rows = slice(start, stop)
        batch = RaggedBatch.prefill(stop, table, stop - start)
        state, pages = attend.update_state(built.q[rows], built.k[rows], built.v[rows], pages, batch, built.sinks)
        states.append(state)
    for a, b in zip(pages.arrays, pages_whole.arrays, strict=True):
        np.testing.assert_array_equal(a, b)
    state = AttentionState(*(jnp.concatenate(parts) for parts in zip(*states, strict=True)))
    assert_states_close(state, exact_state(build(case)), build(case).error_unit, "float32")
    assert np.abs(np.asarray(whole)).max() > 1


@every_lowering
@pytest.mark.parametrize("spec", ["plain", "rich"])
def test_chunking_is_invisible(lowering, spec):
    """Nine rows of a sequence in one ragged step, or in steps of 4, 3 and 2: the same rows."""
    case = case_of(spec, "ragged", corner="one live")
    built = build(case)
    attend, length = attend_of(lowering, case), int(built.batch.lengths[0])

    def step(first, last):
        starts = jnp.array([0] + [last - first] * 5)
        batch = RaggedBatch(built.batch.lengths.at[0].set(length - 9 + last), built.batch.block_tables, starts, 1)
        state = attend.state(jnp.roll(built.q, -first, axis=0), built.pages, batch, built.sinks)
        return AttentionState(*(x[: last - first] for x in state))

    parts = [step(0, 4), step(4, 7), step(7, 9)]
    joined = AttentionState(*(jnp.concatenate(xs) for xs in zip(*parts, strict=True)))
    exact = AttentionState(*(x[:9] for x in exact_state(built)))
    assert_states_close(joined, exact, built.error_unit[:9], "float32")


@every_lowering
@pytest.mark.parametrize("phase", ["decode", "ragged"])
def test_one_trace_while_values_vary(lowering, phase):
    """Lengths, tables, row counts and live sequences are data: a new value never compiles."""
    case = case_of("rich", phase)
    attend = attend_of(lowering, case)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(lambda *args: attend.update(*args), n=1))
    for corner in CORNERS:
        built = build(case.replace(corner=corner), hold_new=False)
        step(built.q, built.k, built.v, built.pages, built.batch, built.sinks)


@every_lowering
@pytest.mark.parametrize("phase", ["decode", "ragged"])
def test_calls_outside_of_jit_trace_once_while_values_vary(lowering, phase):
    """Also by an attention that is lowered anew each time, and with the batch's integers as lists."""
    case = case_of("plain", phase)
    sizes = []
    for corner in ("mixed", *CORNERS):
        built = build(case.replace(corner=corner), hold_new=False)
        values = [
            getattr(built.batch, name).tolist() for name in ("lengths", "block_tables", "query_starts", "num_seqs")
        ]
        batch = RaggedBatch(*values, query_rows=built.batch.query_rows)
        attend = dataclasses.replace(attend_of(lowering, case))
        attend(built.q, built.pages, batch)
        attend.update(built.q, built.k, built.v, built.pages, batch)
        sizes.append([program._cache_size() for program in (attend_module._state, attend_module._update)])
    assert sizes == sizes[:1] * len(sizes)


@every_lowering
@every_phase
@every_spec
def test_update_equals_write_then_attend(lowering, spec, phase):
    """The slots that this step's tokens go to hold NaN before the write."""
    case = case_of(spec, phase)
    built, held = build(case, hold_new=False), build(case)
    attend = attend_of(lowering, case)
    out, pages = attend.update(built.q, built.k, built.v, built.pages, built.batch, built.sinks)
    written = paged.write(built.k, built.v, built.pages, built.batch)
    for a, b, c in zip(pages.arrays, written.arrays, held.pages.arrays, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(np.nan_to_num(a), np.nan_to_num(c))
    np.testing.assert_array_equal(out, attend(built.q, written, built.batch, built.sinks))
    assert_state_close(AttentionState(out, state_of(attend, held).lse), held)
