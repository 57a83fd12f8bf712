"""GGUF: every architecture comes back as Hugging Face has it; block types; and files that lie."""

import dataclasses

import gguf
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from paged.models import Config, open_checkpoint, open_gguf, unpack_mxfp4

from .gguf_writing import HEADS, INNER, KV_HEADS, LAYERS, NUMBERS, PARTS, hugging_face_weights, write

F32, U32 = gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.UINT32
STRING = gguf.GGUFValueType.STRING
_YARN = {
    "gpt-oss.rope.scaling.type": ("yarn", STRING), "gpt-oss.rope.scaling.factor": (32.0, F32),
    "gpt-oss.rope.scaling.original_context_length": (4096, U32), "gpt-oss.attention.sliding_window": (128, U32),
    "gpt-oss.expert_count": (3, U32), "gpt-oss.expert_used_count": (2, U32),
    "gpt-oss.expert_feed_forward_length": (INNER, U32),
}  # fmt: skip
_GEMMA2 = {
    "gemma2.attention.sliding_window": (64, U32), "gemma2.attn_logit_softcapping": (50.0, F32),
    "gemma2.final_logit_softcapping": (30.0, F32),
}  # fmt: skip
# What a file says beyond the usual numbers, and the config that it must give.
CONFIGS = {
    "llama": ({"llama.vocab_size": (40, U32)}, {"model_type": "llama", "attention_bias": False, "hidden_act": "silu"}),
    "smollm3": ({}, {"model_type": "smollm3", "no_rope_layers": [1, 1]}),
    "qwen2": ({}, {"model_type": "qwen2"}),
    "qwen3": ({}, {"model_type": "qwen3"}),
    "phi3": (
        {"phi3.attention.sliding_window": (0, U32), "phi3.rope.dimension_count": (12, U32),
         "phi3.rope.scaling.original_context_length": (64, U32), "phi3.rope.scaling.attn_factor": (1.25, F32)},
        {"model_type": "phi3", "sliding_window": None, "partial_rotary_factor": 0.75,
         "original_max_position_embeddings": 64,
         "rope_scaling": {"rope_type": "longrope", "long_factor": [2.0] * 6, "short_factor": [1.0] * 6,
                          "attention_factor": 1.25}},
    ),
    "gemma2": (
        _GEMMA2,
        {"model_type": "gemma2", "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16,
         "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 64,
         "hidden_activation": "gelu_pytorch_tanh"},
    ),
    "gemma3": (
        {"gemma3.attention.sliding_window": (64, U32), "gemma3.rope.scaling.type": ("linear", STRING),
         "gemma3.rope.scaling.factor": (8.0, F32)},
        {"model_type": "gemma3_text", "layer_types": ["sliding_attention"] * 2, "rope_local_base_freq": 10000.0,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "gpt-oss": (
        _YARN,
        {"model_type": "gpt_oss", "layer_types": ["sliding_attention", "full_attention"], "num_local_experts": 3,
         "num_experts_per_tok": 2, "sliding_window": 128, "swiglu_limit": 7.0, "attention_bias": True,
         "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
                          "truncate": False}},
    ),
}  # fmt: skip
_LONGROPE = {"rope_factors_long.weight": np.full(6, 2.0, np.float32), "rope_factors_short.weight": np.ones(6, "f4")}


@pytest.mark.parametrize("architecture", PARTS)
def test_an_architecture_comes_back_as_hugging_face_has_it(tmp_path, architecture):
    weights = hugging_face_weights(architecture)
    extra, expected = CONFIGS[architecture]
    tensors = _LONGROPE if architecture == "phi3" else {}
    path = write(tmp_path / "model.gguf", architecture, weights, extra=extra, tensors=tensors)
    opened = open_checkpoint(path)
    expected = NUMBERS | {"tie_word_embeddings": architecture.startswith("gemma")} | expected
    assert {key: opened.config.get(key) for key in expected} == expected
    assert Config.from_keys(opened.config, 64).num_kv_heads == KV_HEADS
    assert opened.weights.keys() == weights.keys()
    for name, array in weights.items():
        tensor = opened.weights[name]
        assert (tensor.name, tensor.shape, tensor.dtype) == (name, array.shape, np.float32)
        np.testing.assert_allclose(tensor.read(), array, atol=1e-6, err_msg=name)  # the 1 of Gemma's norms rounds
        parts = tuple(slice(extent // 4, extent - extent // 4) for extent in array.shape)
        for depth in range(1, array.ndim + 1):
            np.testing.assert_array_equal(tensor.read(parts[:depth]), tensor.read()[parts[:depth]], err_msg=name)


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LONG = {"long_factor": [2.0] * 6, "short_factor": [1.0] * 6}
# What config.json of released models says, beside the usual numbers.
RELEASED = {
    "llama": {"model_type": "llama", "attention_bias": False, "mlp_bias": False, "hidden_act": "silu",
              "rope_scaling": {"rope_type": "llama3", **_LLAMA3}},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 1], "no_rope_layer_interval": 4, "mlp_bias": False,
                "use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 2},
    "qwen2": {"model_type": "qwen2", "max_window_layers": 21, "sliding_window": 32768, "use_sliding_window": False},
    "qwen3": {"model_type": "qwen3", "attention_bias": False, "sliding_window": None, "use_sliding_window": False},
    "phi3": {"model_type": "phi3", "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64,
             "rope_scaling": {"type": "longrope", **_LONG}, "sliding_window": None, "mlp_bias": False},
    "gemma2": {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
               "query_pre_attn_scalar": 16, "sliding_window": 64, "hidden_act": "gelu_pytorch_tanh"},
    "gemma3": {"model_type": "gemma3_text", "query_pre_attn_scalar": 16, "rope_local_base_freq": 10000,
               "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 64,
               "sliding_window_pattern": 6},
    "gpt-oss": {"model_type": "gpt_oss", "attention_bias": True, "num_local_experts": 3, "num_experts_per_tok": 2,
                "experts_per_token": 2, "swiglu_limit": 7.0, "sliding_window": 128,
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                                 "original_max_position_embeddings": 4096, "truncate": False}},
}  # fmt: skip


def _llama3_factors():
    """As transformers computes them: long wavelengths divided, short ones kept, in between both."""
    wavelengths = 2 * np.pi * NUMBERS["rope_theta"] ** (np.arange(8) / 8)
    smooth = (8192 / wavelengths - 1) / 3
    factors = np.where(wavelengths > 8192, 8.0, np.where(wavelengths < 2048, 1.0, 1 / ((1 - smooth) / 8 + smooth)))
    assert len(set(factors)) > 2
    return {"rope_freqs.weight": factors.astype(np.float32)}


@pytest.mark.parametrize("architecture", PARTS)
def test_a_file_means_what_the_released_config_means(tmp_path, architecture):
    tensors = {"phi3": _LONGROPE, "llama": _llama3_factors()}.get(architecture, {})
    extra = dict(CONFIGS[architecture][0])
    if architecture == "phi3":  # what a converter computes
        extra["phi3.rope.scaling.attn_factor"] = (np.sqrt(1 + np.log(2) / np.log(64)), F32)
    path = write(
        tmp_path / "model.gguf", architecture, hugging_face_weights(architecture), extra=extra, tensors=tensors
    )
    released = NUMBERS | {"tie_word_embeddings": architecture.startswith("gemma")} | RELEASED[architecture]
    for longest in (64, 128):
        ours, theirs = (Config.from_keys(keys, longest) for keys in (open_gguf(path).config, released))
        assert dataclasses.replace(ours, source="") == dataclasses.replace(theirs, source="")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "MXFP4"])
