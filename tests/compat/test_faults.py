"""Faults that other paged-attention kernels have had, asked of the entry points: see `tests/test_field.py`.

Every test runs on XLA. With ``-m "slow or not slow"`` it also runs on the TPU kernels, interpreted, races detected.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged.compat import page_attention, ragged_page_attention_v2, ragged_page_attention_v3
from tests.support import build
from tests.tpu.interpreter import params, watched

from .entries import CLOSE, ENTRIES, RICH, SPEC, arrays_of, built_for, by_loops, native_results, results

slow = pytest.mark.slow
every_entry = pytest.mark.parametrize("name", ENTRIES)


class Xla:
    """XLA, with small pages; traces are shared with `test_entry_points`."""

    page_size = 4

    def run(self, name, built, **arguments):
        return results(name, built, target="xla", **arguments)


class Tpu:
    """Interpreted kernels, with the smallest pages that they accept."""

    page_size = 8

    def run(self, name, built, **arguments):
        on_tpu = functools.partial(results, target="tpu", interpret=params(), **arguments)
        return watched(on_tpu, name, built)


@pytest.fixture(params=[Xla(), pytest.param(Tpu(), marks=slow)], ids=["xla", "tpu"])
def target(request):
    return request.param


def case_of(target, name, spec=RICH, **facts):
    spec = spec.replace(sinks=spec == RICH and ENTRIES[name].takes_sinks)
    return ENTRIES[name].case(spec, page_size=target.page_size, **facts)


def out_of(target, name, built, **arguments):
    got = target.run(name, built, **arguments)
    return np.asarray(got[0] if ENTRIES[name].writes else got)


def assert_close(name, out, built, spec=None):
    np.testing.assert_allclose(out, by_loops(name, build(built.case), spec), rtol=0, atol=CLOSE)


def assert_apart(name, out, built, spec):
    assert np.abs(out - by_loops(name, build(built.case), spec)).max() > 0.05


@pytest.mark.parametrize("name", ["page", "prefill", "v2", "v3"])
def test_a_window_a_cap_and_a_scale_each_change_a_step(target, name):
    """The output was the same with a window and without; a cap raised; one entry point had no scale."""
    case = case_of(target, name, corner="first page masked")
    # Built without the window, so that the hidden keys are live and would change the result.
    built = built_for(name, case.replace(spec=case.spec.replace(window=None)))
    out = out_of(target, name, built, sliding_window=RICH.window)
    assert_close(name, out, built, case.spec)
    for without in ({"window": None}, {"soft_cap": None}, {"scale": None}):
        assert_apart(name, out, built, case.spec.replace(**without))


@every_entry
def test_length_0_gives_0_and_not_a_mean_of_other_requests_values(target, name):
    built = built_for(name, case_of(target, name, corner="empty"))
    assert not out_of(target, name, built).any()


@slow
def test_the_page_order_is_not_guessed_from_divisibility(target):
    """The shape could mean four pages of two heads or two pages of four: the first axis counts heads."""
    size = target.page_size
    q, k, v = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(1, 4, 8), *[(4, 2, size, 8)] * 2]))
    how = {} if isinstance(target, Xla) else {"target": "tpu", "interpret": params()}
    out = page_attention(q, k, v, [3], [[1]], **how)
    scores = jnp.einsum("hd,hjd->hj", q[0], k[:, 1, :3]) / 8**0.5
    np.testing.assert_allclose(out[0], jnp.einsum("hj,hjd->hd", jax.nn.softmax(scores), v[:, 1, :3]), atol=1e-2)


@every_entry
def test_what_lies_in_unwritten_slots_and_other_pages_changes_no_bit(target, name):
    """NaN times a weight of 0. All slots without a token are poison, drawn anew, and pages lie elsewhere."""
    case = case_of(target, name, corner="one token")
    outs = [out_of(target, name, built_for(name, case, physical_seed=seed)) for seed in range(2)]
    assert np.isfinite(outs[0]).all() and np.abs(outs[0]).max() > 0.1
    np.testing.assert_array_equal(*outs)


def test_an_empty_sequence_does_not_show_the_row_before_it(target):
    built = built_for("page", case_of(target, "page", corner="mixed"))
    out = out_of(target, "page", built)
    assert int(built.batch.lengths[2]) == 0 and np.abs(out[1]).max() > 0.1 and not out[2].any()


@pytest.mark.parametrize("spec", [SPEC, RICH], ids=["plain", "window"])
@pytest.mark.parametrize("length", [10**6, 2**31 - 1])
def test_a_length_past_the_table_reads_nothing_of_the_next_sequence(target, length, spec):
    """Positions stay true: without a window the row sees all keys of its table, and a window hides them all."""
    built = built_for("page", case_of(target, "page", spec, corner="exact pages"))
    assert int(built.batch.lengths[3]) == 4 * target.page_size
    want = out_of(target, "page", built).copy()
    if spec.window is not None:
        want[3] = 0
    batch = type(built.batch).decode(built.batch.lengths.at[3].set(length), built.batch.block_tables)
    long = type(built)(**{**vars(built), "batch": batch})
    np.testing.assert_array_equal(out_of(target, "page", long), want)


def test_float32_pages_are_not_rounded_to_bfloat16(target):
    built = built_for("page", case_of(target, "page", corner="exact pages"))
    error = np.abs(out_of(target, "page", built) - by_loops("page", built)).max()
    assert error < 1e-5 < np.abs(by_loops("page", built)).max() * 2.0**-9


@pytest.mark.parametrize("corner", ["mixed", "exact pages", "first page masked", "one past a page", "one token"])
def test_a_chunk_is_the_last_rows_of_its_sequence_whatever_divides_what(target, corner):
    """Its start was a multiple of the chunk, trailing pages were dropped, and padding ids had to be valid."""
    built = built_for("prefill", case_of(target, "prefill", corner=corner))
    assert_close("prefill", out_of(target, "prefill", built), built)


def test_a_first_block_that_is_wholly_masked_gives_no_nan(target):
    built = built_for("v2", case_of(target, "v2", corner="first page masked"))
    assert all(row[0] >= target.page_size for row in built.visible[:1] if row is not None)
    assert_close("v2", out_of(target, "v2", built), built)


@slow
@pytest.mark.parametrize("pages_per_seq", [3, 5, 7])
def test_any_table_width_and_block_width_go_together(target, pages_per_seq):
    built = built_for("v2", case_of(target, "v2", SPEC, corner="first page masked", pages_per_seq=pages_per_seq))
    blocks = 2 if isinstance(target, Xla) else 16
    assert_close("v2", out_of(target, "v2", built, num_kv_pages_per_block=blocks), built)


@slow
@pytest.mark.parametrize("tokens", [12, 13])
def test_batches_need_no_padding(target, tokens):
    built = built_for("v2", case_of(target, "v2", SPEC, tokens=tokens))
    assert_close("v2", out_of(target, "v2", built), built)


@slow
def test_sums_are_not_in_bfloat16():
    """A bfloat16 sum of 512 equal weights stops at 256, which would make the mean twice as large."""
    kv_pages = jnp.ones((64, 8, 2, 8), jnp.bfloat16)
    table = jnp.arange(64)[None]
    out = ragged_page_attention_v2(jnp.ones((1, 2, 8), jnp.bfloat16), kv_pages, [512], table, [0, 1], 1)
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.ones((1, 2, 8)))


def test_every_row_of_a_windowed_chunk_has_its_own_window(target):
    """It started at the last query's, so that earlier rows lost their oldest keys."""
    built = built_for("v3", case_of(target, "v3", corner="first page masked"))
    rows = [row.tolist() for row in build(built.case).visible if row is not None][-8:]
    assert [row[0] for row in rows] == list(range(rows[0][0], rows[0][0] + 8)) and len(rows[0]) == 5
    assert_close("v3", out_of(target, "v3", built), built)


