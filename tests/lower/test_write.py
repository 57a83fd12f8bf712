"""`write`: every live token in its place, and not a bit anywhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.spec import PAGE_ORDERS, PageLayout, RaggedBatch
from tests.support import CORNERS, Built, build, case_of


def _bits(array):
    array = np.asarray(array)
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def _by_offset(pages):
    """Raw bits at each offset of each page, as ``[pages, page_size, bytes of keys and values]``, whatever the order."""
    axes = pages.layout.page_axis, pages.layout.offset_axis
    moved = [np.moveaxis(_bits(a), axes, (0, 1)) for a in pages.arrays]
    return np.concatenate([m.reshape(*m.shape[:2], -1) for m in moved], axis=-1)


def _written(built: Built):
    """Where the step writes, as ``[pages, page_size]``, from the case and not from the library."""
    flags = np.zeros(built.is_held.shape, bool)
    size = built.case.page_size
    for owner in built.row_of:
        if owner is not None and owner[1] >= 0:
            flags[built.batch.block_tables[owner[0], owner[1] // size], owner[1] % size] = True
    return flags


@pytest.mark.parametrize("order", PAGE_ORDERS)
@pytest.mark.parametrize("corner", CORNERS)
def test_touches_its_own_places_and_not_a_bit_elsewhere(order, corner):
    """Dead rows, positions before the first token and padding are dropped; every other place keeps its NaN's bits."""
    built = build(case_of("plain", "ragged", order=order, corner=corner), hold_new=False)
    pages = paged.write(built.k, built.v, built.pages, built.batch)
    before, after, written = _by_offset(built.pages), _by_offset(pages), _written(built)
    np.testing.assert_array_equal(before[~written], after[~written])
    assert (before[written] != after[written]).any(axis=-1).all()
    for row, owner in enumerate(built.row_of):
        if owner is not None and owner[1] >= 0:
            page, offset = built.batch.block_tables[owner[0], owner[1] // 4], owner[1] % 4
            np.testing.assert_array_equal(pages.keys()[page, :, offset], built.k[row])
            np.testing.assert_array_equal(pages.values()[page, :, offset], built.v[row])


@pytest.mark.parametrize("order", PAGE_ORDERS)
@pytest.mark.parametrize("hole", [-1, -5, 23, 10**6, -(2**31), 2**31 - 1])
def test_a_hole_drops_its_tokens_and_touches_nothing(order, hole):
    """Nor page 0, nor the last page: a wrapped or clamped index would hit these."""
    built = build(case_of("plain", "ragged", order=order, corner="one past a page"), hold_new=False)
    tables = np.array(built.batch.block_tables)
    tables[2, 2:] = hole  # sequence 2 writes six tokens, 7 to 12, over pages 1 to 3
    whole = RaggedBatch(built.batch.lengths, tables, built.batch.query_starts, built.batch.num_seqs)
    pages = paged.write(built.k, built.v, built.pages, whole)
    before, after, written = _by_offset(built.pages), _by_offset(pages), _written(built)
    written[np.array(built.batch.block_tables)[2, 2:]] = False
    np.testing.assert_array_equal(before[~written], after[~written])
    assert (before[written] != after[written]).any(axis=-1).all()


@pytest.mark.parametrize("order", PAGE_ORDERS)
def test_rows_past_the_table_touch_nothing(order):
    """One sequence writes six rows, of which three are past its last entry; another writes one, past it."""
    built = build(case_of("plain", "ragged", order=order, corner="one past a page"), hold_new=False)
    assert built.batch.lengths.tolist()[2] == 13 and built.batch.pages_per_seq * 4 == 16
    for length in (17, 2**31 - 1):
        lengths = built.batch.lengths.at[0].set(length).at[2].set(19)
        batch = RaggedBatch(lengths, built.batch.block_tables, built.batch.query_starts, built.batch.num_seqs)
        pages = paged.write(built.k, built.v, built.pages, batch)
        rows = {owner: row for row, owner in enumerate(built.row_of) if owner is not None}
        want = {}  # place in the pages -> row
        for (s, position), row in rows.items():
            position += {0: length - 5, 2: 6}.get(s, 0)
            if position < 16:
                want[int(batch.block_tables[s, position // 4]), position % 4] = row
        before, after = _by_offset(built.pages), _by_offset(pages)
        assert set(zip(*np.nonzero((before != after).any(axis=-1)), strict=True)) == set(want)
        for (page, offset), row in want.items():
            np.testing.assert_array_equal(pages.keys()[page, :, offset], built.k[row])
        assert len(want) == 13 - 1 - 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounds_to_the_pages_dtype_once(dtype):
    built = build(case_of("plain", "ragged", dtype=dtype), hold_new=False)
    pages = paged.write(built.k, built.v, built.pages, built.batch)
    row = next(i for i, owner in enumerate(built.row_of) if owner is not None and owner[1] >= 0)
    seq, position = built.row_of[row]
    page, offset = built.batch.block_tables[seq, position // 4], position % 4
    np.testing.assert_array_equal(pages.keys()[page, :, offset], built.k[row].astype(dtype).astype(jnp.float32))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("scales", ["tensor", "head", "token"])
@pytest.mark.parametrize("order", ["packed", "split"])
def test_quantises_to_the_nearest_value_and_saturates(dtype, scales, order):
    """Scales a token are the row's largest magnitude over the dtype's; given scales bound what can be stored."""
    layout = PageLayout(page_size=2, num_kv_heads=2, head_dim=8, dtype=dtype, scales=scales, order=order)
    pages = layout.init(3, **({} if scales == "token" else {"k_scale": 0.25, "v_scale": 0.5}))
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(0, 3, (3, 2, 8)), jnp.float32) for _ in range(2))
    k = k.at[1].set(0.0).at[2, 0, 0].set(1e6)
    written = paged.write(k, v, pages, RaggedBatch.prefill(3, [2, 0], 3))
    largest = 127.0 if dtype == "int8" else float(jnp.finfo(dtype).max)
    for name, x, got, scale in (
        ("k", k, written.keys(), written.k_scale),
        ("v", v, written.values(), written.v_scale),
    ):
        got = np.stack([got[2, :, 0], got[2, :, 1], got[0, :, 0]])
        if scales == "token":
            bound = np.abs(np.asarray(x)).max(axis=-1, keepdims=True)
        else:
            bound = np.full((3, 2, 1), largest * float(scale.reshape(-1)[0]))
        want = np.clip(np.asarray(x), -bound, bound)
        step = bound / largest / 2  # half the distance between integers, or between subnormal float8 values
        if dtype != "int8":
            info = jnp.finfo(dtype)
            step = np.maximum(np.abs(want) * float(info.eps) / 2, step * float(info.smallest_subnormal))
        assert np.isfinite(got).all(), name
        assert (np.abs(got - want) <= step * 1.001).all(), name
    np.testing.assert_array_equal(written.keys()[2, :, 1], 0.0)


def test_scales_a_token_are_written_only_where_tokens_are():
    built = build(case_of("plain", "ragged", dtype="int8", scales="token"), hold_new=False)
    pages = paged.write(built.k, built.v, built.pages, built.batch)
    written = _written(built)
    changed = (_bits(pages.k_scale) != _bits(built.pages.k_scale)).any(axis=1)
    np.testing.assert_array_equal(changed, written)
    assert np.isfinite(np.moveaxis(np.asarray(pages.k_scale), 1, 2)[written]).all()


def test_keeps_layout_and_works_under_jit_and_vmap():
    built = build(case_of("plain", "decode"), hold_new=False)
    plain = paged.write(built.k, built.v, built.pages, built.batch)
    jitted = jax.jit(paged.write)(built.k, built.v, built.pages, built.batch)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), (built.k, built.v, built.pages, built.batch))
    mapped = jax.vmap(paged.write)(*stacked)
    assert jitted.layout == plain.layout == mapped.layout
    np.testing.assert_array_equal(_bits(plain.arrays[0]), _bits(jitted.arrays[0]))
    np.testing.assert_array_equal(_bits(plain.arrays[0]), _bits(mapped.arrays[0][1]))