def test_blocks_are_dequantised_part_by_part(tmp_path, kind):
    """Also of a tensor whose rows are interleaved."""
    kind, name = gguf.GGMLQuantizationType[kind], "model.layers.0.self_attn.q_proj.weight"
    weights = hugging_face_weights("llama")
    path = write(tmp_path / "model.gguf", "llama", weights, kinds={"blk.0.attn_q.weight": kind})
    tensor = open_gguf(path).weights[name]
    expected = gguf.dequantize(gguf.quantize(weights[name], kind), kind)  # rows are quantised one by one
    np.testing.assert_array_equal(tensor.read().astype(np.float32), expected)
    part = (slice(5, 9), slice(3, 30))
    np.testing.assert_array_equal(tensor.read(part).astype(np.float32), expected[part])
    assert tensor.dtype == tensor.read().dtype and tensor.read((slice(0, 0),)).shape == (0, 32)


def test_the_scaling_of_llama_3_is_read_off_its_factors(tmp_path):
    tensors = _llama3_factors()
    path = write(tmp_path / "model.gguf", "llama", hugging_face_weights("llama"), tensors=tensors)
    opened = open_gguf(path)
    assert opened.config["rope_scaling"] == {"rope_type": "llama3", **_LLAMA3}
    assert not [name for name in opened.weights if "rope" in name]
    tensors["rope_freqs.weight"][-1] = 7
    write(path, "llama", hugging_face_weights("llama"), tensors=tensors)
    with pytest.raises(ValueError, match=r"'rope_freqs.weight' is not what the scaling of Llama 3 gives"):
        open_gguf(path)


