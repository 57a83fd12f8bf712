"""One row for each architecture: what its config.json leaves out, and which of its keys are read."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

Keys = Mapping[str, Any]

FULL, SLIDING = "full_attention", "sliding_attention"

# Keys that a model of any architecture must have.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# Keys that are read for every architecture, with the values that stand for a key left out.
COMMON: Keys = MappingProxyType(
    {
        **dict.fromkeys(SIZES),
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": None,
        "rope_parameters": None,
        "rope_scaling": None,
        "rope_theta": None,
        "model_type": None,
        "quantization_config": None,
    }
)

# Keys that change nothing of what a model computes when it is served: whatever they say, they are left alone.
INERT = frozenset(
    (
        "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures",
        "attention_dropout", "auto_map", "bos_token_id", "cache_implementation", "dtype", "embd_pdrop", "eos_token_id",
        "finetuning_task", "id2label", "initial_context_length", "initializer_range", "is_llama_config", "label2id",
        "name_or_path", "num_labels", "output_attentions", "output_hidden_states", "output_router_logits",
        "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop", "return_dict", "router_aux_loss_coef",
        "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config",
        "transformers_version", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
    )
)  # fmt: skip

# Keys of which one value means what this library computes. Any other value is refused.
FIXED: Keys = MappingProxyType(
    {
        "add_cross_attention": False,
        "chunk_size_feed_forward": 0,
        "cross_attention_hidden_size": None,
        "is_decoder": False,
        "is_encoder_decoder": False,
        "pruned_heads": {},
        "rope_interleaved": False,
        "tie_encoder_decoder": False,
        "use_mrope": False,
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a model of one ``model_type`` is, besides what its config.json says.

    **Arguments:**

    - `keys`: the keys that it reads besides `COMMON`, with the values that stand for a key left out. A key of `COMMON`
      may have another such value here.
    - `fixed`: keys that are not read, with the one value that they may have.
    - `layer_types`: from the keys, the name of each layer's kind: ``"full_attention"`` or ``"sliding_attention"``.
    - `has_rope`: from the keys, whether each layer has a rotary embedding.
    - `theta`: the base of the rotary embedding, where config.json has none.
    - `local_theta`: the base in sliding layers, where it differs.
    - `rope`: the rotary scaling, where config.json has none.
    - `activation`: the name of the key that names the activation.
    - `qkv_bias`, `output_bias`: whether these projections have a bias: a bool, or the name of the key that says so.
    - `has_qk_norm`, `has_four_norms`, `has_sinks`, `has_experts`: what its layers have.
    - `norm_offset`: what is added to the stored weights of every norm.
    - `is_embedding_scaled`: whether embeddings are multiplied by the root of their size.
    - `is_fused`: whether its checkpoints hold queries, keys and values as one tensor, and gate and up projection too.
    """

    keys: Keys = dataclasses.field(default_factory=dict)
    fixed: Keys = dataclasses.field(default_factory=dict)
    layer_types: Callable[[Keys], list[str]]
    has_rope: Callable[[Keys], list[bool]] = lambda keys: [True] * keys["num_hidden_layers"]
    theta: float = 10000.0
    local_theta: float | None = None
    rope: Keys = dataclasses.field(default_factory=dict)
    activation: str = "hidden_act"
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    has_qk_norm: bool = False
    has_four_norms: bool = False
    has_sinks: bool = False
    has_experts: bool = False
    norm_offset: float = 0.0
    is_embedding_scaled: bool = False
    is_fused: bool = False


def _full(keys: Keys) -> list[str]:
    return [FULL] * keys["num_hidden_layers"]


def _sliding(keys: Keys) -> list[str]:
    return [SLIDING] * keys["num_hidden_layers"]


def _named(otherwise: Callable[[Keys], list[str]]) -> Callable[[Keys], list[str]]:
    """``layer_types`` of config.json, or of a rule where it has none."""
    return lambda keys: otherwise(keys) if keys["layer_types"] is None else keys["layer_types"]


def _every(period: Callable[[Keys], int]) -> Callable[[Keys], list[str]]:
    """Every ``period``-th layer is full, and all others slide."""
    return lambda keys: [FULL if (i + 1) % period(keys) == 0 else SLIDING for i in range(keys["num_hidden_layers"])]


