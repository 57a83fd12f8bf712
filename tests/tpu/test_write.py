"""The writing kernels make the XLA write's pages, bit for bit, for every alignment and every kind of batch."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower import LOWERINGS, Sequences
from paged.lower._compile_for import compile_on
from paged.lower.tpu import CHIPS
from paged.lower.tpu.write import plan as plan_module
from paged.lower.tpu.write import write_rows
from paged.lower.tpu.write.granules import GRANULE
from paged.lower.tpu.write.slots import Slots, edges, inner
from paged.spec import PAGE_ORDERS, PageLayout, Pages, RaggedBatch

from .interpreter import params, watched
from .points import marked

PAGE_SIZE, WIDTH, NUM_PAGES, TOKENS = 16, 5, 48, 128
SLOTS = 8
POOL_BYTES = 256 * 2**20
GARBAGE = (-1, -7, NUM_PAGES, 10**6, -(2**31), 2**31 - 1)

# Lengths and rows of eight sequences, and other facts of a batch.
BATCHES = {
    "mixed": ([70, 9, 0, 5, 40, 3, 33, 16], [45, 1, 0, 5, 16, 2, 1, 16], {}),
    **{
        f"every start, {rows} rows": ([start + rows for start in range(16, 24)], [rows] * 8, {})
        for rows in (1, 3, 8, 9, 16)
    },
    "every end": (list(range(40, 48)), [11, 12, 13, 14, 15, 16, 17, 18], {}),
    "holes": ([70, 40, 24, 65, 16, 9, 80, 1], [30, 20, 10, 9, 16, 1, 33, 1], {"holes": True}),
    "more rows than tokens": ([3, 8, 0, 21, 1, 0, 16, 7], [9, 16, 5, 30, 2, 1, 17, 7], {}),
    "few live": ([20, 17, 33, 50, 8, 8, 8, 8], [20, 2, 3, 16, 8, 8, 8, 8], {"num_seqs": 3}),
    "past the table": ([1000, 81, 80, 79, 10**6, -4, 5, 2], [20, 3, 8, 9, 24, 3, 5, 2], {}),
    "none": ([50] * 8, [0] * 8, {}),
    "neighbours": ([19, 21, 24, 18, 20, 40, 16, 1], [3, 2, 3, 1, 2, 20, 16, 1], {"shared": ((0, 1, 2), (3, 4))}),
}


def _layout(order="packed", dtype="float32", scales=None, page_size=PAGE_SIZE):
    dtype = jnp.dtype(dtype)
    return PageLayout(page_size=page_size, num_kv_heads=2, head_dim=8, dtype=dtype, order=order, scales=scales)


def _pages(layout, seed=0):
    """A pool of poison: other values for every token."""
    rng = np.random.default_rng(seed)
    arrays = []
    for shape in layout.array_shapes(NUM_PAGES):
        poison = rng.integers(-128, 128, shape) if layout.dtype == jnp.int8 else rng.normal(0, 3, shape)
        if layout.dtype != jnp.int8:
            poison[rng.random(shape) < 0.3] = np.nan
        arrays.append(jnp.asarray(poison, layout.dtype))
    shape = layout.scale_shape(NUM_PAGES)
    if shape is None:
        return layout.wrap(*arrays)
    scales = (jnp.asarray(rng.uniform(0.01, 0.1, shape), jnp.float32) for _ in range(2))
    return layout.wrap(*arrays, **dict(zip(("k_scale", "v_scale"), scales, strict=True)))


def _batch(name, page_size=PAGE_SIZE):
    """A batch of `BATCHES` with shuffled pages, and garbage wherever nothing may be read."""
    lengths, rows, more = BATCHES[name]
    rng = np.random.default_rng(len(name))
    tables = rng.permutation(NUM_PAGES)[: SLOTS * WIDTH].reshape(SLOTS, WIDTH)
    for first, *others in more.get("shared", ()):
        tables[others] = tables[first]
    if more.get("holes"):
        tables = np.where(rng.random(tables.shape) < 0.4, rng.choice(GARBAGE, tables.shape), tables)
    used = -(-np.array(lengths) // page_size)
    tables = np.where(np.arange(WIDTH) < used[:, None], tables, rng.choice(GARBAGE, tables.shape))
    starts = np.concatenate([[0], np.cumsum(rows)])
    live = more.get("num_seqs", SLOTS)
    starts[live + 1 :] = rng.choice(GARBAGE, SLOTS - live)
    return RaggedBatch(lengths, tables.astype(np.int32), starts, live)


def _rows(layout):
    keys = jax.random.split(jax.random.key(7), 2)
    return (4 * jax.random.normal(key, (TOKENS, layout.num_kv_heads, layout.head_dim)) for key in keys)


def _bits(array):
    array = np.asarray(array)
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def _assert_same_bits(got: Pages, want: Pages):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(_bits(one), _bits(other))


def _write_rows(chip, interpret, k, v, pages, batch):
    seqs = Sequences.of(batch, k.shape[0], pages.layout.page_size)
    return write_rows(chip, interpret, batch.query_rows, k, v, pages, seqs)


_write = jax.jit(_write_rows, static_argnums=(0, 1))
_expected = jax.jit(functools.partial(paged.write, target="xla"))


def _assert_writes(layout, names, mode, chip, **watch):
    """Assert that watched kernels make the XLA write's pages for every batch."""
    pages, (k, v) = _pages(layout), _rows(layout)
    for name in names:
        batch = _batch(name, layout.page_size)
        want = _expected(k, v, pages, batch)
        _assert_same_bits(watched(_write, chip, params(mode, chip.cores), k, v, pages, batch, **watch), want)