UNKNOWN = {
    "key": ({"llama.residual_scale": (0.5, F32)}, {}, r"metadata llama.residual_scale = 0.5 is not known"),
    "tensor": ({}, {"blk.0.attn_extra.weight": np.ones(4, "f4")}, r"tensor 'blk.0.attn_extra.weight' is not one"),
    "part": ({"split.count": (3, gguf.GGUFValueType.UINT16)}, {}, r"it is one of 3 parts"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_refused_by_name(tmp_path, name):
    extra, tensors, message = UNKNOWN[name]
    path = write(tmp_path / "model.gguf", "llama", hugging_face_weights("llama"), extra=extra, tensors=tensors)
    with pytest.raises(ValueError, match=message) as error:
        open_gguf(path)
    assert str(path) in str(error.value)


def test_an_unknown_architecture_and_missing_metadata_are_refused_by_name(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, "llama", hugging_face_weights("llama"))
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"llama", b"mamba"))
    with pytest.raises(ValueError, match=r"general.architecture is 'mamba'; known are llama, smollm3"):
        open_gguf(path)
    path.write_bytes(raw.replace(b"llama.block_count", b"other.block_count"))
    with pytest.raises(ValueError, match=r"metadata llama.block_count is missing"):
        open_gguf(path)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        open_gguf(tmp_path / "other.gguf")


def _replaced(old, new, at=0):
    """A change of a file: the bytes ``at`` so many behind the first ``old`` become ``new``."""

    def change(raw):
        place = raw.index(old) + at
        return raw[:place] + new + raw[place + len(new) :]

    return change


_HUGE = (1 << 63).to_bytes(8, "little")
_NAME = b"blk.0.attn_q.weight"  # then dimensions, 4 bytes; shape, 8 each; type, 4; offset, 8
HOSTILE = {
    "no magic": (_replaced(b"GGUF", b"GGML"), r"begins with b'GGML'"),
    "version": (_replaced(b"GGUF", (9).to_bytes(4, "little"), 4), r"GGUF of version 9"),
    "big-endian": (_replaced(b"GGUF", (3).to_bytes(4, "big"), 4), r"Its numbers are big-endian"),
    "negative tensor count": (_replaced(b"GGUF", b"\xff" * 8, 8), r"number of tensors is 18446744073709551615"),
    "negative metadata count": (_replaced(b"GGUF", _HUGE, 16), r"number of metadata entries is 92233"),
    "one tensor too many": (_replaced(b"GGUF", (1000).to_bytes(8, "little"), 8), r"cut off|lies|UTF-8|past"),
    "long name": (_replaced(b"llama.block_count", _HUGE, -8), r"length of a name of metadata"),
    "type of metadata": (_replaced(b"llama.block_count", b"\x63\0\0\0", 17), r"has the type 99"),
    "long list": (_replaced(b"a.list", _HUGE, 6 + 4 + 4), r"length of metadata 'a.list' is 9223372036854775808"),
    "list of lists": (_replaced(b"a.list", b"\x09", 6 + 4), r"'a.list' is a list of the type 9"),
    "alignment": (_replaced(b"general.alignment", b"\x07", 17 + 4), r"general.alignment must be a power of two; got 7"),
    "dimensions": (_replaced(_NAME, b"\xff", 19), r"tensor 'blk.0.attn_q.weight' has 255 dimensions"),
    "negative extent": (_replaced(_NAME, _HUGE, 19 + 4), r"tensor 'blk.0.attn_q.weight' of F32 and shape .* has"),
    "product that overflows": (
        _replaced(_NAME, (1 << 33).to_bytes(8, "little") * 2, 19 + 4), r"tensor 'blk.0.attn_q.weight' of F32 and shape",
    ),
    "empty": (_replaced(_NAME, bytes(8), 19 + 4), r"'blk.0.attn_q.weight' has shape .*, and no extent may be 0"),
    "block type": (_replaced(_NAME, b"\xc8", 19 + 4 + 16), r"'blk.0.attn_q.weight' has the block type 200"),
    "rows of no block": (_replaced(_NAME, b"\x0c", 19 + 4 + 16), r"has rows of 32 numbers, no multiple of its block"),
    "offset past the end": (_replaced(_NAME, _HUGE, 19 + 4 + 16 + 4), r"'blk.0.attn_q.weight'"),
    "offset unaligned": (_replaced(_NAME, b"\x01", 19 + 4 + 16 + 4), r"which must be a multiple of 32"),
    "overlap": (_replaced(_NAME, bytes(8), 19 + 4 + 16 + 4), r"begins at byte .* and overlaps"),
    "a name twice": (_replaced(_NAME, b"blk.0.attn_k.weight"), r"tensor 'blk.0.attn_k.weight' is listed twice"),
    "a key twice": (_replaced(b"b.number", b"c.number"), r"metadata 'c.number' stands twice"),
    "no UTF-8": (_replaced(b"b.number", b"\xff"), r"a name of metadata is no UTF-8"),
}  # fmt: skip


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """The bytes of a file that is read."""
    writer_extra = {
        "general.alignment": (32, U32), "a.list": ([1, 2, 3], gguf.GGUFValueType.ARRAY), "b.number": (1, U32),
        "c.number": (1, U32),
    }  # fmt: skip
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write(path, "llama", hugging_face_weights("llama"), extra=writer_extra)
    assert open_gguf(path).metadata["a.list"] == [1, 2, 3]
    return path.read_bytes()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_lies_is_refused_by_name(tmp_path, honest, name):
    change, message = HOSTILE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(change(honest))
    assert path.stat().st_size == len(honest) and path.read_bytes() != honest
    with pytest.raises(ValueError, match=message) as error:
        open_gguf(path)
    assert str(path) in str(error.value)


