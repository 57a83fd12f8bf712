"""`in_turn`: the arrays of a layer leave their stacks one by one on CPU, and the results keep every bit."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from paged.lower import at_index
from paged.runtime._in_turn import in_turn

LAYERS, WIDTH, PRODUCTS = 3, 256, 6
ONE = 4 * WIDTH**2  # bytes


def _at_once(f, stacks, place, carry):
    return f(jax.tree.map(lambda x: at_index(x, place), stacks), carry)


def _layer(own, carry):
    """Products one after the other, a small array, one that nothing uses, and a carry that has no part in it."""
    x, count = carry
    for weights in own["weights"]:
        with jax.named_scope("product"):
            x = jnp.tanh(jax.jit(jnp.matmul)(x, weights) + own["bias"][None])
    return x, count + 1


def _args():
    keys = jax.random.split(jax.random.key(0), PRODUCTS + 1)
    draw = lambda i, *shape: jax.random.normal(keys[i], shape) / WIDTH**0.5
    weights = [draw(i, LAYERS, WIDTH, WIDTH) for i in range(PRODUCTS)]
    stacks = {"weights": weights, "bias": jnp.ones((LAYERS, WIDTH)), "unused": jnp.ones((LAYERS, 2**16))}
    return stacks, (draw(PRODUCTS, 4, WIDTH), jnp.int32(0))


def _run(how, stacks, carry):
    return jax.lax.fori_loop(0, LAYERS, lambda i, carry: how(_layer, stacks, i, carry), carry)


def _compiled(how):
    return jax.jit(functools.partial(_run, how)).lower(*_args()).compile({"xla_backend_optimization_level": 3})


def test_results_are_equal_to_the_bit_and_one_array_is_held_at_a_time():
    turns, once = _compiled(in_turn), _compiled(_at_once)
    for one, other in zip(*(jax.tree.leaves(run(*_args())) for run in (turns, once)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert turns.memory_analysis().temp_size_in_bytes < 2 * ONE
    assert once.memory_analysis().temp_size_in_bytes > PRODUCTS * ONE


def test_nothing_waits_on_a_tpu_and_names_are_kept():
    traced = jax.jit(functools.partial(_run, in_turn)).trace(*_args())
    text = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text(debug_info=True) for platform in ("cpu", "tpu")
    }
    assert "bitcast_convert" in text["cpu"] and "bitcast_convert" not in text["tpu"]
    assert all("product/tanh" in each for each in text.values())


def test_a_product_of_a_float32_array_first_keeps_its_order_on_a_cpu_alone():
    def text(how, dtype, platform=None):
        layer = lambda own, x: jnp.tanh(jax.vmap(lambda row: own @ row)(x))
        step = jax.jit(lambda own, x: jax.lax.fori_loop(0, LAYERS, lambda i, x: how(layer, own, i, x), x))
        traced = step.trace(jnp.ones((LAYERS, WIDTH, WIDTH), dtype), jnp.ones((4, WIDTH), dtype))
        return (
            traced.lower(lowering_platforms=(platform,)).as_text() if platform else traced.lower().compile().as_text()
        )

    ordered, folded = (text(how, jnp.float32) for how in (in_turn, _at_once))
    shapes = [re.findall(r"f32\[(\d+),(\d+)\]\S* dot\(", compiled) for compiled in (ordered, folded)]
    assert shapes == [[(f"{WIDTH}", "4")], [("4", f"{WIDTH}")]]
    barriers = [("cpu", jnp.float32, 1), ("cpu", jnp.bfloat16, 0), ("tpu", jnp.float32, 0)]
    for platform, dtype, more in barriers:
        own, plain = (text(how, dtype, platform).count("optimization_barrier") for how in (in_turn, _at_once))
        assert own - plain == more


def test_gradients_are_those_of_arrays_taken_at_once():
    def loss(how, stacks, x):
        stacks = {**stacks, "unused": jnp.ones((LAYERS, 1))}
        return (_run(how, stacks, (x, jnp.int32(0)))[0] ** 2).sum()

    stacks, (x, _) = _args()
    gradients = (jax.jit(jax.grad(functools.partial(loss, how)))(stacks, x) for how in (in_turn, _at_once))
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