def test_a_write_to_page_0_is_kept_when_unused_entries_are_0(target):
    """Tables padded with zeros made a scatter write page 0 again and again, as it was before."""
    built = built_for("v3", case_of(target, "v3", corner="one token"))
    tables = np.zeros(built.batch.block_tables.shape, np.int32)
    tables[:, 0] = np.arange(5)
    batch = type(built.batch)(built.batch.lengths, tables, built.batch.query_starts, built.batch.num_seqs)
    clean = type(built.pages)((jnp.zeros_like(built.pages.arrays[0]),), None, None, built.case.layout)
    padded = type(built)(**{**vars(built), "batch": batch, "pages": clean})
    kv_pages = np.asarray(target.run("v3", padded)[1])
    np.testing.assert_array_equal(kv_pages[:5, 0, 0::2], built.k[:5])
    np.testing.assert_array_equal(kv_pages[:5, 0, 1::2], built.v[:5])
    assert not kv_pages[5:].any() and not kv_pages[:5, 1:].any()


@slow
def test_decode_does_not_make_scores_of_all_positions_with_all():
    shape = jax.ShapeDtypeStruct
    i32, f32 = jnp.int32, jnp.float32
    new, ints = shape((4, 2, 8), f32), [shape(s, i32) for s in ((4,), (4 * 64,), (5,), (3,))]
    jitted = jax.jit(functools.partial(ragged_page_attention_v3, target="xla"), donate_argnums=3)
    compiled = jitted.lower(shape((4, 4, 8), f32), new, new, shape((256, 64, 4, 8), f32), *ints).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 4096


