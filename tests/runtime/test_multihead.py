"""`PagedAttention.from_multihead`: equal to ``eqx.nn.MultiheadAttention``, served as it is trained, refused by name."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.runtime import LayerStack, PagedAttention, Rotary
from paged.testing import check_layer

LENGTH, SIZE = 8, 16
TOLERANCE = 2e-5  # float32; outputs are about 3, sums of 16 products
LAYOUT = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
SPLIT = LAYOUT.replace(order="split", value_dim=3)
HEADS_OF_OTHER_SIZES = {"qk_size": 8, "vo_size": 3, "key_size": 12, "value_size": 5, "output_size": 9}


def multihead(seed=0, **sizes):
    biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
    return eqx.nn.MultiheadAttention(2, SIZE, **biases, **sizes, key=jax.random.key(seed))


def paged_layer(mha, layout=LAYOUT, **options):
    return eqx.nn.make_with_state(PagedAttention.from_multihead)(mha, layout, 16, **options)


def features(count=LENGTH, size=SIZE, seed=1):
    return 3 * jax.random.normal(jax.random.key(seed), (count, size))


def turned(q, k, v):
    """As a model with ``eqx.nn.RotaryPositionalEmbedding`` turns queries and keys, always from position 0."""
    turn = jax.vmap(eqx.nn.RotaryPositionalEmbedding(8), 1, 1)
    return turn(q), turn(k), v


CAUSAL = np.tril(np.ones((LENGTH, LENGTH), bool))
BY_HEAD = np.random.default_rng(0).random((2, LENGTH, LENGTH)) < 0.6
BY_HEAD |= np.eye(LENGTH, dtype=bool)
CALLS = {
    "causal": (CAUSAL, {}),
    "mask of each head": (CAUSAL & BY_HEAD, {"mask": BY_HEAD}),
    "dropout": (CAUSAL, {"key": jax.random.key(3)}),
    "no dropout, process_heads": (CAUSAL, {"inference": True, "process_heads": turned}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_as_multihead_attention_gives_its_numbers(name):
    mha = multihead(dropout_p=0.0 if name in ("causal", "mask of each head") else 0.4)
    layer, _ = paged_layer(mha)
    mask, how = CALLS[name]
    x = features()
    got = eqx.filter_jit(layer)(query=x, key_=x, value=x, **how)
    want = mha(x, x, x, **{**how, "mask": jnp.asarray(mask)})
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


def test_a_batch_equals_a_vmap_and_gradients_are_those_of_multihead_attention():
    mha = multihead(dropout_p=0.4)
    layer, _ = paged_layer(mha, mask=paged.Causal() & paged.Window(3))
    xs, keys = jnp.stack([features(seed=1), features(seed=2)]), jax.random.split(jax.random.key(5), 2)
    mask = jnp.asarray(np.triu(CAUSAL, -2))

    @eqx.filter_jit
    def gradient(layer, loss):
        return jax.tree.leaves(eqx.filter_grad(loss)(layer))

    got = gradient(layer, lambda layer: (layer.dense(xs, key=jax.random.key(5)) ** 2).sum())
    want = gradient(mha, lambda mha: (jax.vmap(lambda x, key: mha(x, x, x, mask, key=key))(xs, keys) ** 2).sum())
    assert len(got) == len(want) == 8
    largest = max(float(jnp.abs(x).max()) for x in want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * largest)


def test_a_layer_serves_as_it_trains():
    check_layer(*paged_layer(multihead(), mask=paged.Causal() & paged.Window(5), rotary=Rotary(8)))


def test_serving_drops_nothing_and_takes_other_features_for_keys_and_values():
    layer, state = paged_layer(multihead(**HEADS_OF_OTHER_SIZES, dropout_p=0.4), SPLIT)
    query, key_, value = features(), features(size=12, seed=2), features(size=5, seed=3)
    step = eqx.filter_jit(lambda *args: layer(*args[:3], key_=args[3], value=args[4]))
    first = paged.RaggedBatch.prefill(4, [5, 2], 4)
    rest = paged.RaggedBatch.prefill(LENGTH, [5, 2], 4)
    y, state = step(query[:4], first, state, key_[:4], value[:4])
    z, state = step(query[4:], rest, state, key_[4:], value[4:])
    want = eqx.filter_jit(layer.dense)(query, key_, value, inference=True)
    assert want.shape == (LENGTH, 9)
    np.testing.assert_allclose(jnp.concatenate([y, z]), want, atol=TOLERANCE)
    with pytest.raises(ValueError, match=r"key_ must be \[tokens, 12\]; got \(4, 16\)"):
        layer(query[:4], first, state)


def test_process_heads_with_positions_serves():
    """Not with a rotary embedding that begins at 0 in every step."""
    rotary = Rotary(8)

    def process_heads(q, k, v, positions):
        return rotary(q, positions), rotary(k, positions), v

    layer, state = paged_layer(multihead())
    step = eqx.filter_jit(lambda layer, *args: layer(*args, process_heads=process_heads))
    x, ys = features(), []
    for start, stop in [(0, 4), (4, 8)]:
        batch = paged.RaggedBatch.prefill(stop, [5, 2], 4)
        y, state = step(layer, x[start:stop], batch, state)
        ys.append(y)
    np.testing.assert_allclose(jnp.concatenate(ys), step(layer, x, x, x), atol=TOLERANCE)
    dense = eqx.filter_jit(lambda layer, x: layer(x, x, x, process_heads=turned))
    np.testing.assert_allclose(jnp.concatenate(ys), dense(layer, x), atol=TOLERANCE)
    with pytest.raises(ValueError, match="process_heads needs an argument `positions`"):
        layer(x[:4], batch, state, process_heads=turned)


@pytest.mark.kernels
def test_cross_attention_writes_once_and_reads_without_a_causal_mask():
    """Two sequences attend to one context, with more rows than it has tokens, and a third to another one."""
    mha = multihead(**HEADS_OF_OTHER_SIZES)
    layer, state = paged_layer(mha, SPLIT, mask=paged.Everything())
    keys, values = [features(n, 12, n) for n in (3, 6)], [features(n, 5, n + 9) for n in (3, 6)]
    written = paged.RaggedBatch([3, 6], [[7, -1], [0, 4]], [0, 3, 9])
    write = eqx.filter_jit(lambda layer, key_, value, state: layer.write(key_, written, state, value=value))
    state = write(layer, jnp.concatenate(keys), jnp.concatenate(values), state)
    before = state.get(layer.cache.index)
    rows = [features(n, seed=20 + n) for n in (5, 1, 2)]
    batch = paged.RaggedBatch([3, 3, 6], [[7, -1], [7, -1], [0, 4]], [0, 5, 6, 8])
    got = eqx.filter_jit(layer.read)(jnp.concatenate(rows), batch, state)
    want = [mha(x, keys[i], values[i]) for x, i in zip(rows, (0, 0, 1), strict=True)]
    np.testing.assert_allclose(got, jnp.concatenate(want), atol=TOLERANCE)
    dense = eqx.filter_jit(layer.dense)(rows[0], keys[0], values[0])
    np.testing.assert_allclose(got[:5], dense, atol=TOLERANCE)
    assert all(a is b for a, b in zip(before.arrays, state.get(layer.cache.index).arrays, strict=True))


def test_reading_a_page_that_is_none_is_found():
    layer, state = paged_layer(multihead(), mask=paged.Everything())
    with pytest.raises(ValueError, match=r"block_tables\[0, 1\] = 16 .* is no page of the pool"):
        layer.read(features(1), paged.RaggedBatch.decode([5], [[0, 16]]), state)
    with pytest.raises(ValueError, match="is less than its 3 query rows"):
        layer.write(features(3), paged.RaggedBatch.prefill(2, [0], 3), state)


class Cross(eqx.Module):
    """A layer that reads pages of its own tables, which a stack of layers would not shift."""

    attention: PagedAttention

    def __call__(self, x, batch, state):
        return self.attention.read(x, batch, state), state


def test_cross_attention_in_a_stack_is_refused():
    mhas = [multihead(seed) for seed in range(2)]
    make = lambda: LayerStack.of([Cross(PagedAttention.from_multihead(mha, LAYOUT, 4)) for mha in mhas])
    stack, state = eqx.nn.make_with_state(make)()
    with pytest.raises(ValueError, match="read has a batch of its own, whose page numbers a LayerStack does not shift"):
        stack(features(1), paged.RaggedBatch.decode([1], [[0]]), state)


class Other(eqx.nn.MultiheadAttention):
    """A subclass."""


def stacked():
    return eqx.filter_vmap(lambda key: eqx.nn.MultiheadAttention(2, SIZE, key=key))(jax.random.split(jax.random.key(0)))


def wrong_head(q, k, v):
    return q[:, :1], k, v


def dense(how, **options):
    layer, x = paged_layer(multihead(**options))[0], features()
    return layer(x, x, x, **how)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: paged_layer(Other(2, SIZE, key=jax.random.key(0))), "got a Other, which is a subclass"),
        (lambda: paged_layer(eqx.nn.Linear(2, 2, key=jax.random.key(0))), "got a Linear, which is none"),
        (lambda: paged_layer(stacked()), "query_proj.weight has 3 dimensions, as stacked layers have: take them apart"),
        (
            lambda: paged_layer(multihead(qk_size=4)),
            r"PageLayout\(\.\.\., num_kv_heads=2, head_dim=4, value_dim=8, ord",
        ),
        (lambda: paged_layer(multihead(), rotary=Rotary(4)), "rotary.head_dim must equal spec.head_dim = 8; got 4"),
        (lambda: dense({}, dropout_p=0.5), "Dropout requires a key when running in non-deterministic mode"),
        (lambda: dense({"mask": np.ones((3, 8), bool)}), r"mask must be \[tokens, length\] = \(8, 8\).*got \(3, 8\)"),
        (lambda: dense({"mask": np.ones((8, 8))}), "mask must be an array of bools"),
        (lambda: dense({"process_heads": wrong_head}), "process_heads must not change the shape of the heads"),
        (
            lambda: paged_layer(multihead(), rotary=Rotary(8))[0].dense(features(), process_heads=turned),
            "process_heads in a layer with rotary= could turn queries and keys twice",
        ),
        (lambda: paged_layer(multihead())[0].dense(features(), None, features(3)), "must be equally long; got"),
        (lambda: paged_layer(multihead())[0](features(), None, object()), "value must be an array; got object"),
    ],
)
def test_error_texts(call, text):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=text):
        call()
