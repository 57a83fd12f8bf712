"""Where a program has set JAX to 64 bits: attention is still the float32 that it says, and its integers int32."""

import jax
import jax.numpy as jnp
import pytest

import paged

SCHEDULES = {"several blocks per step": None, "one": paged.XlaSchedule(pages_per_block=1)}
BATCHES = {
    "decode": lambda: paged.RaggedBatch.decode(lengths=[9, 0], block_tables=[[5, 1, 2], [-1, -1, -1]]),
    "ragged": lambda: paged.RaggedBatch([7, 2], [[5, 1, 2], [3, -1, -1]], [0, 1, 2]),
}


@pytest.mark.parametrize(("batch", "schedule"), [("decode", "several blocks per step"), ("ragged", "one")])
@pytest.mark.kernels
def test_update_and_its_gradient_under_64_bits(batch, schedule):
    spec = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, window=6, soft_cap=5.0, sinks=True)
    layout = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)

    def run():
        attend = paged.lower(spec, layout, "xla", schedule=SCHEDULES[schedule])
        q, k, v = (
            jax.random.normal(jax.random.key(i), (2, heads, 8), jnp.float32) for i, heads in enumerate((4, 2, 2))
        )
        pages, sinks, rows = layout.init(num_pages=8), jnp.ones(4, jnp.float32), BATCHES[batch]()
        loss = lambda q: jnp.sum(attend.update(q, k, v, pages, rows, sinks)[0] ** 2)
        return attend.update(q, k, v, pages, rows, sinks)[0], jax.grad(loss)(q)

    expected = run()
    with jax.enable_x64(True):
        found = run()
    for a, b in zip(expected, found, strict=True):
        assert b.dtype == jnp.float32
        assert jnp.allclose(a, b, rtol=1e-6, atol=1e-7)
