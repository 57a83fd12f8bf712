"""A tiny random language model with every feature that serving may get wrong, and its dense recomputation."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp

import paged
from paged.runtime import PagedAttention, Rotary

VOCAB, EMBED, PAGE_SIZE = 32, 16, 4

# GQA 2 to 1. The first layer has a window and a soft cap, the second sinks; attention scores are far from uniform.
LOCAL = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, window=5, soft_cap=4.0, scale=1.5)
GLOBAL = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, sinks=True, scale=1.5)
LAYOUT = paged.PageLayout(page_size=PAGE_SIZE, num_kv_heads=2, head_dim=8, dtype=jnp.float32)


def random_layer(spec, num_pages, key, **options):
    """A layer with a rotary embedding whose every parameter is random, sinks and norms too."""
    layer_key, sink_key, norm_key = jax.random.split(key, 3)
    layer = PagedAttention(spec, LAYOUT, num_pages, EMBED, rotary=Rotary(8, theta=100.0), key=layer_key, **options)
    if spec.sinks:
        layer = eqx.tree_at(lambda m: m.sinks, layer, jax.random.normal(sink_key, (spec.num_q_heads,)))
    if options.get("qk_norm"):
        weight = 1 + 0.3 * jax.random.normal(norm_key, (8,))
        layer = eqx.tree_at(lambda m: m.query_norm.weight, layer, weight)
    return layer


class _Residual(eqx.Module):
    """Embedding, attention layers with residuals, logits. It counts how often it is traced."""

    embedding: jax.Array
    layers: tuple[PagedAttention, ...]
    unembedding: jax.Array  # not the embedding: by that one the likeliest next token would be the last one
    traces: list = eqx.field(static=True)

    def __call__(self, tokens, batch, state):
        self.traces.append(tokens.shape[0])
        x = self.embedding[tokens]
        for layer in self.layers:
            y, state = layer(x, batch, state)
            x = x + 3 * y
        return x @ self.unembedding.T, state

    def dense(self, tokens):
        """Logits of one whole sequence, without a cache."""
        x = self.embedding[tokens][None]
        for layer in self.layers:
            x = x + 3 * layer.dense(x)
        return (x @ self.unembedding.T)[0]


class Tiny(_Residual):
    """Two layers with all that a layer may have."""

    def __init__(self, num_pages, *, key):
        e_key, u_key, a_key, b_key = jax.random.split(key, 4)
        self.embedding = jax.random.normal(e_key, (VOCAB, EMBED))
        self.unembedding = jax.random.normal(u_key, (VOCAB, EMBED))
        self.layers = (random_layer(LOCAL, num_pages, a_key), random_layer(GLOBAL, num_pages, b_key, qk_norm=True))
        self.traces = _Traces()


_AHEAD = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, causal=False, scale=1.5)


class TwoLayers(_Residual):
    """A layer whose mask sees ahead, then a causal one, which reads what each row of the first one saw."""

    def __init__(self, mask, *, key):
        keys = jax.random.split(key, 4)
        specs = _AHEAD.replace(mask=mask), _AHEAD.replace(causal=True)
        self.layers = tuple(random_layer(spec, 16, key) for spec, key in zip(specs, keys[1:3], strict=True))
        self.embedding = jax.random.normal(keys[0], (VOCAB, EMBED))
        self.unembedding = jax.random.normal(keys[3], (VOCAB, EMBED))
        self.traces = _Traces()


@functools.cache
def two_layers(mask):
    return eqx.nn.make_with_state(TwoLayers)(mask, key=jax.random.key(0))


class _Traces(list):
    """A list that can be a static field: hashed and compared by identity."""

    def __hash__(self):
        return id(self)

    def __eq__(self, other):
        return self is other


@functools.cache
def shared_tiny():
    """A model and its state, the same ones for all tests of a process, which share compiled programs."""
    return tiny()


def tiny(num_pages=32, seed=0):
    """A model and its state."""
    return eqx.nn.make_with_state(Tiny)(num_pages, key=jax.random.key(seed))


@eqx.filter_jit
def _padded_logits(model, tokens):
    return model.dense(tokens)


def greedy_ref(model, prompt, max_new_tokens, eos=(), width=64):
    """Greedy decoding that recomputes everything for each token. Padding is at later positions, which are hidden."""
    known = list(prompt)
    for _ in range(max_new_tokens):
        padded = jnp.zeros(width, jnp.int32).at[: len(known)].set(jnp.asarray(known))
        known.append(int(jnp.argmax(_padded_logits(model, padded)[len(known) - 1])))
        if known[-1] in eos:
            break
    return tuple(known[len(prompt) :])
