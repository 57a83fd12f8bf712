"""Pages that are copied inside of a pool, by themselves and before a step's write: in place, and none but these."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower.jax_version import CONVERTED_WHOLE
from paged.lower.xla import copy
from paged.spec import PAGE_ORDERS, PageLayout, RaggedBatch
from paged.testing import check_write
from tests.support.hlo import copies_in_loops

NUM_PAGES = 12
# Copies to and from what is no page of the pool, and a page to itself, are none.
SOURCES, TARGETS = [3, -1, 7, 10**6, 5, 2, 3], [9, 0, 1, 6, -7, 2, 4]
DTYPES = (("float32", None), ("bfloat16", None), ("int8", "token"), ("int8", "head"), ("float8_e4m3fn", "tensor"))


def layout_of(order="packed", dtype="float32", scales=None, **facts):
    facts = {"page_size": 4, "num_kv_heads": 2, "head_dim": 8, **facts}
    return PageLayout(**facts, dtype=jnp.dtype(dtype), order=order, scales=scales)


def random_pages(layout, num_pages=NUM_PAGES):
    """Pages of random bits, among them NaN."""
    rng, made = np.random.default_rng(0), []
    for shape in layout.array_shapes(num_pages):
        bits = rng.integers(0, 256, (*shape, layout.dtype.itemsize), np.uint8)
        made.append(jnp.asarray(bits.view(layout.dtype)[..., 0]))
    shape = layout.scale_shape(num_pages)
    scales = {} if shape is None else {f"{x}_scale": jnp.asarray(rng.random(shape), jnp.float32) for x in "kv"}
    return layout.wrap(*made, **scales)


def copied_by_loop(pages, sources, targets):
    """Every array whose axis of pages is known, with pages copied one after the other."""
    layout, axes = pages.layout, pages.layout.scale_axes or ()
    parts = [(x, layout.page_axis) for x in pages.arrays]
    parts += [(x, axes.index("page") if "page" in axes else None) for x in (pages.k_scale, pages.v_scale)]
    made = []
    for x, axis in parts:
        x = None if x is None else np.array(x)
        for source, target in zip(sources, targets, strict=True):
            if x is not None and axis is not None and 0 <= source < NUM_PAGES and 0 <= target < NUM_PAGES:
                at = (slice(None),) * axis
                x[(*at, target)] = x[(*at, source)]
        made.append(x)
    return made


def assert_same_bits(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(*(np.atleast_1d(np.asarray(x)).view(np.uint8) for x in (a, b)))


ORDERS = [
    pytest.param(order, marks=[pytest.mark.kernels] * (order in ("joined", "interleaved"))) for order in PAGE_ORDERS
]


@pytest.mark.parametrize("order", ORDERS)
def test_pages_are_copied_bit_for_bit_and_no_others(order):
    for dtype, scales in DTYPES:
        pages = random_pages(layout_of(order, dtype, scales))
        got = paged.copy_pages(pages, SOURCES, np.array(TARGETS))
        assert_same_bits([*got.arrays, got.k_scale, got.v_scale], copied_by_loop(pages, SOURCES, TARGETS))


def test_a_gpu_copies_the_same_at_once(monkeypatch):
    """By one gather and one scatter per array, of which no loop is left."""
    monkeypatch.setattr(copy, "_copy_in_turn", lambda axis, _, *args: copy._copy_at_once(axis, *args))
    for order, dtype, scales in (("packed", "float32", None), ("joined", "int8", "token")):
        pages = random_pages(layout_of(order, dtype, scales))
        got = paged.copy_pages(pages, SOURCES, np.array(TARGETS))
        assert_same_bits([*got.arrays, got.k_scale, got.v_scale], copied_by_loop(pages, SOURCES, TARGETS))
    traced = jax.jit(paged.copy_pages).trace(pages, jnp.array(SOURCES), jnp.array(TARGETS))
    assert "stablehlo.while" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_write_copies_first():
    check_write(
        paged.write, layouts=[layout_of(order, page_size=16) for order in PAGE_ORDERS], batches=["shared pages"]
    )


def sharing_batch():
    """Three sequences: two that write into a copy of page 5, and one that shares nothing."""
    tables = [[5, 1, -1], [4, 2, -1], [7, 3, 8]]
    return RaggedBatch([6, 7, 9], tables, [0, 1, 3, 5], copy_from=[6, 6, -1])


@pytest.mark.kernels
def test_an_update_attends_over_what_was_copied():
    """With a plan and without, and in the second of two layers of one pool: as after `copy_pages` by hand."""
    layout, batch = layout_of(), sharing_batch()
    spec = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
    attend, (q, k, v) = (
        paged.lower(spec, layout),
        (jax.random.normal(jax.random.key(i), (5, h, 8)) for i, h in ((0, 4), (1, 2), (2, 2))),
    )
    pages = layout.wrap(jax.random.normal(jax.random.key(3), layout.array_shapes(NUM_PAGES)[0]))
    by_hand = paged.copy_pages(pages, [6, 6], [1, 2])
    want = attend.update(q, k, v, by_hand, dataclasses.replace(batch, copy_from=None))
    chex.assert_trees_all_equal(attend.update(q, k, v, pages, batch), want)
    chex.assert_trees_all_equal(attend.update(q, k, v, pages, attend.plan(q, pages, batch)), want)
    both = layout.wrap(jnp.concatenate([jnp.full_like(pages.arrays[0], jnp.nan), pages.arrays[0]]))
    for step in (batch, attend.plan(q, pages, batch)):
        out, after = attend.update(q, k, v, both, step.for_layer(1, NUM_PAGES, 2))
        np.testing.assert_array_equal(out, want[0])
        np.testing.assert_array_equal(after.arrays[0][NUM_PAGES:], want[1].arrays[0])
        assert jnp.isnan(after.arrays[0][:NUM_PAGES]).all()


@pytest.mark.kernels
def test_the_gradient_of_a_copy_goes_to_the_page_it_came_from():
    """Forward and reverse mode, against the same update over arrays that were gathered."""
    layout, batch = layout_of(), sharing_batch()
    spec = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
    attend, x = paged.lower(spec, layout), jax.random.normal(jax.random.key(1), (5, 4, 8))
    array = jax.random.normal(jax.random.key(3), layout.array_shapes(NUM_PAGES)[0])

    def loss(is_by_hand, array):
        step = dataclasses.replace(batch, copy_from=None) if is_by_hand else batch
        array = array.at[jnp.array([1, 2])].set(array[jnp.array([6, 6])]) if is_by_hand else array
        out, pages = attend.update(x, x[:, :2], x[:, 2:], layout.wrap(array), step)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(pages.arrays[0]))

    got, want = (jax.grad(loss, argnums=1)(is_by_hand, array) for is_by_hand in (False, True))
    assert np.abs(want[6]).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-6)
    moved = [jax.jvp(lambda a, b=b: loss(b, a), (array,), (jnp.cos(array),))[1] for b in (False, True)]
    np.testing.assert_allclose(*moved, rtol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_the_compiled_copy_makes_no_copy_of_the_pool(order):
    for dtype in ("float32", "bfloat16", "int8"):
        layout = layout_of(order, dtype, "token" if dtype == "int8" else None)
        pages, ids = layout.init(512), jnp.arange(8, dtype=jnp.int32)
        optimised = {"xla_backend_optimization_level": 3}  # tests compile without
        compiled = jax.jit(paged.copy_pages, donate_argnums=0).lower(pages, ids, ids + 8).compile(optimised)
        # As bits, an update is in place, though a loop seems to make a new pool of them: memory tells.
        is_seen = layout.dtype not in CONVERTED_WHOLE
        assert not is_seen or copies_in_loops(compiled.as_text(), pages.arrays[0].nbytes // 2) == []
        assert compiled.memory_analysis().temp_size_in_bytes < pages.arrays[0].nbytes // 8


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda pages: paged.copy_pages(pages, [1, 2], [3]), ValueError, "target_page must be integers .copies."),
        (lambda pages: paged.copy_pages(pages, [1.0], [3]), ValueError, "source must be integers .*float64"),
        (lambda pages: paged.copy_pages(pages.arrays, [1], [3]), TypeError, "pages must come from layout.init"),
        (
            lambda pages: RaggedBatch.decode([1, 2], [[0], [1]], copy_from=[1]),
            ValueError,
            r"copy_from must be \[seqs\]",
        ),
        (lambda pages: RaggedBatch.decode([1], [[0]], copy_from=[0.5]), TypeError, "copy_from must be int32"),
    ],
)
def test_error_texts(call, error, text):
    with pytest.raises(error, match=text):
        call(layout_of().init(NUM_PAGES))
