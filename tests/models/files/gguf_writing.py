"""GGUF files of tiny models, written by the package `gguf` by the rules that converters follow."""

import gguf
import numpy as np

LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH, INNER, WORDS, EXPERTS = 2, 4, 2, 16, 32, 64, 40, 3
NUMBERS = {
    "max_position_embeddings": 128, "num_hidden_layers": LAYERS, "hidden_size": WIDTH, "intermediate_size": INNER,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-6, "rope_theta": 5e5,
    "vocab_size": WORDS, "head_dim": HEAD_DIM,
}  # fmt: skip
_SHAPES = {
    "q_proj": (HEADS * HEAD_DIM, WIDTH), "k_proj": (KV_HEADS * HEAD_DIM, WIDTH), "v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
    "o_proj": (WIDTH, HEADS * HEAD_DIM), "gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH),
    "down_proj": (WIDTH, INNER), "qkv_proj": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, WIDTH),
    "gate_up_proj": (2 * INNER, WIDTH), "q_norm": (HEAD_DIM,), "k_norm": (HEAD_DIM,), "router": (EXPERTS, WIDTH),
}  # fmt: skip
_SELF, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_GEMMA_NORMS = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_TO_GGUF = {
    "input_layernorm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "qkv_proj": "attn_qkv", "gate_up_proj": "ffn_up", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
    "down_proj": "ffn_down", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "router": "ffn_gate_inp",
    "post_attention_layernorm": "ffn_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
# Of each architecture: parts of the attention, of the MLP, norms, and which parts have biases.
PARTS = {
    "llama": (_SELF, _MLP, _NORMS, ()),
    "smollm3": (_SELF, _MLP, _NORMS, ()),
    "qwen2": (_SELF, _MLP, _NORMS, ("q_proj", "k_proj", "v_proj")),
    "qwen3": ((*_SELF, "q_norm", "k_norm"), _MLP, _NORMS, ()),
    "phi3": (("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj"), _NORMS, ()),
    "gemma2": (_SELF, _MLP, _GEMMA_NORMS, ()),
    "gemma3": ((*_SELF, "q_norm", "k_norm"), _MLP, _GEMMA_NORMS, ()),
    "gpt-oss": (_SELF, ("router",), _NORMS, (*_SELF, "router")),
}


def hugging_face_weights(architecture, words=WORDS):
    """Random float32 weights under Hugging Face's names."""
    draw = np.random.default_rng(0)
    attention, mlp, norms, biased = PARTS[architecture]
    shapes = {"model.embed_tokens.weight": (words, WIDTH), "model.norm.weight": (WIDTH,)}
    if architecture not in ("gemma2", "gemma3"):
        shapes["lm_head.weight"] = (words, WIDTH)
    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        shapes |= {f"{layer}.self_attn.{part}.weight": _SHAPES[part] for part in attention}
        shapes |= {f"{layer}.mlp.{part}.weight": _SHAPES[part] for part in mlp}
        shapes |= {f"{layer}.{norm}.weight": (WIDTH,) for norm in norms}
        for part in biased:
            room = "self_attn" if part in attention else "mlp"
            shapes[f"{layer}.{room}.{part}.bias"] = _SHAPES[part][:1]
        if architecture == "gpt-oss":
            experts = f"{layer}.mlp.experts"
            shapes[f"{layer}.self_attn.sinks"] = (HEADS,)
            shapes |= {f"{experts}.gate_up_proj": (EXPERTS, WIDTH, 2 * INNER)}
            shapes |= {f"{experts}.gate_up_proj_bias": (EXPERTS, 2 * INNER)}
            shapes |= {f"{experts}.down_proj": (EXPERTS, INNER, WIDTH), f"{experts}.down_proj_bias": (EXPERTS, WIDTH)}
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _converted(architecture, name, array):
    """What a converter writes for one tensor: pairs of a name and an array."""
    if not name.startswith("model.layers."):
        stem = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[name[:-7]]
        yield f"{stem}.weight", array + (architecture.startswith("gemma") and "norm" in name)
        return
    _, _, layer, *parts = name.split(".")
    if "experts" in parts:
        suffix = "bias" if parts[-1].endswith("_bias") else "weight"
        array = array.swapaxes(1, 2) if array.ndim == 3 else array
        if parts[-1].startswith("down"):
            yield f"blk.{layer}.ffn_down_exps.{suffix}", array
        else:
            yield f"blk.{layer}.ffn_gate_exps.{suffix}", array[:, 0::2]
            yield f"blk.{layer}.ffn_up_exps.{suffix}", array[:, 1::2]
        return
    if parts[-1] == "sinks":
        yield f"blk.{layer}.attn_sinks.weight", array
        return
    stem = _TO_GGUF[parts[-2]]
    if parts[-2] == "post_attention_layernorm" and (architecture.startswith("gemma") or architecture == "gpt-oss"):
        stem = "post_attention_norm"
    if architecture in ("llama", "smollm3") and parts[-2] in ("q_proj", "k_proj"):
        heads = HEADS if parts[-2] == "q_proj" else KV_HEADS
        array = array.reshape(heads, 2, HEAD_DIM // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    yield f"blk.{layer}.{stem}.{parts[-1]}", array + (architecture.startswith("gemma") and "norm" in parts[-2])


def write(path, architecture, weights, *, kinds=None, extra=None, tensors=None):
    """A file of these weights. ``kinds``: the block type of a tensor by the file's name. ``extra``: more metadata."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(NUMBERS["max_position_embeddings"])
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(NUMBERS["rms_norm_eps"])
    writer.add_rope_freq_base(NUMBERS["rope_theta"])
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    for name, (value, kind) in (extra or {}).items():
        writer.add_key_value(name, value, kind)
    arrays = dict(pair for name, array in weights.items() for pair in _converted(architecture, name, array))
    for name, array in (arrays | (tensors or {})).items():
        kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
