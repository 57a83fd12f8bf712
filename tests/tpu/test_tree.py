"""The accepted path of a tree, moved by the kernels that write: what XLA moves, and the pool is not copied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged import tree
from paged.lower import Around
from paged.lower._compile_for import compile_on
from paged.lower.registry import select_write
from paged.lower.tpu import chip_named
from paged.spec import PageLayout

DRAFTS = tree.from_topk((2, 2, 1))


def test_kernels_move_what_xla_moves():
    """Into other granules, within one, and nothing; one sequence is dead."""
    rng = np.random.default_rng(0)
    layout = PageLayout(page_size=8, num_kv_heads=2, head_dim=128)
    pages = layout.wrap(*(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in layout.init(16).arrays))
    step = tree.batch([13, 22, 9, 14], rng.permutation(16).reshape(4, 4), DRAFTS, num_seqs=3)
    rows = jnp.array([[0, 2, 6, 10], [0, 1, 3, 7], [0, 0, 0, 0], [1, 2, 3, 4]])
    args = pages, step, rows, jnp.array([4, 3, 1, 4])
    want, got = tree.commit(*args, "xla"), tree.commit(*args, "tpu", interpret=True)
    for a, b in zip(want.arrays, got.arrays, strict=True):
        np.testing.assert_array_equal(a.view(jnp.uint16), b.view(jnp.uint16))


@pytest.mark.kernels
@pytest.mark.parametrize("generation", ["v5e", "v6e"])
@pytest.mark.parametrize(("order", "dtype", "scales"), [("packed", "bfloat16", None), ("packed", "int8", "token")])
def test_compiled_it_copies_no_pool(order, dtype, scales, generation):
    layout = PageLayout(page_size=32, num_kv_heads=8, head_dim=128, order=order, dtype=jnp.dtype(dtype), scales=scales)
    lowering, chip = select_write(layout, "tpu").on_chip(generation), chip_named(generation)
    pages = layout.init(1024)
    step = tree.batch([4096] * 8, np.zeros((8, 128), int), DRAFTS)
    run = jax.jit(lambda *args: tree._commit(lowering, *args), donate_argnums=0)
    compiled = compile_on(chip, run, pages, step, jnp.zeros((8, 4), jnp.int32), jnp.zeros(8, jnp.int32))
    assert compiled.memory_analysis().temp_size_in_bytes < layout.bytes_per_page * 1024 / 8
    assert Around.of(compiled.as_text()).loops == 0
