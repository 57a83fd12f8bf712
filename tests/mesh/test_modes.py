"""Arrays on a mesh without ``mesh=``: in a caller's own ``jax.shard_map``, and on axes that are explicit.

Both are JAX's defaults: `jax.shard_map` checks over which axes values vary, and ``jax.make_mesh`` makes explicit axes.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import paged
from paged.runtime import Sampler, sample
from tests.mesh.placing import mesh_of, needs_devices
from tests.test_modes import ATTEND, CLOSE, LAYOUT, STEPS, arrays_of_a_step

pytestmark = needs_devices

HEADS = P(None, "model")
SPEC = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
# One device's share of it, of two devices.
OWN = SPEC.replace(num_q_heads=2, num_kv_heads=1)
OWN_LAYOUT = LAYOUT.replace(num_kv_heads=1)


def _varying(x):
    return jax.lax.pcast(x, "model", to="varying")


@pytest.mark.parametrize("whole", [("batch", "pages", "pool", "sinks"), ("q", "k", "v", "flags", "keys")])
@pytest.mark.parametrize("name", ["update", "gradients", "layer", "sample", "pool", "v3"])
def test_a_step_in_a_shard_map_that_checks_what_varies(name, whole):
    """Some arrays are the same on all devices, and the others are each device's own."""
    mesh, _ = mesh_of({"kv_heads": 2})

    def run(arrays):
        arrays = {key: x if key in whole else jax.tree.map(_varying, x) for key, x in arrays.items()}
        results = jax.tree.leaves(STEPS[name](types.SimpleNamespace(**arrays)))
        return jax.lax.psum(sum(jnp.sum(x.astype(jnp.float32)) for x in results), "model")

    jax.eval_shape(jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P()), arrays_of_a_step())


@pytest.mark.kernels
def test_a_step_by_heads_and_its_gradient_in_a_shard_map_are_those_of_one_device():
    """The queries' heads are divided, and so are the pages: the batch is whole."""
    mesh, _ = mesh_of({"kv_heads": 2})
    s = types.SimpleNamespace(**arrays_of_a_step())

    def loss(spec, layout, q, k, array):
        out, pages = paged.lower(spec, layout, "xla").update(q, k, k, layout.wrap(array), s.batch)
        return jnp.sum(out**2) + jnp.sum(pages.arrays[0] ** 2)

    def on_device(*args):
        return jax.lax.psum(loss(OWN, OWN_LAYOUT, *args), "model")

    specs = (HEADS, HEADS, P(None, None, "model"))
    divided = jax.shard_map(jax.grad(on_device, argnums=(0, 1, 2)), mesh=mesh, in_specs=specs, out_specs=specs)
    args = (s.q, s.k, s.pages.arrays[0])
    expected = jax.jit(jax.grad(lambda *args: loss(SPEC, LAYOUT, *args), argnums=(0, 1, 2)))(*args)
    for a, b in zip(jax.jit(divided)(*args), expected, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


def test_a_gradient_of_what_devices_share_needs_it_as_a_value_of_each():
    mesh, _ = mesh_of({"kv_heads": 2})
    s = types.SimpleNamespace(**arrays_of_a_step())

    def loss(table, q):
        spec = OWN.replace(scores=(paged.Bias(lambda p, j, h: table[h]),))
        out = paged.lower(spec, OWN_LAYOUT, "xla")(q, OWN_LAYOUT.init(6), s.batch)
        return jax.lax.psum(jnp.sum(out**2), "model")

    def gradients(loss):
        sharded = jax.shard_map(
            jax.grad(loss, argnums=(0, 1)), mesh=mesh, in_specs=(P(), HEADS), out_specs=(P(), HEADS)
        )
        return jax.eval_shape(sharded, s.sinks[:2], s.q)

    gradients(lambda table, q: loss(jax.lax.stop_gradient(table), q))
    gradients(lambda table, q: loss(_varying(table), q))
    with pytest.raises(ValueError, match=r'closes over float32\[2\].*jax.lax.pcast\(x, \(.model.,\), to="varying"\)'):
        gradients(loss)


def test_on_explicit_axes_whole_arrays_run_and_divided_ones_are_refused_with_what_to_write():
    mesh, _ = mesh_of({"kv_heads": 2}, explicit=True)
    s = types.SimpleNamespace(**arrays_of_a_step())
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    args = (s.q, s.k, s.v, s.pages, s.batch, s.sinks)
    expected = ATTEND.update(*args)[0]
    np.testing.assert_allclose(ATTEND.update(put(s.q), *args[1:])[0], expected, **CLOSE)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jax.jit(ATTEND.update)(*args)[0], expected, **CLOSE)
        with pytest.raises(ValueError, match=r"q lies by P\(None, 'model', None\) .*mesh= and axes="):
            ATTEND.update(put(s.q, None, "model"), *args[1:])
    with pytest.raises(ValueError, match=r"pages lies by .*mesh= and axes="):
        ATTEND(s.q, jax.tree.map(lambda x: put(x, None, None, "model"), s.pages), s.batch, s.sinks)


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=0.8, top_p=0.6)], ids=["greedy", "top_p"])
@pytest.mark.parametrize("spec", [(None, "model"), ("model",)], ids=["by vocabulary", "by rows"])
def test_logits_on_explicit_axes(sampler, spec):
    mesh, _ = mesh_of({"kv_heads": 2}, explicit=True)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    divided = jax.device_put(logits, NamedSharding(mesh, P(*spec)))
    assert sample(divided, sampler, keys).tolist() == sample(logits, sampler, keys).tolist()
