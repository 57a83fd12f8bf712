"""`Config`: both forms of the rotary keys, what each architecture adds, and what is refused by name."""

import json
import pathlib
import re

import pytest

from paged.models import ARCHITECTURES, Config
from paged.runtime import LinearScaling, Llama3Scaling, LongRopeScaling, NtkScaling, Rotary, YarnScaling

CHECKPOINTS = pathlib.Path(__file__).parent / "checkpoints"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def config(architecture="llama", max_length=None, **keys):
    return Config.from_keys({"model_type": architecture, **SIZES, **keys}, max_length)


def rotaries(*args, **keys):
    return [layer.rotary for layer in config(*args, **keys).layers]


def windows(*args, **keys):
    return [layer.window for layer in config(*args, **keys).layers]


def refused(what, *args, **keys):
    with pytest.raises(ValueError, match=re.escape(what)):
        config(*args, **keys)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json")))
def test_the_older_form_of_the_rotary_keys_means_what_the_newer_one_does(name):
    """Files of transformers 4 and 5; the checkpoints of the tests have the newer form."""
    keys = json.loads((CHECKPOINTS / name / "config.json").read_text())
    newer, older = keys["rope_parameters"], {key: x for key, x in keys.items() if key != "rope_parameters"}
    full, local = newer.get("full_attention", newer), newer.get("sliding_attention")
    scaling = {key: x for key, x in full.items() if key not in ("rope_theta", "partial_rotary_factor")}
    older["rope_theta"] = full["rope_theta"]
    older["rope_scaling"] = None if scaling.get("rope_type") == "default" else scaling
    if "partial_rotary_factor" in full:
        older["partial_rotary_factor"] = full["partial_rotary_factor"]
    if local is not None:
        older["rope_local_base_freq"] = local["rope_theta"]
    assert Config.from_keys(older, 64).layers == Config.from_keys(keys, 64).layers
    assert hash(Config.from_keys(keys, 64)) == hash(Config.from_keys(keys, 64))


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_type": "default"}, None),
        ({"type": "linear", "factor": 4.0}, LinearScaling(4.0)),
        ({"rope_type": "dynamic", "factor": 2.0}, NtkScaling(3.0)),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=128),
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False},
            YarnScaling(factor=4.0, original_context=32, is_rounded=False),
        ),
        (
            {"rope_type": "yarn", "original_max_position_embeddings": 32, "beta_fast": 16, "mscale": 0},
            YarnScaling(factor=4.0, original_context=32, beta_fast=16.0),
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": 1.5},
            YarnScaling(factor=4.0, original_context=128, attention_factor=1.5),
        ),
        (
            {"type": "su", "factor": 1.0, "short_factor": [1, 2, 3, 4], "long_factor": [5, 6, 7, 8]},
            LongRopeScaling(factors=(5.0, 6.0, 7.0, 8.0)),
        ),
    ],
    ids=lambda x: x.get("rope_type", x.get("type")) if isinstance(x, dict) else "",
)
def test_each_rotary_scaling(rope, scaling):
    assert rotaries(max_length=256, rope_scaling=rope) == [Rotary(8, 10000.0, scaling=scaling)] * 4
    assert rotaries(max_length=256, rope_parameters=rope, rope_theta=500.0) == [Rotary(8, 500.0, scaling=scaling)] * 4


def test_the_list_of_longrope_is_chosen_by_the_longest_sequence():
    rope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    keys = {"rope_scaling": rope, "original_max_position_embeddings": 64}
    short, long = (rotaries("phi3", length, **keys)[0].scaling for length in (64, 65))
    assert short.factors == (1.0,) * 4 and long.factors == (4.0,) * 4
    assert short.magnitude == long.magnitude == pytest.approx((1 + 1 / 6) ** 0.5)
    refused("Pass max_length", "phi3", **keys)
    rope["long_factor"] = rope["short_factor"]
    assert rotaries("phi3", **keys)[0].scaling.factors == (1.0,) * 4


def test_windows_of_each_architecture():
    window = {"sliding_window": 9}
    assert windows("llama") == [None] * 4
    assert windows("mistral", **window) == [9] * 4 and windows("mistral", sliding_window=None) == [None] * 4
    assert windows("qwen2", **window) == [None] * 4
    assert windows("qwen2", **window, use_sliding_window=True, max_window_layers=3) == [None] * 3 + [9]
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2}
    assert windows("qwen3", **window, **kinds, use_sliding_window=True) == [9, None] * 2
    assert windows("qwen3", **window, **kinds) == [None] * 4
    assert windows("gemma2", **window) == [9, None] * 2
    assert windows("gemma3_text", **window, sliding_window_pattern=3) == [9, 9, None, 9]
    assert windows("gpt_oss", **window) == [9, None] * 2
    assert windows("phi3", **window) == [9] * 4
    assert windows("smollm3", **window, use_sliding_window=True) == [None] * 3 + [9]


