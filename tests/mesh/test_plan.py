"""A step planned on a mesh: every device has its own plan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged

SPEC = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, window=6)
LAYOUT = paged.PageLayout(page_size=2, num_kv_heads=2, head_dim=8, dtype=jnp.float32)


def test_a_plan_gives_what_its_batch_gives_on_every_device():
    """Heads, sequences and contexts divided, two ways each. The plan is made and used in one program, or in two."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "context", "model"))
    attend = paged.lower(
        SPEC, LAYOUT, mesh=mesh, axes=paged.Axes(kv_heads="model", sequences="data", context="context")
    )
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    shards = [
        paged.RaggedBatch.decode(lengths, [[0, 1, 2], [3, 4, 5]], num_seqs)
        for lengths, num_seqs in (([5, 3], 2), ([6, 1], 1))
    ]
    batch = paged.RaggedBatch.stack(shards)
    q, k, v = draw(4, 4, 8), draw(4, 2, 8), draw(4, 2, 8)
    pages = jax.tree.map(lambda x: draw(*x.shape), attend.layout.init(16))
    plan = attend.plan(q, pages, batch)
    want = attend.update_state(q, k, v, pages, batch)
    in_one = jax.jit(lambda batch: attend.update_state(q, k, v, pages, attend.plan(q, pages, batch)))
    for got in (attend.update_state(q, k, v, pages, plan), in_one(batch)):
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match=r"The plan is for the devices of Mesh.*; this attention is of one device"):
        paged.lower(SPEC, LAYOUT)(q[:2], LAYOUT.init(8), plan)
