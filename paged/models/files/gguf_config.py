"""A GGUF file's metadata as the config.json that Hugging Face would have."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from paged.files import Tensor

from .gguf_rows import COMMON_KEYS, Row

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_SCALING = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
# Layers by which two models are told from their smaller kin, whose scale of scores is another.
_SCALE_OF_HIDDEN_SIZE = {"gemma2": 46, "gemma3_text": 62}


def config_of(
    path: pathlib.Path, architecture: str, row: Row, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The config. ``tensors`` are the file's, by its own names.

    Raises ``ValueError``, which names the file and the key, if metadata of the architecture lacks or is not known: a
    key that nobody reads might change what the model computes.
    """
    left = {
        name.removeprefix(f"{architecture}."): value
        for name, value in metadata.items()
        if name.startswith(f"{architecture}.")
    }
    config: dict[str, Any] = {"model_type": row.model_type, "architectures": [row.model_class], **row.constants}
    for name, key in (COMMON_KEYS | dict(row.keys)).items():
        if name in left:
            config[key] = _number(path, f"{architecture}.{name}", left.pop(name))
    lacking = [name for name, key in COMMON_KEYS.items() if key not in config and key != "rope_theta"]
    if lacking:
        raise ValueError(
            f"{path}: metadata {architecture}.{lacking[0]} is missing, and a model cannot be built without."
        )
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise ValueError(f"{path}: tensor 'token_embd.weight' [vocabulary, hidden_size] is missing.")
    config["vocab_size"] = tensors["token_embd.weight"].shape[0]
    if left.pop("vocab_size", config["vocab_size"]) != config["vocab_size"]:
        raise ValueError(f"{path}: metadata {architecture}.vocab_size is not the rows of tensor 'token_embd.weight'.")
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if row.model_type != "qwen2":  # whose biases go without saying
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    for name in ("bos", "eos"):
        if (token := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{name}_token_id"] = token
    _add_heads(path, architecture, config, left)
    _add_rotary(path, config, left, tensors)
    _add_layers(config)
    if left:
        name = f"{architecture}.{min(left)}"
        raise ValueError(f"{path}: metadata {name} = {str(left[min(left)])[:100]} is not known, so its effect is not.")
    return config


def _number(path: pathlib.Path, name: str, value: Any) -> int | float:
    """A number, or what a list of a number for each layer agrees on."""
    one = value[0] if isinstance(value, list) and value and all(of == value[0] for of in value) else value
    if isinstance(one, bool) or not isinstance(one, int | float) or not 0 <= one < 2**53:
        raise ValueError(f"{path}: metadata {name} must be one number, 0 or more; got {str(value)[:100]}.")
    return one


def _add_heads(path: pathlib.Path, architecture: str, config: dict[str, Any], left: dict[str, Any]) -> None:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if not heads or not config["num_key_value_heads"] or not width:
        raise ValueError(f"{path}: metadata {architecture} says that the model has no heads or no width.")
    config["head_dim"] = left.pop("attention.key_length", width // heads)
    if left.pop("attention.value_length", config["head_dim"]) != config["head_dim"]:
        raise ValueError(f"{path}: {architecture}.attention.value_length differs from key_length, which is not served.")
    rotated = left.pop("rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"]:
        config["partial_rotary_factor"] = rotated / config["head_dim"]


def _add_rotary(
    path: pathlib.Path, config: dict[str, Any], left: dict[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """What Hugging Face keeps in ``rope_scaling``, from metadata and from tensors of factors."""
    kind = left.pop("rope.scaling.type", "none")
    scaling = {key: left.pop(name) for name, key in _SCALING.items() if name in left}
    left.pop("rope.scaling.finetuned", None)  # says how the model was trained, not what it computes
    if config["model_type"] == "phi3":
        if "original_max_position_embeddings" in scaling:
            config["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
        if "rope_factors_long.weight" in tensors and "rope_factors_short.weight" in tensors:
            kind = "longrope"
            for length in ("long", "short"):
                scaling[f"{length}_factor"] = tensors[f"rope_factors_{length}.weight"].read().astype(float).tolist()
            said, usual = left.pop("rope.scaling.attn_factor", None), _usual_attention_factor(config)
            if said is not None and not math.isclose(said, usual, rel_tol=1e-6):
                scaling["attention_factor"] = said
        if not config.get("sliding_window"):  # the file says 0 for none
            config["sliding_window"] = None
    if "rope_freqs.weight" in tensors:
        kind, scaling = "llama3", _llama3(path, config, tensors["rope_freqs.weight"].read())
    if config["model_type"] == "gpt_oss":
        scaling["truncate"] = False
    if kind != "none":
        config["rope_scaling"] = {"rope_type": kind, **scaling}


def _usual_attention_factor(config: dict[str, Any]) -> float:
    """What LongRope multiplies the embedding with, where a config does not say: arXiv:2402.13753, section 4.2."""
    trained = config.get("original_max_position_embeddings", 0)
    ratio = config["max_position_embeddings"] / trained if trained > 1 else 1.0
    return math.sqrt(1 + math.log(ratio) / math.log(trained)) if ratio > 1 else 1.0


def _llama3(path: pathlib.Path, config: dict[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """The numbers of llama3's scaling that give a file's factors: the file has only what they came to."""
    scaling = {"factor": float(factors.max()), **_LLAMA3}
    size = config["head_dim"]
    wavelengths = 2 * math.pi * config.get("rope_theta", 10000.0) ** (np.arange(0, size, 2) / size)
    low, high, original = _LLAMA3.values()
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(f"{path}: tensor 'rope_freqs.weight' is not what the scaling of Llama 3 gives.")
    return scaling


def _add_layers(config: dict[str, Any]) -> None:
    """Which layers have windows, and what scales scores: the same for all models of an architecture."""
    kind, layers = config["model_type"], range(config["num_hidden_layers"])
    period = {"gemma2": 2, "gpt_oss": 2, "gemma3_text": 6}.get(kind)
    if period is not None:
        types = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in layers]
        config["layer_types"] = types
    if kind in _SCALE_OF_HIDDEN_SIZE:
        is_of_width = config["num_hidden_layers"] == _SCALE_OF_HIDDEN_SIZE[kind]
        per_head = config["hidden_size"] // config["num_attention_heads"]
        config["query_pre_attn_scalar"] = per_head if is_of_width else config["head_dim"]
    if kind == "smollm3":
        config["no_rope_layers"] = [int((i + 1) % 4 != 0) for i in layers]