def _upper(keys: Keys) -> list[str]:
    first = keys["max_window_layers"]
    return [SLIDING if keys["use_sliding_window"] and i >= first else FULL for i in range(keys["num_hidden_layers"])]


def _without_rope(keys: Keys) -> list[str]:
    return [SLIDING if keys["use_sliding_window"] and not rope else FULL for rope in _rope_of_smollm3(keys)]


def _rope_of_smollm3(keys: Keys) -> list[bool]:
    count, every = keys["num_hidden_layers"], keys["no_rope_layer_interval"]
    said = keys["no_rope_layers"]
    return [(i + 1) % every != 0 for i in range(count)] if said is None else [bool(x) for x in said[:count]]


_SILU = {"hidden_act": "silu"}
_WINDOWS = {"sliding_window": 4096, "layer_types": None}
_QWEN = {**_SILU, **_WINDOWS, "use_sliding_window": False, "max_window_layers": 28}
_GEMMA = {
    **_WINDOWS,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "sliding_window_size": None,
}
# Some files repeat the activation under the name that other architectures have for it.
_OF_GEMMA = {"use_bidirectional_attention": False, "hidden_act": "gelu_pytorch_tanh"}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture(
            keys={**_SILU, "attention_bias": False, "mlp_bias": False},
            layer_types=_full,
            qkv_bias="attention_bias",
            output_bias="attention_bias",
        ),
        "mistral": Architecture(keys={**_SILU, "sliding_window": 4096}, layer_types=_sliding),
        "qwen2": Architecture(keys=_QWEN, layer_types=_named(_upper), qkv_bias=True),
        "qwen3": Architecture(
            keys={**_QWEN, "head_dim": 128, "attention_bias": False},
            layer_types=_named(_upper),
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            has_qk_norm=True,
        ),
        "gemma2": Architecture(
            keys={**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            fixed=_OF_GEMMA,
            layer_types=_named(_every(lambda keys: 2)),
            activation="hidden_activation",
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            has_four_norms=True,
            norm_offset=1.0,
            is_embedding_scaled=True,
        ),
        "gemma3_text": Architecture(
            keys={
                **_GEMMA,
                "final_logit_softcapping": None,
                "sliding_window_pattern": 6,
                "_sliding_window_pattern": None,
                "rope_local_base_freq": None,
            },
            fixed={**_OF_GEMMA, "attn_logit_softcapping": None},
            layer_types=_named(_every(lambda keys: keys["_sliding_window_pattern"] or keys["sliding_window_pattern"])),
            theta=1e6,
            local_theta=1e4,
            activation="hidden_activation",
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            has_qk_norm=True,
            has_four_norms=True,
            norm_offset=1.0,
            is_embedding_scaled=True,
        ),
        "gpt_oss": Architecture(
            keys={
                **_WINDOWS,
                "sliding_window": 128,
                "head_dim": 64,
                "rms_norm_eps": 1e-5,
                "attention_bias": True,
                "num_local_experts": 128,
                "num_experts_per_tok": 4,
                "experts_per_token": None,
                "swiglu_alpha": 1.702,
                "swiglu_limit": 7.0,
            },
            fixed=_SILU,
            layer_types=_named(_every(lambda keys: 2)),
            theta=150000.0,
            rope={
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            has_sinks=True,
            has_experts=True,
        ),
        "smollm3": Architecture(
            keys={
                **_QWEN,
                "sliding_window": None,
                "no_rope_layers": None,
                "no_rope_layer_interval": 4,
                "attention_bias": False,
                "mlp_bias": False,
                "tie_word_embeddings": True,
            },
            layer_types=_named(_without_rope),
            has_rope=_rope_of_smollm3,
            theta=2e6,
            qkv_bias="attention_bias",
            output_bias="attention_bias",
        ),
        "phi3": Architecture(
            keys={
                **_SILU,
                "sliding_window": None,
                "rms_norm_eps": 1e-5,
                "original_max_position_embeddings": None,
                "partial_rotary_factor": None,
            },
            fixed={
                "attention_bias": False,
                "mlp_bias": False,
                "lm_head_bias": False,
                "full_attn_mod": 1,
                "interpolate_factor": 1,
            },
            layer_types=_sliding,
            is_fused=True,
        ),
    }
)
"""The architectures that `load` reads, by the ``model_type`` of their config.json."""