def test_lengths_count_this_steps_own_tokens(target):
    """A sequence of one token sees itself. If lengths were counted before the step, it would see nothing."""
    built = built_for("v3", case_of(target, "v3", corner="one token"))
    out = out_of(target, "v3", built)
    assert np.abs(out[:5]).max() > 0.1
    assert_close("v3", out, built)


@pytest.mark.parametrize("ends", [(0, 0), (0, 5), (2, 3), (5, 5)])
def test_of_a_distribution_only_the_number_of_sequences_matters(target, ends):
    built = built_for("v3", case_of(target, "v3", corner="mixed"))
    want = target.run("v3", built)
    args = arrays_of("v3", built)
    args[7] = np.array([*ends, 5], np.int32)
    how = {"target": "xla"} if isinstance(target, Xla) else {"target": "tpu", "interpret": params()}
    got = ragged_page_attention_v3(*args, **ENTRIES["v3"].arguments(RICH), **how)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@slow
def test_the_default_scale_is_one_over_the_root_of_the_head_dimension(target):
    for name in ENTRIES:
        built = built_for(name, case_of(target, name, SPEC))
        out = out_of(target, name, built)
        assert_close(name, out, built)
        assert_apart(name, out, built, SPEC.replace(scale=1.0))


@slow
def test_max_context_len_changes_nothing_within_it_and_cuts_what_is_beyond():
    built = built_for("page", ENTRIES["page"].case(SPEC, corner="exact pages"))
    args = arrays_of("page", built)
    want = page_attention(*args)
    np.testing.assert_array_equal(page_attention(*args, max_context_len=16), want)
    np.testing.assert_array_equal(page_attention(*args, max_context_len=10**9), want)
    cut = page_attention(*args[:3], jnp.minimum(args[3], 6), args[4])
    np.testing.assert_allclose(page_attention(*args, max_context_len=6), cut, rtol=0, atol=1e-5)
    assert np.abs(cut - want).max() > 0.1


@slow
@pytest.mark.parametrize("name", ENTRIES)
def test_kernels_equal_the_native_surface_bitwise(name):
    target = Tpu()
    built = built_for(name, case_of(target, name))
    got = target.run(name, built)
    jax.tree.map(np.testing.assert_array_equal, got, native_results(name, built, target="tpu", interpret=params()))
