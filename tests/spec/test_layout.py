"""`PageLayout`, `Pages` and `RaggedBatch`: shapes, errors, and wrapping without a copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged.spec import PAGE_ORDERS, PageLayout, RaggedBatch

FACTS = {"page_size": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": jnp.float32}
SHAPES = {
    "packed": ((5, 2, 2, 4, 8),),
    "joined": ((5, 2, 4, 128),),
    "split": ((2, 5, 4, 8), (2, 5, 4, 8)),
    "interleaved": ((5, 4, 4, 8),),
}


@pytest.mark.parametrize("order", SHAPES)
def test_init_has_the_documented_shapes_and_wrap_is_no_copy(order):
    layout = PageLayout(order=order, **FACTS)
    pages = layout.init(5)
    assert tuple(a.shape for a in pages.arrays) == SHAPES[order] and pages.num_pages == 5
    assert not any(np.asarray(a).any() for a in pages.arrays)
    wrapped = layout.wrap(*pages.arrays)
    assert all(a is b for a, b in zip(wrapped.arrays, pages.arrays, strict=True))
    assert layout.bytes_per_page == sum(a.nbytes for a in pages.arrays) // 5
    assert pages.keys().shape == pages.values().shape == (5, 2, 4, 8)


# By the documentation: in which array, and where in it, a key (kv = 0) or a value (kv = 1) lies.
PLACES = {
    "packed": lambda kv, page, head, offset: (0, (page, kv, head, offset)),
    "joined": lambda kv, page, head, offset: (0, (page, head, offset, slice(64 * kv, 64 * kv + 8))),
    "split": lambda kv, page, head, offset: (kv, (head, page, offset)),
    "interleaved": lambda kv, page, head, offset: (0, (page, offset, 2 * head + kv)),
}


def _assembled(order, k, v):
    """Arrays of ``[pages, kv_heads, page_size, dim]`` keys and values, put in place one vector at a time."""
    arrays = [np.zeros(shape, np.float32) for shape in SHAPES[order]]
    for page, head, offset in np.ndindex(*k.shape[:3]):
        for kv, x in enumerate((k, v)):
            which, where = PLACES[order](kv, page, head, offset)
            arrays[which][where] = x[page, head, offset]
    return arrays


def test_every_order_is_tested_here():
    assert tuple(SHAPES) == tuple(PLACES) == PAGE_ORDERS


@pytest.mark.parametrize("order", PAGE_ORDERS)
def test_keys_values_stack_and_unstack_follow_the_documented_order(order):
    layout = PageLayout(order=order, **FACTS)
    k, v = np.arange(2 * 320, dtype=np.float32).reshape(2, 5, 2, 4, 8)
    arrays = _assembled(order, k, v)
    pages = layout.wrap(*map(jnp.asarray, arrays))
    np.testing.assert_array_equal(pages.keys(), k)
    np.testing.assert_array_equal(pages.values(), v)
    tokens = layout.stack(*(jnp.asarray(x.swapaxes(1, 2)) for x in (k, v)))
    for array, rows in zip(arrays, tokens, strict=True):
        np.testing.assert_array_equal(np.moveaxis(rows, (0, 1), (layout.page_axis, layout.offset_axis)), array)
    for x, back in zip((k, v), layout.unstack(tokens), strict=True):
        np.testing.assert_array_equal(back, x.swapaxes(1, 2))


def test_split_pages_may_have_values_of_another_dimension():
    layout = PageLayout(order="split", value_dim=4, **FACTS)
    k, v = jnp.ones((3, 2, 8)), jnp.ones((3, 2, 4))
    assert [x.shape for x in layout.stack(k, v)] == [x.shape for x in layout.unstack((k, v))] == [k.shape, v.shape]
    assert layout.init(3).values().shape == (3, 2, 4, 4)


@pytest.mark.parametrize(("scales", "shape"), [("tensor", ()), ("head", (2,)), ("token", (5, 2, 4))])
def test_scales_multiply_what_they_belong_to(scales, shape):
    layout = PageLayout(**{**FACTS, "dtype": "int8"}, scales=scales)
    assert layout.is_quantised and layout.scale_shape(5) == shape
    given = {} if scales == "token" else {"k_scale": 0.5, "v_scale": jnp.ones(shape)}
    assert layout.init(5, **given).k_scale.shape == layout.init(5, **given).v_scale.shape == shape
    k_scale = jnp.arange(1, 1 + np.prod(shape, dtype=int), dtype=jnp.float32).reshape(shape)
    pages = layout.wrap(jnp.full(SHAPES["packed"][0], 2, jnp.int8), k_scale=k_scale, v_scale=0 * k_scale)
    each = {"tensor": (1, 1, 1), "head": (1, 2, 1), "token": (5, 2, 4)}[scales]
    want = np.broadcast_to(2 * np.asarray(k_scale).reshape(each), (5, 2, 4))
    np.testing.assert_array_equal(pages.keys(), np.repeat(want[..., None], 8, axis=-1))
    assert not np.asarray(pages.values()).any()


def test_layouts_are_values_and_print():
    layout = PageLayout(order="split", value_dim=4, **FACTS)
    assert layout == PageLayout(order="split", value_dim=4, **{**FACTS, "dtype": "float32"})
    assert len({layout, PageLayout(**FACTS)}) == 2
    assert layout.replace(head_dim=4).value_dim == 4 and layout.replace(head_dim=16).value_dim == 4
    assert PageLayout(**FACTS).replace(head_dim=4) == PageLayout(**{**FACTS, "head_dim": 4})
    assert PageLayout(**FACTS).replace(order="split", head_dim=4, value_dim=8).value_dim == 8
    assert str(layout) == "PageLayout(order=split, page_size=4, kv_heads=2, head_dim=8, value_dim=4, dtype=float32)"
    assert layout.init(3).arrays[1].shape == (2, 3, 4, 4)


LAYOUT_ERRORS = {
    "order": ({"order": "blocked"}, ValueError, "order must be one of .*packed.*got 'blocked'"),
    "page size": ({"page_size": 0}, ValueError, "page_size must be at least 1; got 0"),
    "page size type": ({"page_size": 4.0}, TypeError, r"page_size must be a Python int; got 4\.0"),
    "value dim of 0": ({"value_dim": 0}, ValueError, "value_dim must be at least 1; got 0"),
    "value dim": ({"value_dim": 4}, ValueError, r'value_dim must equal head_dim.*value_dim=4.*"split" they may'),
    "NumPy page size": ({"page_size": np.int32(4)}, TypeError, r"page_size must be a Python int; got np.int32\(4\)"),
    "order list": ({"order": ["packed"]}, ValueError, r"order must be one of .*got \['packed'\]"),
    "order array": ({"order": np.ones(2)}, ValueError, "order must be one of .*got array"),
    "dtype name": ({"dtype": "foo"}, TypeError, "dtype of pages must be one of .*got 'foo'"),
    "no dtype": ({"dtype": None}, TypeError, "dtype of pages must be one of .*got None"),
    "scales array": ({"scales": np.ones(2)}, ValueError, "scales must be None or one of .*got array"),
    "dtype": ({"dtype": "int32"}, TypeError, "dtype of pages must be one of .*int8.*got int32"),
    "double": ({"dtype": np.float64}, TypeError, "dtype of pages must be one of .*got float64"),
    "scales": ({"scales": "page"}, ValueError, "scales must be None or one of .*got 'page'"),
    "no scales": ({"dtype": "int8"}, ValueError, "dtype int8 and scales=None do not go together"),
    "float scales": ({"scales": "head"}, ValueError, "dtype float32 and scales='head' do not go together"),
}


@pytest.mark.parametrize("name", LAYOUT_ERRORS)
def test_layout_errors(name):
    change, kind, text = LAYOUT_ERRORS[name]
    with pytest.raises(kind, match=text):
        PageLayout(**{**FACTS, **change})


_PACKED, _SPLIT = PageLayout(**FACTS), PageLayout(order="split", **FACTS)
_INT8 = PageLayout(**{**FACTS, "dtype": "int8"}, scales="head")
_POOL, _HALF = jnp.zeros((5, 2, 2, 4, 8)), jnp.zeros((2, 5, 4, 8))
WRAP_ERRORS = {
    "shape": (
        lambda: _PACKED.wrap(_POOL[:, :, :1]),
        ValueError,
        r"kv must have shape \(5, 2, 2, 4, 8\).*got \(5, 2, 1",
    ),
    "dtype": (lambda: _PACKED.wrap(_POOL.astype("bfloat16")), TypeError, "kv must be float32.*got bfloat16"),
    "rank": (lambda: _PACKED.wrap(jnp.zeros(())), ValueError, r"kv must have shape.*got \(\)"),
    "list": (lambda: _PACKED.wrap(_POOL.tolist()), TypeError, "kv must be an array; got list"),
    "count": (lambda: _SPLIT.wrap(_HALF), TypeError, 'order "split" wraps k and v; got 1 arrays'),
    "v": (lambda: _SPLIT.wrap(_HALF, _HALF[:, :4]), ValueError, r"v must have shape \(2, 5, 4, 8\).*got \(2, 4"),
    "scale missing": (
        lambda: _INT8.wrap(_POOL.astype("int8")),
        ValueError,
        "k_scale does not fit.*float32 of shape.*got None",
    ),
    "scale list": (lambda: _PACKED.wrap(_POOL, k_scale=[1.0]), ValueError, r"k_scale does not fit.*got \[1.0\]"),
    "scale number": (
        lambda: _INT8.wrap(_POOL.astype("int8"), k_scale=0.5, v_scale=0.5),
        TypeError,
        "k_scale must be an array; got float",
    ),
    "scale given": (lambda: _PACKED.wrap(_POOL, k_scale=jnp.ones(2)), ValueError, "k_scale does not fit.*needs none"),
    "scale shape": (
        lambda: _INT8.wrap(_POOL.astype("int8"), k_scale=jnp.ones(2), v_scale=jnp.ones(3)),
        ValueError,
        r"v_scale must have shape \(2,\).*got \(3,\)",
    ),
    "scales of float pages": (lambda: _PACKED.init(5, k_scale=1.0), ValueError, "k_scale is for per-tensor.*=None"),
    "one scale": (lambda: _INT8.init(5, v_scale=1.0), ValueError, "given together; got v_scale alone"),
    "scale of 0": (lambda: _INT8.init(5, k_scale=0.0, v_scale=1.0), ValueError, r"k_scale must be positive.*got 0\.0"),
    "NaN scale": (lambda: _INT8.init(5, k_scale=1.0, v_scale=jnp.nan), ValueError, "v_scale must be positive"),
    "scales of 3 heads": (lambda: _INT8.init(5, k_scale=jnp.ones(3), v_scale=1.0), ValueError, r"\(2,\); got .*\(3,"),
    "no pages": (lambda: _PACKED.init(0), ValueError, "num_pages must be at least 1; got 0"),
}


@pytest.mark.parametrize("name", WRAP_ERRORS)
def test_wrap_errors(name):
    act, kind, text = WRAP_ERRORS[name]
    with pytest.raises(kind, match=text):
        act()


def test_batches_say_whose_rows_are_whose():
    decode = RaggedBatch.decode([3, 4], [[0, 1], [2, 3]], query_rows=2)
    assert decode.query_starts.tolist() == [0, 2, 4] and decode.query_rows == 2 and int(decode.num_seqs) == 2
    prefill = RaggedBatch.prefill(jnp.int32(5), [4, 2, 9], query_rows=3)
    assert prefill.block_tables.tolist() == [[4, 2, 9]] and prefill.query_starts.tolist() == [0, 3]
    assert (prefill.num_slots, prefill.pages_per_seq) == (1, 3)
    assert RaggedBatch([1], [[0]], [0, 1], jnp.array([1])).num_seqs.shape == ()
    leaves = jax.tree.leaves(decode)
    assert len(leaves) == 4 and all(leaf.dtype == jnp.int32 for leaf in leaves)


BATCH_ERRORS = {
    "float lengths": (([1.0], [[0]], [0, 1]), TypeError, "lengths must be int32; got float64"),
    "rank": (([1], [0], [0, 1]), ValueError, r"block_tables must have 2 dimension\(s\); got shape \(1,\)"),
    "tables": (([1, 2], [[0]], [0, 1, 2]), ValueError, r"block_tables must be .*\[2, at least 1\].*got \(1, 1\)"),
    "no entries": (([1], np.zeros((1, 0), int), [0, 1]), ValueError, r"block_tables must be .*got \(1, 0\)"),
    "starts": (([1, 2], [[0], [1]], [0, 1]), ValueError, r"query_starts must be .*= \[3\].*got \(2,\)"),
    "num_seqs": (([1], [[0]], [0, 1], [1, 2]), ValueError, r"num_seqs must have 0 dimension\(s\); got shape \(2,\)"),
}


@pytest.mark.parametrize("name", BATCH_ERRORS)
def test_batch_errors(name):
    args, kind, text = BATCH_ERRORS[name]
    with pytest.raises(kind, match=text):
        RaggedBatch(*args)


@pytest.mark.parametrize("num_seqs", [-1, 3, np.int64(3), np.array([-1])])
def test_a_known_number_of_sequences_is_in_range(num_seqs):
    with pytest.raises(ValueError, match=r"num_seqs must be in \[0, 2\].*2 sequence slots.*got (-1|3)\."):
        RaggedBatch.decode([5, 9], [[3], [1]], num_seqs)
    for live in (0, 1, 2, np.int64(2), np.array([2]), jnp.int32(7)):  # a JAX array is for `paged.check`
        assert int(RaggedBatch.decode([5, 9], [[3], [1]], live).num_seqs) == int(np.reshape(live, ()))


def test_a_batch_may_have_no_sequences():
    batch = RaggedBatch.decode([], np.zeros((0, 3), np.int32))
    assert (batch.num_slots, batch.pages_per_seq, batch.query_starts.tolist()) == (0, 3, [0])
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(batch))
    assert not batch.has_rows(3) and not RaggedBatch.decode([5], [[0]]).has_rows(0)
    assert RaggedBatch.decode([5], [[0]]).has_rows(1)
    with pytest.raises(TypeError, match="lengths must be int32; got float64"):
        RaggedBatch.decode(np.zeros(0), np.zeros((0, 3), np.int32))


def test_decode_of_a_wrong_rank_names_lengths():
    with pytest.raises(ValueError, match=r"lengths must have 1 dimension\(s\)"):
        RaggedBatch.decode(3, [[0]])


def test_the_page_order_is_said_and_never_guessed_from_divisibility():
    """Two heads and two pages: every order has arrays of plausible shapes, and only the right one is accepted."""
    facts = {"page_size": 2, "num_kv_heads": 2, "head_dim": 2, "dtype": jnp.float32}
    split, inter = (PageLayout(order=order, **facts) for order in ("split", "interleaved"))
    pool = jnp.zeros((2, 2, 2, 2))
    with pytest.raises(ValueError, match=r"kv must have shape \(2, 2, 4, 2\)"):
        inter.wrap(pool)
    assert split.wrap(pool, pool).num_pages == 2
