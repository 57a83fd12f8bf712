"""`LayerStack`: as its layers one by one, in patterns, with one pool that no loop copies."""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower import at_index
from paged.runtime import LayerStack, PagedAttention, calibrate, pools_of
from paged.runtime._pattern import places_of, segments_of
from paged.testing import check_model
from tests.support.hlo import copies_in_loops

from .tiny import EMBED, GLOBAL, LAYOUT, LOCAL, VOCAB, random_layer

NUM_PAGES = 12
_INDEX = eqx.nn.StateIndex(jnp.zeros(()))


class Block(eqx.Module):
    """Attention with a residual, and what each layer may keep besides pages: how many rows it has served."""

    attention: PagedAttention
    served: eqx.nn.StateIndex

    def __init__(self, spec, key, *, layout=LAYOUT, num_pages=NUM_PAGES, **options):
        if layout == LAYOUT:
            self.attention = random_layer(spec, num_pages, key, **options)
        else:
            self.attention = PagedAttention(spec, layout, num_pages, EMBED, key=key, **options)
        self.served = eqx.nn.StateIndex(jnp.zeros((), jnp.int32))

    def __call__(self, x, batch, state):
        state = state.set(self.served, state.get(self.served) + x.shape[0])
        y, state = self.attention(x, batch, state)
        return x + y, state

    def dense(self, x):
        return x + self.attention.dense(x)


class Model(eqx.Module):
    """Tokens to logits through layers, a stack or a tuple."""

    embedding: jax.Array
    layers: object

    def __init__(self, make_layers, key):
        self.embedding = jax.random.normal(key, (VOCAB, EMBED))
        self.layers = make_layers()

    def __call__(self, tokens, batch, state):
        x, layers = self.embedding[tokens], self.layers
        for layer in [layers] if isinstance(layers, LayerStack) else layers:
            x, state = layer(x, batch, state)
        return x @ self.embedding.T, state

    def dense(self, tokens):
        return (self.layers.dense(self.embedding[tokens][None]) @ self.embedding.T)[0]


def model_of(make_layers):
    return eqx.nn.make_with_state(Model)(make_layers, jax.random.key(0))


def blocks(count, specs=(LOCAL, LOCAL, GLOBAL), **options):
    return [Block(specs[i % len(specs)], key, **options) for i, key in enumerate(keys_of(count))]


def keys_of(count):
    return jax.random.split(jax.random.key(1), count)


@pytest.mark.parametrize(
    ("kinds", "segments"),
    [
        ("a", [(1, (1,))]),
        ("aaaa", [(4, (1,))]),
        ("abab", [(2, (1, 1))]),
        ("aabaabaa", [(2, (2, 1)), (1, (2,))]),
        ("aaab", [(1, (3, 1))]),
    ],
)
def test_a_pattern_is_the_shortest_that_repeats_and_names_every_layer_once(kinds, segments):
    found = segments_of(kinds)
    assert [(s.repeats, tuple(length for _, length in s.runs)) for s in found] == segments
    places = places_of(found)
    assert len(set(places)) == len(kinds) == sum(segment.num_layers for segment in found)
    assert all(len({kinds[i] for i, (run, _) in enumerate(places) if run == r}) == 1 for r, _ in places)


def test_a_model_of_a_stack_is_served_as_it_is_trained():
    """Chunks, page orders and preemptions, with NaN in all pages that hold nothing."""
    model, state = model_of(lambda: LayerStack.make(lambda key: Block(LOCAL, key), keys_of(3)))
    assert [pool.num_pages for pool in pools_of(state)] == [NUM_PAGES]
    check_model(model, state, vocab_size=VOCAB)


def test_a_stack_equals_its_layers_one_by_one():
    """Two kinds in turn, and one left over: outputs, every layer's pages, and other state.

    The pages hold NaN. One table entry is a hole, and one past the layer's pages, where the next layer's begin.
    """
    stack, state = model_of(lambda: LayerStack.of(blocks(5, (LOCAL, GLOBAL), check=False)))
    assert [(s.repeats, len(s.runs)) for s in stack.layers.segments] == [(2, 2), (1, 1)]
    batch = paged.RaggedBatch.decode([6, 5, 2], [[7, 2], [4, NUM_PAGES], [-1, 1]], query_rows=2)
    state = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.ndim == 5 else x, state)
    x = stack.embedding[:6]
    y, state = eqx.filter_jit(stack.layers)(x, batch, state)

    serve = jax.jit(lambda spec, layer, x, pages: layer.attend_pages(x, pages, batch), static_argnums=0)
    poison = LAYOUT.wrap(jnp.full(LAYOUT.array_shapes(NUM_PAGES)[0], jnp.nan))
    singles = iter(blocks(5, (LOCAL, GLOBAL), check=False))
    for (run, place), single in zip(places_of(stack.layers.segments), singles, strict=True):
        out, pages = serve(single.attention.spec, _without_index(single.attention), x, poison)
        x = x + out
        kept = stack.layers.runs[run]
        own = state.get(kept.attention.cache.index).layer(place)
        np.testing.assert_allclose(own.arrays[0], pages.arrays[0], rtol=1e-5, atol=1e-5)
        assert state.get(kept.served).layer(place) == 6
    np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-4)


