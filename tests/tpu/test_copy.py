"""The kernel that copies pages makes the XLA copy's pages, bit for bit, and the real compiler runs it in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower._compile_for import compile_on
from paged.lower.program import PageCopies
from paged.lower.tpu import CHIPS
from paged.lower.tpu.copy import copy_pages, launch, refuses_copy
from tests.lower.test_copy import NUM_PAGES, SOURCES, TARGETS, assert_same_bits, copied_by_loop, layout_of, random_pages

from .interpreter import MODES, params, watched
from .points import marked, needs_libtpu

COPIES = PageCopies.between(jnp.array(SOURCES), jnp.array(TARGETS), NUM_PAGES)
# Orders, dtypes, the generation (v4, v5p: two cores), how transfers run.
POINTS = {
    "packed": (layout_of(page_size=8), "v4", "on_wait"),
    "split, per-token scales": (layout_of("split", "int8", "token", page_size=8), "v5e", "eager"),
    "joined": (layout_of("joined", "bfloat16", page_size=8), "v5p", "eager"),
    "interleaved": (layout_of("interleaved", "float8_e4m3fn", "head", page_size=8), "v6e", "on_wait"),
}
FAST = "split, per-token scales"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.kernels] * (n != FAST)) for n in POINTS])
def test_pages_are_copied_bit_for_bit_and_no_others(name, monkeypatch):
    """With few copies on their way at once, so that a semaphore is used again."""
    monkeypatch.setattr(launch, "_AHEAD", 1)
    layout, generation, mode = POINTS[name]
    pages, chip = random_pages(layout), CHIPS[generation]
    run = lambda pages, copies: copy_pages(chip, params(mode, chip.cores), pages, copies)
    got = watched(jax.jit(run), pages, COPIES)
    assert_same_bits([*got.arrays, got.k_scale, got.v_scale], copied_by_loop(pages, SOURCES, TARGETS))


@pytest.mark.kernels
@pytest.mark.parametrize("mode", MODES)
def test_an_update_copies_by_the_kernel_and_writes_after_it(mode):
    layout = layout_of("joined", page_size=8)
    spec = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
    batch = paged.RaggedBatch.decode([12, 14, 17], [[5, 1, -1], [4, 2, -1], [7, 3, 8]], copy_from=[6, 6, -1])
    q, k, v = (jax.random.normal(jax.random.key(i), (3, h, 8)) for i, h in ((0, 4), (1, 2), (2, 2)))
    pages = layout.wrap(jax.random.normal(jax.random.key(3), layout.array_shapes(NUM_PAGES)[0]))
    attend = paged.lower(spec, layout, "tpu", interpret=params(mode))
    assert "paged_copy" in str(jax.make_jaxpr(attend.update)(q, k, v, pages, batch))
    got, after = watched(jax.jit(attend.update), q, k, v, pages, batch)
    want, written = paged.lower(spec, layout, "xla").update(q, k, v, pages, batch)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert_same_bits(after.arrays, written.arrays)


def test_pages_that_xla_lays_out_otherwise_are_copied_by_xla():
    layout = layout_of(page_size=8)
    assert "no multiple of 128" in (refuses_copy(layout) or "")
    assert refuses_copy(layout_of("joined", page_size=8)) is None
    text = str(jax.make_jaxpr(lambda x: paged.copy_pages(x, [0], [1], "tpu", interpret=True))(layout.init(2)))
    assert "paged_copy" not in text


LAYOUTS = {
    "llama": {},
    "gpt-oss": {"head_dim": 64, "order": "joined"},
    "gpt-oss, packed": {"head_dim": 64},
    "split": {"order": "split"},
    "interleaved": {"order": "interleaved"},
    "int8, token": {"dtype": "int8", "scales": "token"},
    "float8": {"dtype": "float8_e5m2", "scales": "head"},
    "float32, pages of 8": {"page_size": 8, "dtype": "float32"},
}
COMPILED = [(name, list(CHIPS)[i % 5]) for i, name in enumerate(LAYOUTS)] + [("llama", "v5e"), ("int8, token", "v4")]


@needs_libtpu
@pytest.mark.parametrize(("name", "generation"), marked(COMPILED, (("llama", "v5e"),)))
def test_compiles_in_place(name, generation):
    """64 copies in a pool of 256 MiB that is donated: no temporary memory but a few pages, padded to 128 features."""
    facts = {"page_size": 16, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", **LAYOUTS[name]}
    layout = layout_of(**facts)
    num_pages = 256 * 2**20 // layout.bytes_per_page
    arrays = [jax.ShapeDtypeStruct(shape, layout.dtype) for shape in layout.array_shapes(num_pages)]
    scale = layout.scale_shape(num_pages)
    scales = {} if scale is None else dict.fromkeys(("k_scale", "v_scale"), jax.ShapeDtypeStruct(scale, jnp.float32))
    lowering = next(low for low in paged.lower.LOWERINGS if low.target == "tpu").on_chip(generation)
    ids = jax.ShapeDtypeStruct((64,), jnp.int32)
    copy = jax.jit(lambda pages, *ids: lowering.copy(pages, PageCopies(*ids)), donate_argnums=0)
    compiled = compile_on(CHIPS[generation], copy, layout.wrap(*arrays, **scales), ids, ids)
    memory = compiled.memory_analysis()
    assert ("paged_copy" in compiled.as_text()) == (refuses_copy(layout) is None)
    assert memory.alias_size_in_bytes >= 256 * 2**20
    padded = layout.bytes_per_page * 128 // min(layout.head_dim, 128)
    assert memory.temp_size_in_bytes < 64 * padded + 2**18