@pytest.fixture
def small_rings(monkeypatch):
    """Rings of two stages, so that a few granules go round several times. Returns a maker of chips named after that."""
    for name, value in (("_BLOCKS_AHEAD", 1), ("_MOST_IN_BLOCK", 2), ("_MOST_AHEAD", 1)):
        monkeypatch.setattr(plan_module, name, value)
    return lambda chip, **facts: dataclasses.replace(CHIPS[chip], **{"generation": f"{chip} of small rings", **facts})


@pytest.mark.kernels
@pytest.mark.parametrize("mode", ["on_wait", "eager"])
def test_every_batch_is_written_as_xla_writes_it(mode, small_rings):
    _assert_writes(_layout(), BATCHES, mode, small_rings("v5e"))


# Orders, dtypes and page sizes; the generation (v4, v5p: two cores); how transfers run.
POINTS = {
    "joined": (_layout("joined", "bfloat16"), "v4", "on_wait"),
    "split, per-token scales": (_layout("split", "int8", "token"), "v5e", "eager"),
    "interleaved": (_layout("interleaved", "float8_e4m3fn", "head"), "v5p", "on_wait"),
}
SLOW_POINTS = {
    f"{order}, {dtype}, {scales}, pages of {size}, {mode}": (_layout(order, dtype, scales, size), generation, mode)
    for order in PAGE_ORDERS
    for dtype, scales, size, generation, mode in (
        ("float32", None, 8, "v4", "eager"),
        ("bfloat16", None, 16, "v6e", "on_wait"),
        ("int8", "tensor", 32, "v5p", "on_wait"),
        ("int8", "token", 24, "tpu7x", "eager"),
        ("float8_e5m2", "head", 16, "v4", "eager"),
    )
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.kernels] * ("split" not in n)) for n in POINTS])
def test_orders_and_dtypes(name, small_rings):
    layout, generation, mode = POINTS[name]
    _assert_writes(layout, ("mixed", "neighbours"), mode, small_rings(generation))


# What the interpreter does in a few seconds: every batch in two orders, on one core. `test_orders_and_dtypes` has two
# cores, and `test_every_batch_is_written_as_xla_writes_it` numbers of four bytes.
OF_KERNELS = ("joined, bfloat16, None, pages of 16, on_wait", "interleaved, int8, token, pages of 24, eager")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.kernels if n in OF_KERNELS else pytest.mark.slow) for n in SLOW_POINTS],
)
def test_all_orders_and_dtypes(name):
    layout, generation, mode = SLOW_POINTS[name]
    _assert_writes(layout, BATCHES, mode, CHIPS[generation])


@pytest.mark.parametrize(
    "generation", [pytest.param("v4", marks=pytest.mark.slow), pytest.param("v5e", marks=pytest.mark.kernels)]
)
def test_tables_too_long_for_scalar_memory_are_cut_into_kernels(generation, small_rings):
    chip = small_rings(generation, generation="forgetful", smem_bytes=200)
    _assert_writes(_layout(), ("mixed", "neighbours", "holes"), "on_wait", chip)