def _without_index(layer):
    """The layer with an index that all layers share, so that like layers are one program."""
    return eqx.tree_at(lambda m: m.cache.index, layer, _INDEX)


def test_no_loop_of_a_compiled_step_copies_a_pool():
    """Six layers of two kinds, donated, in bfloat16, which XLA:CPU converts to compute with.

    Layers that are scanned over with their pages show what would be found.
    """
    options = {"check": False, "num_pages": 512, "dtype": jnp.bfloat16}
    stack, state = model_of(lambda: LayerStack.of(blocks(6, (LOCAL, LOCAL, GLOBAL), **options)))
    stack = eqx.tree_at(lambda model: model.embedding, stack, stack.embedding.astype(jnp.bfloat16))
    pool_bytes = 512 * LAYOUT.bytes_per_page

    def step(inputs, state):
        batch = paged.RaggedBatch.decode(*inputs[2:4], copy_from=inputs[4])
        return stack_of(inputs[0])(inputs[1], batch, state)

    arrays, static = eqx.partition(stack, eqx.is_array)
    stack_of = lambda arrays: eqx.combine(arrays, static)
    inputs = (arrays, jnp.zeros(2, jnp.int32), jnp.array([3, 9]), jnp.array([[0, 1, 2], [3, 4, 5]]))
    inputs = (*inputs, jnp.array([9, -1]))  # one sequence writes into a copy of a shared page
    optimised = {"xla_backend_optimization_level": 3}  # tests compile without
    compiled = jax.jit(step, donate_argnums=1).lower(inputs, state).compile(optimised)
    assert copies_in_loops(compiled.as_text(), pool_bytes) == []
    assert compiled.memory_analysis().temp_size_in_bytes < pool_bytes
    assert "bf16[4,32,16]" in compiled.as_text() and "f32[4,32,16]" not in compiled.as_text()

    scanned = lambda pools: jax.lax.scan(lambda x, pool: (x + pool[0], pool.at[1].set(x)), jnp.zeros(8), pools)[1]
    pools = jnp.zeros((6, pool_bytes // 32, 8))
    text = jax.jit(scanned, donate_argnums=0).lower(pools).compile(optimised).as_text()
    assert copies_in_loops(text, pool_bytes)


def test_int8_pages_of_a_stack_are_calibrated_layer_by_layer():
    layout = LAYOUT.replace(dtype=jnp.int8, scales="head")
    model, state = model_of(lambda: LayerStack.of(blocks(3, (GLOBAL.replace(sinks=False),), layout=layout)))
    index = model.layers.runs[0].attention.cache.index
    assert state.get(index).value.k_scale is None
    prompt = jnp.array([3, 1, 4, 1, 5])
    state = calibrate(model, state, [prompt])
    assert state.get(index).layer(1).k_scale.shape == (2,) and state.get(index).value.num_pages == 3 * NUM_PAGES
    x, dense = model.embedding[prompt], eqx.filter_jit(lambda layer, x: layer.dense(x))
    for i, layer in enumerate(model.layers.unstack()):
        seen = jnp.abs((x @ layer.attention.value_proj.weight.T).reshape(5, 2, 8)).max(axis=(0, 2))
        np.testing.assert_allclose(state.get(index).layer(i).v_scale, seen / 127, rtol=1e-4)
        x = dense(layer, x[None])[0]


@pytest.mark.kernels
def test_interpreted_kernels_of_a_stack_equal_xla():
    """In a loop, a layer whose kernel needs no lists, and one whose lists are made before the loop."""
    specs = [paged.AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=16, mask=m) for m in (None, ~paged.Prefix(3))]
    layout = paged.PageLayout(page_size=8, num_kv_heads=1, head_dim=16, dtype=jnp.float32)
    batch, x, results = paged.RaggedBatch.decode([12], [[1, 2]]), jnp.ones((1, EMBED)), []
    for options in ({"target": "xla"}, {"target": "tpu", "interpret": True}):
        make = lambda spec, key, how=options: PagedAttention(spec, layout, 3, EMBED, check=False, key=key, **how)
        makers = [functools.partial(make, spec) for spec in specs]
        stack, state = eqx.nn.make_with_state(LayerStack.make)(makers, keys_of(4))
        results.append(jax.tree.leaves(jax.jit(lambda *args, s=stack: s(*args))(x, batch, state)))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_an_entry_that_is_no_page_of_the_layer_is_no_page_of_another():
    outside = [-1, 4, 7, 2**31 - 1, -(2**31)]
    batch = paged.RaggedBatch.decode([3, 3], [[0, 3, *outside[:3]], [2, *outside[1:]]])
    batch = batch.for_layer(jnp.int32(2), num_pages=4, num_layers=5)
    assert batch.block_tables.tolist() == [[8, 11, -1, -1, -1], [10, -1, -1, -1, -1]]
    assert batch.has_even_starts and batch.query_rows == 1


def test_a_batch_is_checked_once_for_the_pages_of_a_layer():
    stack, state = eqx.nn.make_with_state(LayerStack.make)(
        functools.partial(random_layer, LOCAL, NUM_PAGES), keys_of(2)
    )
    batch = paged.RaggedBatch.decode([3], [[NUM_PAGES]])
    with pytest.raises(ValueError, match=r"block_tables\[0, 0\] = 12 .* must be in \[0, 12\)"):
        stack(jnp.ones((1, EMBED)), batch, state)
    checked = paged.check(LOCAL, LAYOUT.init(NUM_PAGES), paged.RaggedBatch.decode([3], [[1]]), 1)
    assert checked.for_layer(1, NUM_PAGES, 2).checked_for[1] == 2 * NUM_PAGES
    assert checked.for_layer(1, NUM_PAGES + 1, 2).checked_for[1] == 2 * (NUM_PAGES + 1)
    assert checked.for_layer(1, NUM_PAGES - 1, 2).checked_for is None
    text = str(jax.make_jaxpr(lambda *args: stack(*args)[0])(jnp.ones((1, EMBED)), batch, state))
    assert text.count("pure_callback") == 1


class TwoSizes(eqx.Module):
    """A layer whose attentions have pages in different numbers."""

    parts: list

    def __init__(self, key):
        self.parts = [random_layer(LOCAL, count, key) for count in (4, 5)]


ERRORS = {
    "no keys": (lambda: LayerStack.make(functools.partial(Block, LOCAL), []), "needs a layer: got 0 keys"),
    "no layers": (lambda: LayerStack.of([]), "needs a layer; got none"),
    "two sizes": (lambda: LayerStack.make(TwoSizes, keys_of(2)), r"equal in number; got \[4, 5\]"),
    "state taken": (lambda: LayerStack.of(model_of(lambda: tuple(blocks(2)))[0].layers), "no initial state any more"),
    "no such layer": (lambda: LayerStack.of(blocks(2)).layer(2), r"i must be in \[0, 2\)"),
    "too few": (lambda: LayerStack.of(blocks(2)).with_layers(blocks(1)), "layers must be 2, as many"),
    "another layer": (
        lambda: LayerStack.of(blocks(2, (LOCAL,))).with_layers(blocks(2)[:1] + blocks(1, (GLOBAL,))),
        r"layers\[1\] must be like the one that unstack gives",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_texts(name):
    call, text = ERRORS[name]
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_at_index_is_an_index_and_differentiates(dtype):
    x = jnp.arange(24.0).reshape(3, 2, 4).astype(dtype)
    taken, gradient = jax.jit(lambda x, i: (at_index(x, i), jax.grad(lambda x: at_index(x, i).sum())(x)))(x, 1)
    assert taken.dtype == gradient.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(taken.astype(jnp.float32), x[1].astype(jnp.float32))
    np.testing.assert_array_equal(gradient.astype(jnp.float32), np.eye(3)[1][:, None, None] * np.ones((3, 2, 4)))


class Wide(eqx.Module):
    """A layer with an array that is large, one that is read in another order, and one that is small."""

    up: eqx.nn.Linear
    down: jax.Array

    def __init__(self, key):
        self.up = eqx.nn.Linear(128, 128, key=key)
        self.down = jax.random.normal(key, (16, 8, 128)) / 11

    def __call__(self, x, batch, state):
        return self.dense(x), state

    def dense(self, x):
        hidden = jax.nn.relu(jax.vmap(self.up)(x))
        return x + hidden @ self.down.reshape(128, 128).T


def test_a_stack_that_is_apart_is_the_same_and_copies_no_large_array():
    stack, state = eqx.nn.make_with_state(LayerStack.make)(Wide, keys_of(3))
    parts, x = stack.apart(), jax.random.normal(jax.random.key(0), (2, 128))
    batch = paged.RaggedBatch.decode([1, 1], [[0], [1]])
    step = jax.jit(lambda stack, x, state: stack(x, batch, state)[0])
    want = step(stack, x, state)
    np.testing.assert_allclose(step(parts, x, state), want, atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda stack, x: stack.dense(x))(parts, x), want, atol=1e-5)
    copied = [step.lower(each, x, state).as_text().count("tensor<1x128x128xf32>") for each in (stack, parts)]
    assert copied[0] > 0 and copied[1] == 0
    chex.assert_trees_all_equal(parts.together(), stack)
    chex.assert_trees_all_equal(parts.unstack(), stack.unstack())
    chex.assert_trees_all_equal(parts.with_layers(stack.unstack()), stack)
