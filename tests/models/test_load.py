"""`load` and `save`: every tensor by name, in its dtype, on one device or on a mesh; compiled as fast as two layers."""

import json
import pathlib
import re
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from paged.models import Config, Decoder, Tensor, load, open_safetensors, save, write_safetensors
from paged.models.layers import product
from paged.runtime import generate
from paged.spec import RaggedBatch

CHECKPOINTS = pathlib.Path(__file__).parent / "checkpoints"
SIZES = {"num_pages": 16, "page_size": 4, "max_length": 64}


def tensors_of(folder):
    return {name: np.array(tensor.read()) for name, tensor in open_safetensors(folder / "model.safetensors").items()}


@pytest.fixture
def changed(tmp_path):
    """A copy of a checkpoint with some keys and tensors changed: None takes one out."""

    def change(name="llama", keys=(), tensors=()):
        folder = tmp_path / "changed"
        shutil.copytree(CHECKPOINTS / name, folder)
        config = {**json.loads((folder / "config.json").read_text()), **dict(keys)}
        (folder / "config.json").write_text(json.dumps(config))
        both = {**tensors_of(folder), **dict(tensors)}
        write_safetensors(folder / "model.safetensors", {key: x for key, x in both.items() if x is not None})
        return folder

    return change


def refused(what, folder, **options):
    with pytest.raises(ValueError, match=re.escape(what)):
        load(folder, **{**SIZES, **options})


def test_missing_and_left_over_weights_are_refused_by_name(changed):
    name = "model.layers.1.self_attn.k_proj.weight"
    refused(f"lacks the tensors '{name}'", changed(tensors={name: None}))


def test_left_over_weights_are_refused_by_name(changed):
    refused("has the tensors 'model.layers.2.mlp.bias'", changed(tensors={"model.layers.2.mlp.bias": np.ones(3)}))


def test_a_weight_of_another_shape_is_refused_by_name(changed):
    refused(
        "tensor 'model.norm.weight' has shape (3,); config.json says (24,)",
        changed(tensors={"model.norm.weight": np.ones(3)}),
    )


def test_a_bias_that_config_json_does_not_tell_of_is_left_over(changed):
    others = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
    refused("k_proj.bias", changed("qwen2", keys={"model_type": "llama", **dict.fromkeys(others)}))


@pytest.mark.parametrize("is_same", [True, False])
def test_a_stored_head_must_be_the_embedding_where_config_json_says_so(changed, is_same):
    embedding = tensors_of(CHECKPOINTS / "smollm2")["model.embed_tokens.weight"]
    folder = changed("smollm2", tensors={"lm_head.weight": embedding if is_same else 2 * embedding})
    if is_same:
        assert load(folder, **SIZES)[0].lm_head is None
    else:
        refused("'lm_head.weight' differs from 'model.embed_tokens.weight'", folder)


def test_parameters_keep_the_dtype_that_they_are_stored_in(changed):
    wide = {"model.norm.weight": np.ones(24, np.float32)}
    model, state, _ = load(changed(tensors=wide), **SIZES)
    assert model.norm.weight.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(eqx.filter(model.layers, eqx.is_array))} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.bfloat16)}, "pages follow the embedding"
    tokens = jnp.arange(5, dtype=jnp.int32)
    batch = RaggedBatch.prefill(length=5, block_table=[1, 0], query_rows=5)
    logits = eqx.filter_eval_shape(lambda *args: model(*args)[0], tokens, batch, state)
    assert logits.dtype == jnp.bfloat16


def test_a_dtype_in_which_nothing_is_computed_is_refused(changed):
    refused("dtype must be one of float32, bfloat16, float16", CHECKPOINTS / "llama", dtype=jnp.int8)
    small = tensors_of(CHECKPOINTS / "llama")["model.embed_tokens.weight"].astype(jnp.float8_e4m3fn)
    refused("pass dtype=jnp.bfloat16", changed(tensors={"model.embed_tokens.weight": small}))


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no config"):
        load(tmp_path, **SIZES)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_oss"])
def test_what_is_saved_is_the_checkpoint_bit_for_bit(name, tmp_path):
    """Projections that are stored apart, that are stored as one, and experts, from stacks of one layer and of two."""
    model, _, _ = load(CHECKPOINTS / name, **SIZES)
    save(model, tmp_path / "saved")
    got, want = tensors_of(tmp_path / "saved"), tensors_of(CHECKPOINTS / name)
    assert got.keys() == want.keys()
    for key, x in want.items():
        assert got[key].dtype == x.dtype and got[key].shape == x.shape
        np.testing.assert_array_equal(got[key].view(np.uint16), x.view(np.uint16), err_msg=key)
    keys = json.loads((CHECKPOINTS / name / "config.json").read_text())
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == keys


