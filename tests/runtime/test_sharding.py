"""Layers and caches on devices by `equinox.filter_shard`: same results, and arrays stay where they were put."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import paged
from paged.runtime import LayerStack

from .tiny import EMBED, GLOBAL, random_layer

pytestmark = pytest.mark.skipif(
    jax.local_device_count() < 2, reason="needs two devices, which the root conftest simulates"
)

BATCH = paged.RaggedBatch([3, 9], [[0, 1, 2], [3, 4, 5]], [0, 2, 5])


def _layer():
    return eqx.nn.make_with_state(random_layer)(GLOBAL, 8, jax.random.key(0), check=False)


def _on_two(*spec):
    mesh = jax.make_mesh((2,), ("model",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    return NamedSharding(mesh, PartitionSpec(*spec))


def _on_one():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _devices(tree):
    return {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))}


def test_a_layer_and_its_state_on_two_devices_serve_and_train_as_on_one():
    layer, state = _layer()
    x = jax.random.normal(jax.random.key(1), (5, EMBED))
    step = eqx.filter_jit(lambda layer, x, state: layer(x, BATCH, state))
    y, after = step(layer, x, state)

    placed, held = eqx.filter_shard((layer, state), _on_two())
    assert _devices((placed, held)) == {2}
    got, then = step(placed, eqx.filter_shard(x, _on_two()), held)
    np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-5)
    pages, want = then.get(placed.cache.index), after.get(layer.cache.index)
    assert _devices(pages) == {2}
    np.testing.assert_allclose(pages.arrays[0], want.arrays[0], rtol=1e-5, atol=1e-5)

    gradient = eqx.filter_jit(eqx.filter_grad(lambda layer, x: (layer.dense(x[None]) ** 2).sum()))
    for a, b in zip(*(jax.tree.leaves(gradient(m, x)) for m in (placed, layer)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_layer_whose_window_the_batch_brings_serves_on_two_devices_as_on_one():
    """Numbers of sequences and positions of rows, placed as the arrays are."""
    spec = GLOBAL.replace(window=paged.Value("window"))
    layer, state = eqx.nn.make_with_state(random_layer)(spec, 8, jax.random.key(0), check=False)
    x = jax.random.normal(jax.random.key(1), (5, EMBED))
    step = eqx.filter_jit(lambda layer, x, batch, state: layer(x, batch, state)[0])
    served = []
    for windows in ([2, 9], [3, 1]):
        batch = dataclasses.replace(BATCH, values={"window": jnp.array(windows)}, positions=jnp.array([1, 2, 6, 7, 7]))
        own, placed = (step(*eqx.filter_shard((layer, x, batch, state), on)) for on in (_on_one(), _on_two()))
        np.testing.assert_allclose(placed, own, rtol=1e-5, atol=1e-5)
        assert _devices(placed) == {2}
        served.append(own)
    assert not np.allclose(*served)


def test_a_stack_whose_pool_is_shared_out_by_kv_heads_serves_as_on_one_and_keeps_it_so():
    """The layers' pages are one array [layers * pages, 2, kv_heads, page_size, head_dim], carried by the loop."""
    make = lambda key: random_layer(GLOBAL, 8, key, check=False)
    stack, state = eqx.nn.make_with_state(LayerStack.make)(make, jax.random.split(jax.random.key(0), 2))
    step, x = eqx.filter_jit(lambda *args: args[0](args[1], BATCH, args[2])), jnp.ones((5, EMBED))
    y, after = step(stack, x, state)

    placed = lambda tree: jax.tree.map(lambda x: _on_two(None, None, "model") if x.ndim == 5 else _on_two(), tree)
    stack, x = eqx.filter_shard((stack, x), _on_two())
    got, then = step(stack, x, jax.device_put(state, placed(state)))
    np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-5)
    (pool,), (want,) = jax.tree.leaves(then), jax.tree.leaves(after)
    np.testing.assert_allclose(pool, want, rtol=1e-5, atol=1e-5)
    assert pool.shape[0] == 16 and pool.sharding.shard_shape(pool.shape)[2] == 1 and _devices((got, then)) == {2}


def test_a_cache_whose_kv_heads_are_shared_out_inside_of_jit_stays_so():
    """Packed pages [pages, 2, kv_heads, page_size, head_dim], a KV head and its query heads on each device."""
    layer, state = _layer()
    attend, pages = layer.cache.attend, state.get(layer.cache.index)
    q, k, v = (jax.random.normal(jax.random.key(i), (5, heads, 8)) for i, heads in enumerate((4, 2, 2)))
    by_head, by_kv_head = _on_two(None, "model"), _on_two(None, None, "model")

    @eqx.filter_jit
    def step(q, k, v, pages):
        q, k, v = eqx.filter_shard((q, k, v), by_head)
        out, pages = attend.update(q, k, v, eqx.filter_shard(pages, by_kv_head), BATCH, layer.sinks)
        return eqx.filter_shard(out, by_head), eqx.filter_shard(pages, by_kv_head)

    out, written = step(q, k, v, pages)
    want, whole = attend.update(q, k, v, pages, BATCH, layer.sinks)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(written.arrays[0], whole.arrays[0])
    assert written.arrays[0].sharding.shard_shape(written.arrays[0].shape)[2] == 1 and _devices(written) == {2}
    assert jnp.abs(out).max() > 0.1
