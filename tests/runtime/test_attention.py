"""`PagedAttention`: paged equals dense, positions from the batch, stacked layers, gradients, jit and donation."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.runtime import PagedAttention, PagePool, Rotary, YarnScaling

from .tiny import EMBED, GLOBAL, LAYOUT, LOCAL, random_layer

TOLERANCE = 3e-5  # float32; outputs are about 3, sums of 16 to 32 products of about 3


def build(spec, num_pages=8, seed=0, **options):
    return eqx.nn.make_with_state(random_layer)(spec, num_pages, jax.random.key(seed), **options)


def tokens(count, seed=1):
    return 3 * jax.random.normal(jax.random.key(seed), (count, EMBED))


def layer_ref(layer, x):
    """One sequence through a layer, row by row in float64: project, normalise, rotate, cap, mask, softmax with sink."""
    spec, x = layer.spec, np.asarray(x, np.float64)

    def project(linear, norm=None):
        heads = (x @ np.asarray(linear.weight, np.float64).T).reshape(len(x), -1, spec.head_dim)
        if norm is None:
            return heads
        return heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(norm.weight, np.float64)

    def rotate(heads):
        a, b = np.split(heads, 2, axis=-1)
        angle = np.outer(np.arange(len(x)), 100.0 ** (-np.arange(4) / 4))[:, None]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)

    q, k = rotate(project(layer.query_proj, layer.query_norm)), rotate(project(layer.key_proj, layer.key_norm))
    v, out = project(layer.value_proj), np.zeros_like(q)
    for p in range(len(x)):
        first = 0 if spec.window is None else max(0, p - spec.window + 1)
        for h in range(spec.num_q_heads):
            s = spec.scale * k[first : p + 1, h // spec.group] @ q[p, h]
            s = s if spec.soft_cap is None else spec.soft_cap * np.tanh(s / spec.soft_cap)
            weights = np.exp(s)
            total = weights.sum() + (np.exp(float(layer.sinks[h])) if spec.sinks else 0)
            out[p, h] = weights / total @ v[first : p + 1, h // spec.group]
    return out.reshape(len(x), -1) @ np.asarray(layer.output_proj.weight, np.float64).T


@pytest.mark.parametrize("qk_norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("spec", [LOCAL, GLOBAL], ids=["window, cap", "sinks"])
def test_dense_equals_the_formulas(spec, qk_norm):
    layer, _ = build(spec, qk_norm=qk_norm)
    if qk_norm:
        assert float(jnp.abs(layer.query_norm.weight - 1).max()) > 0.1
    x = tokens(9)
    np.testing.assert_allclose(eqx.filter_jit(layer.dense)(x[None])[0], layer_ref(layer, x), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (LOCAL, {"qk_norm": True}),
        (GLOBAL, {"use_query_bias": True, "use_value_bias": True, "use_output_bias": True}),
    ],
    ids=["window, cap, norm", "sinks, biases"],
)
def test_prefill_chunks_then_decode_equal_dense(spec, options):
    layer, state = build(spec, **options)
    x, table, ys = tokens(11), jnp.array([5, 0, 7]), []
    step = eqx.filter_jit(layer)
    for start, stop in [(0, 6), (6, 10), (10, 11)]:
        y, state = step(x[start:stop], paged.RaggedBatch.prefill(stop, table, stop - start), state)
        ys.append(y)
    np.testing.assert_allclose(jnp.concatenate(ys), eqx.filter_jit(layer.dense)(x[None])[0], atol=TOLERANCE)


def test_a_ragged_batch_gives_every_sequence_its_own_positions():
    layer, state = build(LOCAL)
    first, second = tokens(5, seed=2), tokens(7, seed=3)
    pool, _ = PagePool.init(8, 3, 2, 4).extend(jnp.array([4, 0, 5]))
    packed = jnp.concatenate([first[:4], second[:5]])
    step = eqx.filter_jit(layer)
    _, state = step(packed, pool.ragged_batch(jnp.array([4, 0, 5])), state)
    pool, _ = pool.extend(jnp.array([1, 0, 2]))
    padding = tokens(6, seed=4)  # as many rows as before, so that the step compiles once
    y, state = step(jnp.concatenate([first[4:], second[5:], padding]), pool.ragged_batch(jnp.array([1, 0, 2])), state)
    together = jnp.stack([jnp.pad(first, ((0, 2), (0, 0))), second])
    dense = eqx.filter_jit(layer.dense)(together)
    np.testing.assert_allclose(y[0], dense[0, 4], atol=TOLERANCE)
    np.testing.assert_allclose(y[1:3], dense[1, 5:], atol=TOLERANCE)
    assert not y[3:].any(), "padding rows are the projection of 0"


def test_scan_over_stacked_layers_equals_a_loop():
    keys = jax.random.split(jax.random.key(7), 3)
    stacked, state = eqx.nn.make_with_state(lambda: eqx.filter_vmap(lambda key: random_layer(GLOBAL, 4, key))(keys))()
    pages = state.get(stacked.cache.index)
    assert pages.arrays[0].shape == (3, *LAYOUT.array_shapes(4)[0])
    x, batch = tokens(6), paged.RaggedBatch.prefill(6, [2, 0], 6)
    batch = paged.check(GLOBAL, LAYOUT.init(4), batch, 6)
    parameters, static = eqx.partition(stacked, eqx.is_array)

    @jax.jit
    def scanned(x, parameters, pages):
        def body(x, layer):
            y, pages = eqx.combine(layer[0], static).attend_pages(x, layer[1], batch)
            return x + y, pages

        return jax.lax.scan(body, x, (parameters, pages))

    step_pages = eqx.filter_jit(lambda layer, x, pages: layer.attend_pages(x, pages, batch))
    y, new_pages = scanned(x, parameters, pages)
    for i in range(3):
        layer = eqx.combine(jax.tree.map(lambda leaf, i=i: leaf[i], parameters), static)
        step, own = step_pages(layer, x, jax.tree.map(lambda leaf, i=i: leaf[i], pages))
        x = x + step
        np.testing.assert_allclose(new_pages.arrays[0][i], own.arrays[0], atol=TOLERANCE)
    np.testing.assert_allclose(y, x, atol=TOLERANCE)
    chex.assert_trees_all_equal_structs(state.set(stacked.cache.index, new_pages).get(stacked.cache.index), pages)


def test_gradients_flow_through_dense_to_every_parameter():
    layer, _ = build(GLOBAL, qk_norm=True, use_query_bias=True)
    x = tokens(6)[None]

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(layer):
        return jnp.sum(layer.dense(x) ** 2)

    leaves = jax.tree.leaves(eqx.filter(gradient(layer), eqx.is_inexact_array))
    assert len(leaves) == 8  # four weights, one bias, two norms, the sinks
    for leaf in leaves:
        assert bool(jnp.isfinite(leaf).all()) and float(jnp.abs(leaf).max()) > 1e-3


def test_dense_and_paged_gradients_agree():
    layer, state = build(LOCAL)
    x, batch, pages = tokens(6), paged.RaggedBatch.prefill(6, [2, 0], 6), state.get(layer.cache.index)
    batch = paged.check(LOCAL, pages, batch, 6)
    losses = (lambda m: jnp.sum(m.attend_pages(x, pages, batch)[0] ** 2), lambda m: jnp.sum(m.dense(x[None]) ** 2))
    served, dense = (eqx.filter_jit(eqx.filter_grad(loss))(layer) for loss in losses)
    chex.assert_trees_all_close(
        eqx.filter(served, eqx.is_inexact_array), eqx.filter(dense, eqx.is_inexact_array), rtol=1e-3, atol=1e-2
    )


def test_drop_in_under_filter_jit_with_one_trace_while_lengths_vary():
    class Block(eqx.Module):
        """Where a model had ``eqx.nn.MultiheadAttention``, with the batch and the state passed along."""

        attention: PagedAttention
        norm: eqx.nn.LayerNorm

        def __init__(self, key):
            self.attention = random_layer(LOCAL, 8, key)
            self.norm = eqx.nn.LayerNorm(EMBED)

        def __call__(self, x, batch, state):
            y, state = self.attention(jax.vmap(self.norm)(x), batch, state)
            return x + y, state

    block, state = eqx.nn.make_with_state(Block)(jax.random.key(0))
    step = eqx.filter_jit(chex.assert_max_traces(lambda model, x, batch, state: model(x, batch, state), n=1))
    pool = PagePool.init(8, 2, 4, 4)
    for count in ([1, 0], [1, 1], [1, 1], [0, 1]):
        pool, _ = pool.extend(jnp.array(count))
        y, state = step(block, tokens(2), pool.decode_batch(jnp.array(count, bool)), state)
        assert y.shape == (2, EMBED)


def test_donated_state_is_updated_in_place():
    layer, state = build(LOCAL, num_pages=64)
    batch = paged.check(LOCAL, LAYOUT.init(64), paged.RaggedBatch.decode([3, 9], [[0, 1, 2], [3, 4, 5]]), 2)
    where = state.get(layer.cache.index).arrays[0].unsafe_buffer_pointer()
    step = eqx.filter_jit(lambda inputs, state: inputs[0](*inputs[1:], state), donate="all-except-first")
    _, state = step((layer, tokens(2), batch), state)
    assert state.get(layer.cache.index).arrays[0].unsafe_buffer_pointer() == where


@pytest.mark.kernels
def test_interpreted_kernels_equal_xla():
    """One decode step. ``interpret`` reaches `paged.lower` from a layer and from its cache."""
    spec = paged.AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=16)
    layout = paged.PageLayout(page_size=8, num_kv_heads=1, head_dim=16, dtype=jnp.float32)
    batch, x = paged.RaggedBatch.decode([1], [[1]]), tokens(1)
    outputs = []
    for options in ({"target": "xla"}, {"target": "tpu", "interpret": True}):
        layer, state = eqx.nn.make_with_state(PagedAttention)(
            spec, layout, 2, EMBED, rotary=Rotary(16), check=False, key=jax.random.key(0), **options
        )
        assert layer.cache.attend == paged.lower(spec, layout, **options)
        outputs.append(eqx.filter_jit(layer)(x, batch, state)[0])
    np.testing.assert_allclose(*outputs, atol=TOLERANCE)


def test_rotary_scaling_and_bfloat16_pages_serve():
    layout = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=8)  # bfloat16
    rotary = Rotary(8, scaling=YarnScaling(factor=4.0, original_context=8))
    layer, state = eqx.nn.make_with_state(PagedAttention)(
        LOCAL, layout, 4, EMBED, rotary=rotary, dtype=jnp.bfloat16, key=jax.random.key(0)
    )
    x = tokens(6).astype(jnp.bfloat16)
    y, _ = eqx.filter_jit(layer)(x, paged.RaggedBatch.prefill(6, [1, 3], 6), state)
    assert y.dtype == jnp.bfloat16
    dense = eqx.filter_jit(layer.dense)(x[None])[0]
    # Both round q, k, v and y to 8 bits; the attention's own arithmetic is float32.
    np.testing.assert_allclose(y.astype(jnp.float32), dense.astype(jnp.float32), atol=2**-5)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: build(LOCAL, use_key_bias="no"), "use_key_bias must be True or False; got 'no'"),
        (lambda: build(LOCAL, qk_norm=1), "qk_norm must be True or False; got 1"),
        (lambda: build(LOCAL.replace(head_dim=16)), "rotary.head_dim must equal spec.head_dim = 16; got 8"),
        (
            lambda: build(LOCAL)[0].dense(jnp.ones((3, 7))),
            r"query must be \[tokens, 16\] or \[batch, tokens, 16\]; got \(3, 7\)",
        ),
        (
            lambda: build(LOCAL)[0].attend_pages(jnp.ones((3, 7)), None, paged.RaggedBatch.decode([1] * 3, [[0]] * 3)),
            r"x must be \[tokens, 16\]; got \(3, 7\)",
        ),
    ],
)
def test_error_texts(call, text):
    with pytest.raises((TypeError, ValueError), match=text):
        call()