@pytest.fixture
def mesh():
    if jax.local_device_count() < 2:
        pytest.skip("needs two devices, which the root conftest simulates")
    return jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_on_a_mesh_each_device_reads_its_own_part_and_tokens_are_the_same(name, mesh, monkeypatch):
    read, parts = Tensor.read, {}

    def watched(tensor, index=()):
        part = read(tensor, index)
        parts.setdefault(tensor.name, []).append(part.size / np.prod(tensor.shape))
        return part

    monkeypatch.setattr(Tensor, "read", watched)
    model, state, _ = load(CHECKPOINTS / name, **SIZES, dtype=jnp.float32, mesh=mesh)
    monkeypatch.undo()
    halves = {key for key, shares in parts.items() if max(shares) <= 0.5}
    projections = ("q_proj", "k_proj", "v_proj", "o_proj.weight", "mlp.gate", "mlp.up", "mlp.down", "experts", "sinks")
    assert halves == {key for key in parts if any(part in key for part in projections)}
    pool = jax.tree.leaves(state)[0]
    assert pool.sharding.shard_shape(pool.shape)[2] == 1, "a KV head on each device"

    want = open_safetensors(CHECKPOINTS / name / "expected.safetensors")
    prompt, tokens = (want[key].read().tolist() for key in ("prompt", "tokens"))
    (result,) = generate(model, state, [prompt], max_new_tokens=24, num_slots=2, chunk_size=8)
    assert list(result.tokens) == tokens


def test_a_mesh_that_cannot_share_the_heads_evenly_is_refused():
    if jax.local_device_count() < 3:
        pytest.skip("needs three devices, which the root conftest simulates")
    mesh = jax.make_mesh((3,), ("model",), devices=jax.devices()[:3])
    refused("cannot share the 2 of num_key_value_heads evenly", CHECKPOINTS / "llama", mesh=mesh)
    refused("axis must be one of the mesh's 'model'; got 'heads'", CHECKPOINTS / "llama", mesh=mesh, axis="heads")


def test_experts_of_mxfp4_blocks_are_unpacked(tmp_path):
    """As gpt-oss stores them: [experts, outputs, blocks, 16] bytes, and a power of two for each block."""
    keys = json.loads((CHECKPOINTS / "gpt_oss" / "config.json").read_text())
    keys |= {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 3, "num_hidden_layers": 1}
    keys |= {"layer_types": ["full_attention"], "quantization_config": {"quant_method": "mxfp4"}}
    config, make = Config.from_keys(keys), eqx.nn.make_with_state(Decoder)
    made, _ = make(config, config.layout(4, jnp.bfloat16), 4, dtype=jnp.bfloat16, key=jax.random.key(0))
    save(made, tmp_path)
    tensors, rng = tensors_of(tmp_path), np.random.default_rng(0)
    want = {}
    for name, outputs in (("gate_up_proj", 64), ("down_proj", 32)):
        prefix = f"model.layers.0.mlp.experts.{name}"
        codes, powers = rng.integers(0, 16, (3, outputs, 32)), rng.integers(-3, 4, (3, outputs))
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # of float4_e2m1fn
        want[name] = np.swapaxes(values[codes] * 2.0 ** powers[..., None], 1, 2)
        del tensors[prefix]
        tensors[f"{prefix}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)[:, :, None]
        tensors[f"{prefix}_scales"] = (powers + 127).astype(np.uint8)[..., None]
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(keys))
    model, _, _ = load(tmp_path, **SIZES)
    for name, x in want.items():
        got = getattr(model.layers.layer(0).mlp, name)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got.astype(jnp.float32), x)
    tensors[f"{prefix}_scales"] = tensors[f"{prefix}_scales"][:2]
    write_safetensors(tmp_path / "model.safetensors", tensors)
    refused("[experts, outputs, blocks]; got (3, 32, 1, 16) and (2, 32, 1)", tmp_path)


