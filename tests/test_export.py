"""`jax.export`: what is lowered is written down with this package's pytrees, read back, and means the same."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import paged
from paged.lower._compile_for import compile_on
from paged.lower.tpu import CHIPS
from paged.runtime import LayerStack, PagePool
from tests.runtime.tiny import EMBED, GLOBAL, LAYOUT, random_layer
from tests.support import assert_bitwise, assert_state_close, build, case_of, every_lowering, lowered, state_of
from tests.tpu.points import needs_libtpu

SPEC = paged.AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=128, window=40, sinks=True)
LARGE = paged.PageLayout(page_size=16, num_kv_heads=2, head_dim=128)


def _read_back(function, *args, **options):
    return export.deserialize(export.export(function, **options)(*args).serialize())


@every_lowering
@pytest.mark.parametrize("phase", ["decode", "ragged"])
def test_a_state_of_any_batch_of_the_shape_is_the_same_bitwise(lowering, phase):
    built = build(case_of("rich", phase))
    attend = lowered(lowering, built.case)
    again = _read_back(jax.jit(attend.state), built.q, built.pages, built.batch, built.sinks)
    for corner in ("mixed", "first page masked", "empty"):
        other = build(built.case.replace(corner=corner))
        got = again.call(other.q, other.pages, other.batch, other.sinks)
        assert isinstance(got, paged.AttentionState)
        assert_bitwise(got, state_of(attend, other))


@every_lowering
def test_an_update_of_quantised_pages_comes_back_with_their_layout(lowering):
    built = build(case_of("plain", "decode", dtype="int8", scales="token", order="split"), hold_new=False)
    attend = lowered(lowering, built.case)
    args = (built.q, built.k, built.v, built.pages, built.batch)
    out, pages = _read_back(jax.jit(attend.update), *args).call(*args)
    want, written = attend.update(*args)
    assert pages.layout == built.case.layout and jax.tree.structure(pages) == jax.tree.structure(written)
    for a, b in zip(jax.tree.leaves((out, pages)), jax.tree.leaves((want, written)), strict=True):
        np.testing.assert_array_equal(a, b)


@every_lowering
def test_one_program_for_any_number_of_rows_and_of_sequences(lowering):
    """Both are symbolic, and so are the pages of the pool and the width of the tables; and what a batch brings."""
    case = case_of("rich", "ragged")
    case = case.replace(spec=case.spec.replace(window=paged.Value("window"), mask=paged.Tree()))
    attend, heads = lowered(lowering, case), case.spec.num_q_heads
    t, s, n, w = export.symbolic_shape("t, s, n, w")
    shape, i32 = jax.ShapeDtypeStruct, jnp.int32
    brought = {"values": {"window": shape((s,), i32)}, "positions": shape((t,), i32), "ancestors": shape((t, 1), i32)}
    batch = paged.RaggedBatch(shape((s,), i32), shape((s, w), i32), shape((s + 1,), i32), shape((), i32), **brought)
    q, pool = shape((t, heads, 8), jnp.float32), shape((n, *case.layout.array_shapes(1)[0][1:]), jnp.float32)
    again = _read_back(jax.jit(attend.state), q, case.layout.wrap(pool), batch, shape((heads,), jnp.float32))
    for other in (case, case.replace(corner="empty"), case.replace(phase="prefill", rows=6, pages_per_seq=3)):
        built = build(other)
        names = ("lengths", "block_tables", "query_starts", "num_seqs", *brought)
        batch = paged.RaggedBatch(**{name: getattr(built.batch, name) for name in names})
        assert_state_close(again.call(built.q, built.pages, batch, built.sinks), built)


def test_a_decode_step_of_any_number_of_sequences_is_built_inside():
    built = build(case_of("plain", "decode"))
    attend = paged.lower(built.case.spec, built.case.layout, "xla")
    step = lambda q, k, v, pages, lengths, tables: attend.update(
        q, k, v, pages, paged.RaggedBatch.decode(lengths, tables)
    )
    args = (built.q, built.k, built.v, built.pages, built.batch.lengths, built.batch.block_tables)
    (s,) = export.symbolic_shape("s")
    symbolic = [jax.ShapeDtypeStruct((s, *x.shape[1:]), x.dtype) for x in args if not isinstance(x, paged.Pages)]
    again = _read_back(jax.jit(step), *symbolic[:3], built.pages, *symbolic[3:])
    for count in (5, 2):
        fewer = [x if isinstance(x, paged.Pages) else x[:count] for x in args]
        for a, b in zip(jax.tree.leaves(again.call(*fewer)), jax.tree.leaves(step(*fewer)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_pages_of_another_layout_are_not_taken():
    built = build(case_of("plain", "decode"))
    attend = paged.lower(built.case.spec, built.case.layout, "xla")
    again = _read_back(jax.jit(attend.__call__), built.q, built.pages, built.batch)
    other = build(built.case.replace(order="split"))
    with pytest.raises(ValueError, match="order='packed'"):
        again.call(other.q, other.pages, other.batch)


def test_a_batch_marked_for_a_mask_is_refused_by_name():
    built = build(case_of("plain", "decode"))
    attend = paged.lower(built.case.spec, built.case.layout, "xla")
    batch = paged.check(built.case.spec, built.pages, built.batch, built.q.shape[0])
    with pytest.raises(ValueError, match=r"RaggedBatch.checked_for cannot be written down.*not marked"):
        export.export(jax.jit(attend.__call__))(built.q, built.pages, batch).serialize()


@pytest.mark.kernels  # a stack of layers runs always
def test_a_layer_and_its_pool_are_one_program():
    """A serving step: pages are reserved, a layer attends, the pool and the pages come back."""
    layer = random_layer(GLOBAL, 8, jax.random.key(0), check=False)

    def step(x, pool, pages):
        pool, _ = pool.extend(jnp.ones(2, jnp.int32))
        y, pages = layer.attend_pages(x, pages, pool.decode_batch(jnp.ones(2, bool)))
        return y, pool, pages

    args = (jax.random.normal(jax.random.key(1), (2, EMBED)), PagePool.init(8, 2, 4, 4), LAYOUT.init(8))
    again = _read_back(jax.jit(step), *args)
    for _ in range(2):
        got, want = again.call(*args), jax.jit(step)(*args)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
        assert got[1].lengths.tolist() == want[1].lengths.tolist()
        args = (args[0], *got[1:])


@pytest.mark.kernels
def test_a_stack_of_layers_is_one_program_for_any_number_of_sequences():
    """The state goes in and out as its arrays, because `eqx.nn.State` cannot be written down."""
    make = lambda key: random_layer(GLOBAL, 8, key, check=False)
    stack, state = eqx.nn.make_with_state(LayerStack.make)(make, jax.random.split(jax.random.key(0), 2))
    arrays, tree = jax.tree.flatten(state)

    def step(x, lengths, tables, arrays):
        y, state = stack(x, paged.RaggedBatch.decode(lengths, tables), jax.tree.unflatten(tree, arrays))
        return y, jax.tree.leaves(state)

    s, w = export.symbolic_shape("s, w")
    shapes = [
        jax.ShapeDtypeStruct((s, EMBED), jnp.float32),
        *(jax.ShapeDtypeStruct(x, jnp.int32) for x in ((s,), (s, w))),
    ]
    again = _read_back(jax.jit(step), *shapes, arrays)
    for tables in ([[7, 2]], [[7, 2, 1], [4, 3, -1]]):
        args = jnp.ones((len(tables), EMBED)), jnp.array([6, 8])[: len(tables)], jnp.array(tables), arrays
        for a, b in zip(*map(jax.tree.leaves, (again.call(*args), jax.jit(step)(*args))), strict=True):
            np.testing.assert_array_equal(a, b)


def test_one_program_for_two_platforms():
    """The XLA lowering holds no call that only one of them has."""
    built = build(case_of("rich", "ragged"))
    attend = lowered("xla-blocks", built.case)
    args = (built.q, built.pages, built.batch, built.sinks)
    both = _read_back(jax.jit(attend.__call__), *args, platforms=["cpu", "tpu"])
    assert set(both.platforms) == {"cpu", "tpu"}
    np.testing.assert_array_equal(both.call(*args), attend(*args))


def _for_tpu(generation, rows):
    """A donating step for that generation, read back on this machine, and the shapes of its arguments."""
    attend = paged.lower(SPEC, LARGE, "tpu").on_chip(generation)
    shape, tokens = jax.ShapeDtypeStruct, 4 * rows
    pages = LARGE.wrap(*(shape(dims, LARGE.dtype) for dims in LARGE.array_shapes(4096)))
    batch = paged.RaggedBatch.decode(shape((4,), jnp.int32), shape((4, 8), jnp.int32), query_rows=rows)
    batch = jax.tree.map(lambda x: shape(x.shape, x.dtype), batch)
    q, kv = (shape((tokens, heads, 128), jnp.bfloat16) for heads in (8, 2))
    args = (q, kv, kv, pages, batch, shape((8,), jnp.float32))
    return _read_back(jax.jit(attend.update, donate_argnums=3), *args, platforms=["tpu"]), args


@pytest.mark.parametrize(
    ("generation", "rows"),
    [("v5e", 1), *(pytest.param(*x, marks=pytest.mark.kernels) for x in (("v4", 1), ("v6e", 40)))],
)
def test_kernels_go_into_a_program_for_tpus_on_a_machine_without_one(generation, rows):
    again, _ = _for_tpu(generation, rows)
    text = again.mlir_module()
    assert again.platforms == ("tpu",) and "tpu_custom_call" in text
    assert "jax.buffer_donor" in text or "tf.aliasing_output" in text


@needs_libtpu
def test_what_is_read_back_compiles_and_writes_pages_in_place():
    again, args = _for_tpu("v5e", 1)
    memory = compile_on(CHIPS["v5e"], jax.jit(again.call, donate_argnums=3), *args).memory_analysis()
    assert memory.alias_size_in_bytes >= 4096 * LARGE.bytes_per_page > 32 * memory.temp_size_in_bytes
