"""Every architecture against what `transformers` computes: logits, queries, keys and values, greedy tokens."""

import functools
import json
import pathlib
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.models import load, open_safetensors
from paged.runtime import PagePool, generate, pools_of

FOLDER = pathlib.Path(__file__).parent / "checkpoints"
NAMES = sorted(folder.name for folder in FOLDER.iterdir() if (folder / "config.json").is_file())
NUM_PAGES, PAGE_SIZE = 24, 4


def each(*fast, others=pytest.mark.kernels):
    """Every architecture, of which some are in every run."""
    rows = [pytest.param(name, marks=() if name in fast else others) for name in NAMES]
    return pytest.mark.parametrize("name", rows)


class Loaded(NamedTuple):
    model: object
    state: object
    expected: dict


@functools.cache
def loaded(name):
    sizes = {"num_pages": NUM_PAGES, "page_size": PAGE_SIZE, "max_length": 64}  # of longrope the shorter list
    model, state, _ = load(FOLDER / name, **sizes, dtype=jnp.float32)
    expected = open_safetensors(FOLDER / name / "expected.safetensors")
    return Loaded(model, state, {key: np.array(tensor.read()) for key, tensor in expected.items()})


def assert_close(got, want):
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=2e-4)


def test_every_architecture_has_a_checkpoint():
    tested = {json.loads((FOLDER / name / "config.json").read_text())["model_type"] for name in NAMES}
    assert tested == set(paged.models.ARCHITECTURES)


@eqx.filter_jit
def seen_by_layers(model, tokens):
    """What each layer gives to its attention, and the logits."""
    x, parts = model.embed_tokens(tokens)[None], []
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    for layer in model.layers.unstack():
        parts.append(layer.self_attn.project(layer.input_layernorm(x)[0], positions))
        x = layer.dense(x)
    return parts, model.logits(x)[0]


@each("llama", "gemma2")
def test_logits_and_what_each_layer_attends_to_are_those_of_transformers(name):
    model, _, expected = loaded(name)
    layers, logits = seen_by_layers(model, jnp.asarray(expected["prompt"], jnp.int32))
    for i, parts in enumerate(layers):
        for part, got in zip("qkv", parts, strict=True):
            assert_close(got, expected[f"layers.{i}.{part}"])
    assert_close(logits, expected["logits"])


@each()
def test_served_from_pages_chunks_beside_decoding_rows_give_the_logits_of_transformers(name):
    """The prompt in chunks of 1 to 8 rows, in one slot, while another slot, and pages between, hold another prompt."""
    model, state, expected = loaded(name)
    prompt, other = expected["prompt"].astype(np.int32), expected["tokens"].astype(np.int32)
    pool = PagePool.init(NUM_PAGES, num_slots=2, pages_per_seq=8, page_size=PAGE_SIZE)
    step = eqx.filter_jit(lambda model, tokens, batch, state: model(tokens, batch, state))
    done, seen, logits = 0, 0, []
    for rows in (5, 1, 8, 4):
        pool, ok = pool.extend(jnp.array([1, rows], jnp.int32))
        assert bool(ok.all())
        tokens = np.zeros(9, np.int32)
        tokens[: rows + 1] = [other[seen], *prompt[done : done + rows]]
        out, state = step(model, jnp.asarray(tokens), pool.ragged_batch(jnp.array([1, rows], jnp.int32)), state)
        logits.append(np.asarray(out[1 : rows + 1]))
        done, seen = done + rows, seen + 1
    assert done == len(prompt)
    assert_close(np.concatenate(logits), expected["logits"])
    assert_close(
        eqx.filter_jit(lambda model, tokens: model.dense(tokens))(model, jnp.asarray(prompt)), expected["logits"]
    )


@each("llama", others=pytest.mark.slow)
def test_generate_gives_the_greedy_tokens_of_transformers(name):
    model, state, expected = loaded(name)
    prompt, want = expected["prompt"].tolist(), expected["tokens"].tolist()
    sizes = {"max_new_tokens": len(want), "num_slots": 2, "chunk_size": 8, "prefix_cache": False}
    first, second = generate(model, state, [prompt, prompt[:7]], **sizes)
    assert list(first.tokens) == want
    assert len(second.tokens) == len(want)


@pytest.mark.parametrize(
    ("name", "most"), [("gemma3", {24, 10}), pytest.param("gpt_oss", {24, 10}, marks=pytest.mark.slow)]
)
@pytest.mark.kernels
def test_windowed_layers_have_the_pages_that_they_need_and_the_same_tokens(name, most):
    sizes = {"num_pages": NUM_PAGES, "page_size": PAGE_SIZE, "num_slots": 2, "chunk_size": 8, "max_length": 64}
    model, state, _ = load(FOLDER / name, **sizes, dtype=jnp.float32)
    assert {pool.num_pages for pool in pools_of(state)} == most
    expected, reports = loaded(name).expected, []
    prompt, want = expected["prompt"].tolist(), expected["tokens"].tolist()
    options = {"max_new_tokens": len(want), "num_slots": 2, "chunk_size": 8, "on_step": reports.append}
    first, second = generate(model, state, [prompt, prompt], **options)
    assert list(first.tokens) == want == list(second.tokens)
    full, local = reports[-1].groups
    assert (full.pages_trimmed, local.pages_trimmed > 2 * len(prompt) // PAGE_SIZE // 2) == (0, True)