def test_every_file_that_is_cut_short_is_refused(tmp_path, honest):
    path = tmp_path / "model.gguf"
    for length in [*range(0, 100, 7), *range(100, len(honest), 4999), len(honest) - 1]:
        path.write_bytes(honest[:length])
        with pytest.raises(ValueError, match=r"model\.gguf"):
            open_gguf(path)


@hypothesis.given(st.data())
def test_any_change_of_a_header_is_read_or_refused_by_name(honest, tmp_path_factory, data):
    raw = bytearray(honest)
    end = honest.index(b"output_norm.weight")
    for _ in range(data.draw(st.integers(1, 3))):
        new = data.draw(st.sampled_from([b"\xff" * 8, bytes(8), _HUGE]) | st.binary(min_size=1, max_size=2))
        place = data.draw(st.integers(0, end))
        raw[place : place + len(new)] = new
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.unlink(missing_ok=True)  # what is mapped stays as it is
    path.write_bytes(raw)
    try:
        weights = open_gguf(path).weights
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert all(tensor.read().shape == tensor.shape for tensor in weights.values())


def test_mxfp4_is_unpacked_as_the_format_says():
    """Against the package's dequantiser, which wants a block's scale before it and its numbers in another order."""
    draw = np.random.default_rng(0)
    blocks = draw.integers(0, 256, (LAYERS, HEADS, KV_HEADS, 16), np.uint8)
    scales = draw.integers(110, 140, (LAYERS, HEADS, KV_HEADS), np.uint8)
    got = unpack_mxfp4(blocks, scales)
    nibbles = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    theirs = np.concatenate([scales[..., None], nibbles[..., :16] | nibbles[..., 16:] << 4], axis=-1)
    expected = gguf.dequantize(theirs.reshape(-1, 17), gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(got.reshape(-1, 32), expected)
    assert np.isnan(unpack_mxfp4(blocks[0, 0], np.full(KV_HEADS, 255, np.uint8))).all()
    assert unpack_mxfp4(np.full((1, 16), 0x22, np.uint8), np.array([0], np.uint8))[0] == 2.0**-127
    with pytest.raises(TypeError, match="blocks and scales must be uint8"):
        unpack_mxfp4(blocks.astype(np.int32), scales)
    with pytest.raises(ValueError, match=r"blocks must be \[..., blocks, 16\]"):
        unpack_mxfp4(blocks[..., :8], scales)