def test_a_few_rows_of_known_number_are_written_by_one_kernel(small_rings):
    layout, rows, chip = _layout(), 2, small_rings("v5e")
    (k, v), pages = _rows(layout), _pages(layout)
    whole = _batch("few live")
    batch = RaggedBatch.decode(whole.lengths, whole.block_tables, 3, query_rows=rows)
    k, v = k[: SLOTS * rows], v[: SLOTS * rows]
    text = str(jax.make_jaxpr(lambda *args: _write_rows(chip, False, *args))(k, v, pages, batch))
    assert "paged_write_partial" in text and "paged_write_whole" not in text
    got = watched(_write, chip, params("eager"), k, v, pages, batch)
    _assert_same_bits(got, paged.write(k, v, pages, batch, target="xla"))


def _by_kernels(slots, whole, parts):
    """Which row the kernels put in each place in the pages, as ``((page, offset), row)``, by their granules."""
    places, tables = [], np.asarray(slots.tables).reshape(SLOTS, WIDTH)
    for s in range(SLOTS):
        of_seq = [tuple(int(np.broadcast_to(x, SLOTS)[s]) for x in part) for part in parts]
        granules = [(position, begin, end) for exists, position, begin, end in of_seq if exists]
        assert all(0 <= begin < end <= GRANULE and end - begin < GRANULE for _, begin, end in granules)
        first, count = (int(x[s]) for x in whole)
        granules += [(first + GRANULE * i, 0, GRANULE) for i in range(count)]
        for position, begin, end in granules:
            page = tables[s, min(position // PAGE_SIZE, WIDTH - 1)]
            if 0 <= page < NUM_PAGES:
                assert position % GRANULE == 0
                row = int(slots.row[s]) + position - int(slots.first[s])
                places += [((int(page), position % PAGE_SIZE + at), row + at) for at in range(begin, end)]
    return places


def test_every_row_is_in_one_granule_and_whole_granules_are_whole():
    """Against a loop over rows, for batches drawn at random."""
    rng = np.random.default_rng(0)

    @jax.jit
    def lists(batch):
        slots = Slots.of(Sequences.of(batch, TOKENS, PAGE_SIZE))
        return slots, inner(slots.first, slots.end), edges(slots.first, slots.end)

    for _ in range(200):
        rows = rng.integers(0, 1 + rng.choice([1, 9, 40]), SLOTS)
        starts = np.minimum(np.concatenate([[0], np.cumsum(rows)]), TOKENS)
        rows, lengths = np.diff(starts), rng.integers(0, WIDTH * PAGE_SIZE + 1, SLOTS)
        tables = rng.permutation(NUM_PAGES)[: SLOTS * WIDTH].reshape(SLOTS, WIDTH)
        tables = np.where(rng.random(tables.shape) < 0.2, rng.choice(GARBAGE, tables.shape), tables).astype(np.int32)
        granules = lists(RaggedBatch(lengths, tables, starts))
        want = {}
        for s in range(SLOTS):
            for i in range(rows[s]):
                position = lengths[s] - rows[s] + i
                if position >= 0 and 0 <= tables[s, position // PAGE_SIZE] < NUM_PAGES:
                    want[int(tables[s, position // PAGE_SIZE]), int(position % PAGE_SIZE)] = int(starts[s] + i)
        found = _by_kernels(*granules)
        assert dict(found) == want and len(found) == len(want)


@pytest.mark.kernels
def test_the_door_takes_a_target_and_gradients_are_those_of_xla():
    layout = _layout()
    pages, (k, v) = _pages(layout), _rows(layout)
    pages = layout.wrap(jnp.nan_to_num(pages.arrays[0]))
    batch = _batch("mixed")

    def loss(write):
        return lambda k, v, pages: sum(jnp.sum(jnp.sin(x)) for x in write(k, v, pages, batch).arrays)

    def by_kernel(*args):
        return paged.write(*args, target="tpu", interpret=params("eager"))

    got = watched(jax.value_and_grad(loss(by_kernel), argnums=(0, 1, 2)), k, v, pages)
    want = jax.value_and_grad(loss(paged.write), argnums=(0, 1, 2))(k, v, pages)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("facts", "target", "match"),
    [
        ({"page_size": 12}, "tpu", r'No lowering writes these pages on target "tpu": tpu-decode: pages of 12 tokens'),
        ({"dtype": "float16"}, "tpu", r"a TPU has no float16.*Targets that do: \['gpu', 'xla'\]"),
        ({}, "cuda", r"target must be one of .*; got 'cuda'"),
    ],
)
def test_what_no_kernel_writes_is_refused_with_the_reason(facts, target, match):
    layout = _layout(**facts)
    with pytest.raises(ValueError, match=match):
        paged.write(*_rows(layout), _pages(layout), _batch("mixed"), target=target)


def test_a_granule_too_large_for_the_chip_is_refused():
    layout = PageLayout(page_size=8, num_kv_heads=128, head_dim=512, dtype=jnp.float32)
    low = next(low for low in LOWERINGS if low.target == "tpu")
    assert "vector memory" in (low.on_chip("v4").refuses_write(layout) or "")
    assert low.on_chip("v5e").refuses_write(layout) is None


def test_interpreting_what_has_no_kernels_is_refused():
    with pytest.raises(ValueError, match='the lowering "xla-blocks" has none'):
        paged.write(*_rows(_layout()), _pages(_layout()), _batch("mixed"), target="xla", interpret=True)


def _compiled(generation, layout, tokens=512, slots=16):
    """The write, compiled for a generation with donated pages; and the bytes of the new rows."""
    num_pages = POOL_BYTES // layout.bytes_per_page
    arrays = [jax.ShapeDtypeStruct(shape, layout.dtype) for shape in layout.array_shapes(num_pages)]
    scale = layout.scale_shape(num_pages)
    scales = {} if scale is None else dict.fromkeys(("k_scale", "v_scale"), jax.ShapeDtypeStruct(scale, jnp.float32))
    tables = np.zeros((slots, 4096 // layout.page_size), int)
    batch = RaggedBatch(np.full(slots, 4096), tables, np.linspace(0, tokens, slots + 1).astype(int))
    new = jax.ShapeDtypeStruct((tokens, layout.num_kv_heads, layout.head_dim), jnp.bfloat16)
    chip = CHIPS[generation]
    function = jax.jit(lambda *args: _write_rows(chip, False, *args), donate_argnums=2)
    rows = tokens * layout.bytes_per_page // layout.page_size
    return compile_on(chip, function, new, new, layout.wrap(*arrays, **scales), batch), rows


LAYOUTS = {
    "llama": {},
    "pages of 8, float32": {"page_size": 8, "dtype": "float32"},
    "pages of 64": {"page_size": 64},
    "head_dim 256": {"head_dim": 256, "num_kv_heads": 4},
    "gpt-oss": {"head_dim": 64, "order": "joined"},
    "split": {"order": "split"},
    "interleaved": {"order": "interleaved"},
    "int8": {"dtype": "int8", "scales": "head"},
    "int8, token": {"dtype": "int8", "scales": "token"},
    "int8, split, pages of 8": {"dtype": "int8", "scales": "tensor", "order": "split", "page_size": 8},
    "float8, interleaved": {"dtype": "float8_e4m3fn", "scales": "head", "order": "interleaved"},
    "float8, joined": {"dtype": "float8_e5m2", "scales": "token", "order": "joined"},
    "MQA": {"num_kv_heads": 1},
    "32 heads": {"num_kv_heads": 32},
}
FAST = (("llama", "v5e"), ("int8", "v4"))  # one core and two
COMPILED = [(name, generation) for name in LAYOUTS for generation in CHIPS]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is in the package libtpu")
@pytest.mark.parametrize(
    ("name", "generation"),
    marked(COMPILED, FAST),
)
def test_compiles_in_place(name, generation):
    """The pool is written in place, and temporary memory is a few times the new rows: no part of the pool."""
    facts = {"page_size": 16, "num_kv_heads": 8, "head_dim": 128, **LAYOUTS[name]}
    compiled, rows = _compiled(generation, PageLayout(**{**facts, "dtype": jnp.dtype(facts.get("dtype", "bfloat16"))}))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= POOL_BYTES
    # A token's scales lie along lanes, and XLA turns the arrays of keys' and of values' round to scatter, on some chips
    # both at once.
    scales = 0 if LAYOUTS[name].get("scales") != "token" else 2 * POOL_BYTES // 8
    assert memory.temp_size_in_bytes < 8 * rows + 2**20 + scales