def test_experts_are_computed_in_one_of_two_ways(mesh):
    refused(
        "experts must be one of 'ragged', 'dense', or None; got 'sparse'", CHECKPOINTS / "gpt_oss", experts="sparse"
    )
    refused("experts must be one of 'dense' on a mesh", CHECKPOINTS / "gpt_oss", experts="ragged", mesh=mesh)
    ways = {
        how: load(CHECKPOINTS / "gpt_oss", **SIZES, dtype=jnp.float32, experts=how)[0] for how in ("ragged", "dense")
    }
    x = jax.random.normal(jax.random.key(0), (5, 24))
    run = eqx.filter_jit(lambda model, x: model.layers.layer(0).mlp(x))
    ragged, dense = (run(model, x) for model in ways.values())
    np.testing.assert_allclose(ragged, dense, atol=1e-5)


def test_thirty_layers_are_compiled_like_two():
    """The program of a step, not the time that it takes: it has one layer of each kind, whatever their number."""

    def program(layers):
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        config = Config.from_keys({"model_type": "llama", **sizes, "num_hidden_layers": layers})
        make = eqx.nn.make_with_state(Decoder)
        layout = config.layout(4, jnp.float32)
        model, state = eqx.filter_eval_shape(make, config, layout, 8, check=False, key=jax.random.key(0))
        shapes, static = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))
        batch = RaggedBatch.decode(lengths=[5, 3], block_tables=[[1, 0], [2, 3]])
        step = jax.jit(lambda shapes, tokens, state: eqx.combine(shapes, static)(tokens, batch, state))
        return step.lower(shapes, jnp.zeros(2, jnp.int32), state).as_text()

    lines = [len(program(layers).splitlines()) for layers in (2, 30)]
    assert lines[0] == lines[1] > 100


def test_a_model_that_is_apart_copies_no_weights_and_is_saved_as_it_was(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    config = Config.from_keys({"model_type": "llama", **sizes, "num_hidden_layers": 2})
    layout = config.layout(4, "float32")
    make = eqx.filter_jit(lambda key: eqx.nn.make_with_state(Decoder)(config, layout, 8, check=False, key=key))
    model, state = make(jax.random.key(0))
    batch = RaggedBatch.decode(lengths=[5, 3], block_tables=[[1, 0], [2, 3]])
    tokens, results = jnp.zeros(2, jnp.int32), []
    for name, each in (("whole", model), ("apart", model.apart())):
        arrays, static = eqx.partition(each, eqx.is_array)
        step = jax.jit(lambda arrays, state, static=static: eqx.combine(arrays, static)(tokens, batch, state)[0])
        program = step.lower(arrays, state).as_text()
        copied = re.findall(r"dynamic_slice.*-> tensor<1x(?:\d+x)+(?:128|256)xf32>", program)
        assert len(copied) == (4 if name == "whole" else 0), copied
        save(each, tmp_path / name)
        x = jax.random.normal(jax.random.key(1), (3, 128))
        results.append(each.layers.layer(1).self_attn.qkv_proj(x))
    assert results[0].shape == (3, 4, 3, 32)
    np.testing.assert_allclose(*results, atol=1e-5)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "apart")]
    assert files[0] == files[1]


@pytest.mark.parametrize(("rows", "dtype", "first"), [(47, "float32", 96), (48, "float32", 48), (48, "bfloat16", 96)])
def test_on_a_cpu_few_rows_come_after_the_weight_and_many_before_it(rows, dtype, first):
    x, weight = (jax.ShapeDtypeStruct((n, 64), dtype) for n in (rows, 96))
    program = jax.jit(product).lower(x, weight).as_text()
    assert re.findall(r"dot_general.*: \(tensor<(\d+)x", program) == [str(first)]


def test_layers_of_one_kind_are_one_run():
    config = Config.from_keys(json.loads((CHECKPOINTS / "gemma3" / "config.json").read_text()))
    layout = config.layout(4, jnp.float32)
    make = eqx.nn.make_with_state(Decoder)
    model, _ = eqx.filter_eval_shape(make, config, layout, 8, key=jax.random.key(0))
    assert [len(run.input_layernorm.weight) for run in model.layers.runs] == [5, 1, 1], "five, a full one, and one more"


def test_what_a_mesh_shares_out(mesh):
    model, _, _ = load(CHECKPOINTS / "phi3", **SIZES, mesh=mesh)
    layer = model.layers.runs[0]
    assert layer.self_attn.qkv_proj.weight.sharding.spec == P(None, "model", None, None, None)
    assert layer.mlp.gate_up_proj.weight.sharding.spec == P(None, None, "model", None)
    assert layer.mlp.down_proj.weight.sharding.spec == P(None, None, "model")
    assert model.lm_head.weight.sharding.spec == P(None, None)
