"""What GGUF files call things, and what Hugging Face calls them: one row for each architecture."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

_SILU = {"hidden_act": "silu"}
_GELU = {"hidden_activation": "gelu_pytorch_tanh"}

# Names of tensors, without "blk.N." and "model.layers.N.". A row of an architecture may say otherwise.
_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

# Metadata of every architecture, and the config's key for it.
COMMON_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}


@dataclasses.dataclass(frozen=True)
class Row:
    """How files of one architecture are read.

    * ``model_type``, ``model_class``: of the config.
    * ``layer``: names of a layer's tensors, where they are not the usual ones.
    * ``keys``: metadata beyond what all architectures have.
    * ``constants``: keys of the config that a file does not say, because all models of the architecture share them.
    * ``has_permuted_heads``: the rows of each head of q and k are interleaved for the other form of rotary embedding.
    * ``norm_offset``: what the file has added to the weights of norms.
    """

    model_type: str
    model_class: str
    layer: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    has_permuted_heads: bool = False
    norm_offset: float = 0.0


ROWS = {
    "llama": Row("llama", "LlamaForCausalLM", constants=_SILU, has_permuted_heads=True),
    "smollm3": Row("smollm3", "SmolLM3ForCausalLM", constants=_SILU, has_permuted_heads=True),
    "qwen2": Row("qwen2", "Qwen2ForCausalLM", constants=_SILU),
    "qwen3": Row("qwen3", "Qwen3ForCausalLM", _HEAD_NORMS, constants=_SILU),
    "phi3": Row(
        "phi3", "Phi3ForCausalLM", {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}, _WINDOW, _SILU
    ),
    "gemma2": Row("gemma2", "Gemma2ForCausalLM", _GEMMA, _WINDOW | _CAPS, _GELU, norm_offset=1.0),
    "gemma3": Row(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _GEMMA | _HEAD_NORMS,
        _WINDOW | {"rope.freq_base_swa": "rope_local_base_freq", "final_logit_softcapping": "final_logit_softcapping"},
        _GELU | {"rope_local_base_freq": 10000.0},
        norm_offset=1.0,
    ),
    "gpt-oss": Row(
        "gpt_oss",
        "GptOssForCausalLM",
        {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
            "ffn_gate_exps": "mlp.experts.gate_proj",
            "ffn_up_exps": "mlp.experts.up_proj",
            "ffn_down_exps": "mlp.experts.down_proj",
        },
        _WINDOW
        | {
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "intermediate_size",
        },
        _SILU | {"swiglu_limit": 7.0},
    ),
}


def hugging_face_name(row: Row, name: str) -> str | None:
    """The name that Hugging Face gives to a tensor, or None where the row knows no such tensor.

    >>> hugging_face_name(ROWS["llama"], "blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    stem, _, suffix = name.rpartition(".")
    if suffix not in ("weight", "bias"):
        return None
    block = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(\w+)", stem)
    if block is None:
        return f"{_MODEL[stem]}.{suffix}" if stem in _MODEL else None
    layer = f"model.layers.{block[1]}"
    if block[2] == "attn_sinks" and row.model_type == "gpt_oss":
        return f"{layer}.self_attn.sinks"
    names = _LAYER | dict(row.layer)
    return f"{layer}.{names[block[2]]}.{suffix}" if block[2] in names else None
