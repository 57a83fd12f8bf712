"""`convert`: every attention of a model is replaced or named, and no other leaf moves."""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paged
from paged.runtime import PagedAttention
from paged.testing import check_model

VOCAB, SIZE, POSITIONS = 11, 16, 32
LAYOUT = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)


class Block(eqx.Module):
    """Attention and a perceptron, as a model of Equinox has them; `serve` is what serving adds."""

    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention | PagedAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key)
        self.norm = eqx.nn.LayerNorm(SIZE)
        self.attention = eqx.nn.MultiheadAttention(2, SIZE, dropout_p=0.1, use_value_bias=True, key=keys[0])
        self.mlp = eqx.nn.MLP(SIZE, SIZE, 24, 1, key=keys[1])

    def __call__(self, x, mask, key):
        h = jax.vmap(self.norm)(x)
        x = x + 3 * self.attention(h, h, h, mask, key=key, inference=key is None)
        return x + jax.vmap(self.mlp)(x)

    def serve(self, x, batch, state):
        y, state = self.attention(jax.vmap(self.norm)(x), batch, state)
        x = x + 3 * y
        return x + jax.vmap(self.mlp)(x), state


class Gpt(eqx.Module):
    """A language model with learnt embeddings of positions, and an encoder that is not served from pages."""

    embedding: eqx.nn.Embedding
    positions: jax.Array
    blocks: list[Block]
    encoder: eqx.nn.MultiheadAttention
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.embedding = eqx.nn.Embedding(VOCAB, SIZE, key=keys[0])
        self.positions = jax.random.normal(keys[1], (POSITIONS, SIZE))
        self.blocks = [Block(keys[2])]
        self.encoder = eqx.nn.MultiheadAttention(1, 4, key=keys[3])
        self.head = eqx.nn.Linear(SIZE, VOCAB, key=keys[4])

    def __call__(self, tokens, key=None):
        x = jax.vmap(self.embedding)(tokens) + self.positions[: len(tokens)]
        mask = jnp.tril(jnp.ones((len(tokens), len(tokens)), bool))
        for block in self.blocks:
            x = block(x, mask, key)
        return jax.vmap(self.head)(x)

    def serve(self, tokens, batch, state):
        positions = self.blocks[0].attention.cache.positions(batch, tokens.shape[0])
        x = jax.vmap(self.embedding)(tokens) + self.positions[positions]
        for block in self.blocks:
            x, state = block.serve(x, batch, state)
        return jax.vmap(self.head)(x), state


def without_encoder(path, mha):
    del mha
    return None if path == ".encoder" else {}


def convert(model, **options):
    return paged.convert(model, layout=LAYOUT, num_pages=16, choose=without_encoder, **options)


@pytest.fixture(scope="module")
def gpt():
    return Gpt(jax.random.key(0))


def test_the_model_is_called_as_before_and_is_served_as_it_is_called(gpt):
    model, state, replaced, left = converted = convert(gpt)
    assert list(replaced) == [".blocks[0].attention"] and list(left) == [".encoder"]
    assert str(converted).splitlines() == [
        ".blocks[0].attention: 2 heads of 8, mask j <= p, pages of 4 tokens",
        ".encoder: not paged, because choose returned None",
    ]
    tokens, key = jnp.array([3, 1, 4, 1, 5]), jax.random.key(1)
    for how in ({}, {"key": key}):
        call = eqx.filter_jit(lambda model, how=how: model(tokens, **how))
        np.testing.assert_allclose(call(model), call(gpt), atol=2e-5)
    check_model(model.serve, state, vocab_size=VOCAB, dense=eqx.filter_jit(model))


def test_checkpoints_load_both_ways(gpt):
    model, _, *_ = convert(Gpt(jax.random.key(7)))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, gpt)
    file.seek(0)
    loaded = eqx.tree_deserialise_leaves(file, model)
    assert jax.tree.leaves(loaded)[0].tolist() == gpt.embedding.weight.tolist()
    back = io.BytesIO()
    eqx.tree_serialise_leaves(back, loaded)
    assert back.getvalue() == file.getvalue()


def test_an_optimiser_goes_on_where_it_was(gpt):
    """Two steps of Adam before, one after: the same numbers as three steps without."""
    optim, tokens = optax.adam(1e-2), jnp.array([3, 1, 4, 1, 5])

    @eqx.filter_jit
    def step(model, state):
        loss = lambda model: optax.softmax_cross_entropy_with_integer_labels(model(tokens[:-1]), tokens[1:]).mean()
        parameters = eqx.filter(model, eqx.is_inexact_array)
        with jax.numpy_dtype_promotion("standard"):  # as optax needs it
            updates, state = optim.update(eqx.filter_grad(loss)(model), state, parameters)
        return eqx.apply_updates(model, updates), state

    trained, moments = step(*step(gpt, optim.init(eqx.filter(gpt, eqx.is_inexact_array))))
    model = convert(trained).model
    parameters = eqx.filter(model, eqx.is_inexact_array)
    own = jax.tree.unflatten(jax.tree.structure(optim.init(parameters)), jax.tree.leaves(moments))
    got, want = step(model, own)[0], step(trained, moments)[0]
    for a, b in zip(*(jax.tree.leaves(eqx.filter(m, eqx.is_array)) for m in (got, want)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_state_that_there_is_stays():
    make = lambda: [eqx.nn.BatchNorm(4, "batch", mode="batch"), eqx.nn.MultiheadAttention(2, 16, key=jax.random.key(0))]
    with pytest.raises(ValueError, match=r"make it by eqx\.nn\.make_with_state"):
        paged.convert(make(), layout=LAYOUT, num_pages=4)
    old, state = eqx.nn.make_with_state(make)()
    with pytest.raises(ValueError, match="give convert state="):
        paged.convert(old, layout=LAYOUT, num_pages=4)
    model, state, *_ = paged.convert(old, layout=LAYOUT, num_pages=4, state=state)
    assert not state.get(model[0].batch_counter) and state.get(model[1].cache.index).num_pages == 4


def shared():
    mhas = [eqx.nn.MultiheadAttention(2, 16, key=jax.random.key(i)) for i in range(3)]
    return eqx.nn.Shared(mhas, lambda mhas: mhas[1], lambda mhas: mhas[0])


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (shared, r"(?s)None to leave one as it is:\n    \.pytree\[0\]: eqx\.nn\.Shared calls it more than once"),
        (lambda: {"a": eqx.nn.MultiheadAttention(2, 8, key=jax.random.key(0))}, r"\['a'\]: layout must have the atten"),
        (lambda: eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0)), "The model has no eqx.nn.MultiheadAttention to replac"),
    ],
    ids=["shared", "another layout", "none"],
)
def test_what_cannot_be_served_is_named(model, text):
    with pytest.raises(ValueError, match=text):
        paged.convert(model(), layout=LAYOUT, num_pages=4)


def test_layers_that_share_projections_alone_are_served():
    mhas = [eqx.nn.MultiheadAttention(2, 16, key=jax.random.key(i)) for i in range(2)]
    tied = eqx.nn.Shared(mhas, lambda mhas: mhas[1].query_proj, lambda mhas: mhas[0].query_proj)
    model, state, *_ = paged.convert(tied, layout=LAYOUT, num_pages=4)
    first, second = model()
    assert first.query_proj.weight is second.query_proj.weight
    assert state.get(first.cache.index) is not state.get(second.cache.index)
