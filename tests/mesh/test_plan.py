"""A step planned on a mesh: every device has its own plan."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.runtime import LayerStack, PagedCache, Rotary
from tests.support.hlo import opcodes_in_loops

from .placing import mesh_of

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


class Layer(eqx.Module):
    """Attention without trained weights, whose queries and keys are turned by the positions of their rows."""

    cache: PagedCache
    weights: jax.Array

    def __init__(self, key, **how):
        self.cache = PagedCache(SPEC, LAYOUT, **how)
        self.weights = jax.random.normal(key, (32, 64)) / 6

    def __call__(self, x, batch, state):
        heads, positions = (x @ self.weights).reshape(-1, 8, 8), self.cache.positions(batch, x.shape[0])
        q, k = (Rotary(8)(part, positions) for part in (heads[:, :4], heads[:, 4:6]))
        out, state = self.cache(q, k, heads[:, 6:], batch, state)
        return x + out.reshape(x.shape), state


KEYS, PAGES = jax.random.split(jax.random.key(0), 3), 8


def _served_one_by_one(x, batch):
    """What layers in a list give on one device, and their pages."""
    pages = []
    for key in KEYS:
        layer, state = eqx.nn.make_with_state(Layer)(key, num_pages=PAGES)
        x, state = layer(x, batch, state)
        pages.append(state.get(layer.cache.index).arrays[0])
    return x, pages


@pytest.mark.kernels
@pytest.mark.parametrize(
    "sizes", [{"kv_heads": 2}, {"sequences": 2, "context": 2, "kv_heads": 2}], ids=["heads", "all three"]
)
def test_layers_of_a_stack_on_a_mesh_share_one_plan_and_equal_layers_on_one_device(sizes):
    """Every device has its part of the pages of all layers. No list is made in the compiled loop over layers."""
    mesh, axes = mesh_of(sizes)
    shards = [
        paged.RaggedBatch.decode(lengths, tables, num_seqs)
        for lengths, tables, num_seqs in (([5, 3], [[0, 6, 2], [3, 4, 5]], 2), ([6, 1], [[1, 7, 5], [2, 0, 0]], 1))
    ][: sizes.get("sequences", 1)]
    batch = paged.RaggedBatch.stack(shards) if "sequences" in sizes else shards[0]
    x = jax.random.normal(jax.random.key(1), (2 * len(shards), 32))
    make = lambda key: Layer(key, num_pages=PAGES * len(shards), mesh=mesh, axes=axes)
    stack, state = eqx.nn.make_with_state(LayerStack.make)(make, KEYS)
    compiled = jax.jit(lambda x, state: stack(x, batch, state)).lower(x, state).compile()
    got, after = compiled(x, state)
    assert " sort(" in compiled.as_text() and "sort" not in opcodes_in_loops(compiled.as_text())
    kept = after.get(stack.runs[0].cache.index)
    for shard, own in enumerate(shards):
        want, pages = _served_one_by_one(x[2 * shard :][:2], own)
        np.testing.assert_allclose(got[2 * shard :][: own.num_seqs], want[: own.num_seqs], rtol=1e-5, atol=1e-5)
        for i, of_layer in enumerate(pages):
            part = kept.layer(i).arrays[0][PAGES * shard :][:PAGES]
            np.testing.assert_allclose(part, of_layer, rtol=1e-5, atol=1e-5)
