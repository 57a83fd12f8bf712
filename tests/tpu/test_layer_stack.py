"""A `LayerStack` on a TPU: the real compiler copies no pool in the loop over layers, and no weights beside it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import paged
from paged.lower._compile_for import compile_on
from paged.lower.tpu import CHIPS
from paged.runtime import LayerStack, PagedAttention
from tests.support.hlo import copies_in_loops

from .points import needs_libtpu

LAYOUT = paged.PageLayout(page_size=16, num_kv_heads=8, head_dim=128)
FULL = paged.AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128)
SLOTS, PAGES_PER_SEQ, EMBED = 64, 128, 1024
NUM_PAGES = SLOTS * PAGES_PER_SEQ


@needs_libtpu
@pytest.mark.kernels
@pytest.mark.parametrize(
    ("windows", "num_layers"), [((None,), 32), ((1024, 1024, None), 8)], ids=["32 layers", "a pattern of 8"]
)
def test_no_loop_over_layers_copies_a_pool(windows, num_layers):
    """64 sequences of 2048 tokens on v6e: 512 MiB of pages for each layer, 16 GiB for 32."""

    def layer_of(window):
        def make(key):
            spec = FULL.replace(window=window)
            options = {"target": "tpu", "check": False, "dtype": jnp.bfloat16}
            layer = PagedAttention(spec, LAYOUT, NUM_PAGES, EMBED, key=key, **options)
            object.__setattr__(layer.cache, "attend", layer.cache.attend.on_chip("v6e"))
            return layer

        return make

    keys = jax.random.split(jax.random.key(0), num_layers)
    make = eqx.nn.make_with_state(lambda: LayerStack.make([layer_of(window) for window in windows], keys))
    stack, state = eqx.filter_eval_shape(make)
    arrays, static = eqx.partition(stack, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def step(arrays, x, lengths, tables, copy_from, state):
        batch = paged.RaggedBatch.decode(lengths, tables, copy_from=copy_from)  # shared pages are copied in every layer
        return eqx.combine(arrays, static)(x, batch, state)

    shape = lambda *dims, dtype=jnp.int32: jax.ShapeDtypeStruct(dims, dtype)
    args = (
        arrays,
        shape(SLOTS, EMBED, dtype=jnp.bfloat16),
        shape(SLOTS),
        shape(SLOTS, PAGES_PER_SEQ),
        shape(SLOTS),
        state,
    )
    compiled = compile_on(CHIPS["v6e"], jax.jit(step, donate_argnums=5), *args)
    assert copies_in_loops(compiled.as_text(), NUM_PAGES * LAYOUT.bytes_per_page) == []
    assert "paged_copy" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 32 * 2**20