def test_layers_without_rotary_embedding_and_two_bases():
    assert [rotary is None for rotary in rotaries("smollm3")] == [False, False, False, True]
    assert [rotary is None for rotary in rotaries("smollm3", no_rope_layers=[0, 1, 0, 1])] == [True, False] * 2
    local, full = rotaries("gemma3_text", sliding_window_pattern=2, head_dim=8)[:2]
    assert (local.theta, full.theta) == (1e4, 1e6)
    assert rotaries("gpt_oss")[0].scaling == YarnScaling(factor=32.0, original_context=4096, is_rounded=False)
    assert rotaries("phi3", partial_rotary_factor=0.75)[0].rotary_dim == 6


def test_what_an_architecture_adds():
    assert config("qwen2").has_qkv_bias and not config("qwen2").has_output_bias
    gemma = config("gemma2", query_pre_attn_scalar=16)
    assert (gemma.head_dim, gemma.scale, gemma.soft_cap, gemma.logit_cap) == (256, 0.25, 50.0, 30.0)
    assert gemma.is_tied and gemma.norm_offset == 1 and gemma.embedding_scale == pytest.approx(32**0.5)
    assert config("gemma2", attn_logit_softcapping=None).soft_cap is None
    assert config("qwen3").head_dim == 128 and config("qwen3").has_qk_norm
    assert config("llama", num_key_value_heads=None).num_kv_heads == 4
    assert config("gpt_oss").experts.num_experts == 128 and config("gpt_oss").has_sinks


def test_keys_that_would_change_the_model_are_refused_by_name():
    refused("sparsity = 0.5, which is not known of a 'llama' model", sparsity=0.5)
    refused("sliding_window = 9, which is not known of a 'llama' model", sliding_window=9)
    refused("only use_bidirectional_attention = False", "gemma3_text", use_bidirectional_attention=True)
    refused("quant_method = 'gptq'", quantization_config={"quant_method": "gptq"})
    refused("the rotary scaling 'spiral'", rope_scaling={"type": "spiral"})
    refused("the key short_mscale = 1.2", rope_scaling={"type": "linear", "factor": 2.0, "short_mscale": 1.2})
    refused("rope_scaling of config.json must be an object", rope_scaling="linear")
    refused("needs a number for factor; got None", rope_scaling={"type": "linear"})
    refused("rope_theta = 7.0, and 9.0", rope_theta=7.0, rope_parameters={"rope_theta": 9.0})
    refused("keep rope_parameters", rope_parameters={"rope_theta": 9.0}, rope_scaling={"type": "linear", "factor": 2.0})
    refused("beside 'full_attention'", "gemma3_text", rope_parameters={"full_attention": {}, "rope_type": "default"})
    refused("must be one of silu", hidden_act="selu")
    refused("'chunked_attention'", "gemma2", layer_types=["chunked_attention"] * 4)
    refused("num_hidden_layers = 4 entries", "gemma2", layer_types=["full_attention"] * 3)
    refused("which must agree", "gemma2", sliding_window_size=5, sliding_window=6)
    refused("attention_bias of config.json must be true or false", attention_bias="yes")
    refused("model_type = 'mamba'", "mamba")


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("llama", {"rms_norm_eps": "small"}),
        ("llama", {"rope_theta": "1e4"}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": [2.0]}}),
        ("llama", {"rope_scaling": {"type": ["linear"], "factor": 2.0}}),
        ("llama", {"rope_parameters": {"rope_theta": {}}}),
        ("llama", {"num_key_value_heads": 3}),
        ("llama", {"head_dim": 7}),
        ("mistral", {"sliding_window": -1}),
        ("gemma2", {"query_pre_attn_scalar": "256"}),
        ("gemma2", {"layer_types": "full_attention"}),
        ("gemma2", {"layer_types": [["full_attention"]] * 4}),
        ("smollm3", {"no_rope_layer_interval": 0}),
        ("gpt_oss", {"num_local_experts": 2.5}),
        ("phi3", {"partial_rotary_factor": "0.75"}),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}),
    ],
    ids=str,
)
def test_values_of_the_wrong_kind_are_refused(architecture, keys):
    """Most by the name of the key; what only a spec or a rotary embedding can tell, by theirs."""
    with pytest.raises(ValueError):
        layers = config(architecture, **keys)
        [layer.rotary.frequencies for layer in layers.layers]
        layers.spec(layers.layers[0])


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
@pytest.mark.parametrize("value", [None, 0, 2.5, True], ids=repr)
def test_sizes_must_be_there_and_count_something(key, value):
    refused(key, **{key: value})


def test_keys_of_training_and_null_are_left_alone():
    plain = config()
    more = config(attention_dropout=0.1, torch_dtype="bfloat16", use_cache=False, sparsity=None, rope_scaling=None)
    assert more.layers == plain.layers


def test_every_row_reads_no_key_that_it_leaves_alone():
    for name, row in ARCHITECTURES.items():
        assert not row.keys.keys() & row.fixed.keys(), name
