"""Write the tiny checkpoints of the tests, with what `transformers` computes from them.

Run it in an environment with `torch` and `transformers`, from the root of the repository:
``python -m tests.models.checkpoints.write``. The versions that wrote the files that are there are in their
``expected.json``. Each folder has a config.json and weights as `transformers` saves them, in bfloat16 so that they are
small, and an ``expected.safetensors`` of what `transformers` computes from them in float32, by its eager attention:
logits of a prompt, the queries, keys and values of each layer as its cache would hold them, and 24 greedy tokens.
"""

import json
import pathlib
import shutil

import torch
import transformers
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).parent
PROMPT_TOKENS, NEW_TOKENS = 18, 24
SIZES = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 8,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 2.5, 4.0],
}
# A class of transformers, and how its configuration differs from `SIZES`. Windows are shorter than the prompt.
MODELS = {
    "llama": ("Llama", {"rope_parameters": _LLAMA3}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "num_attention_heads": 6, "head_dim": None}),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 12}),
    "qwen2": (
        "Qwen2",
        {
            "num_hidden_layers": 3,
            "head_dim": None,
            "hidden_size": 32,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 12, "rope_parameters": _YARN, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"num_hidden_layers": 4, "head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 20}),
    "gemma3": (
        "Gemma3",
        {
            "num_hidden_layers": 7,
            "head_dim": 12,
            "sliding_window": 8,
            "query_pre_attn_scalar": 20,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
            },
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "intermediate_size": 20,
            "sliding_window": 6,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "rope_parameters": {**_YARN, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "head_dim": None, "hidden_size": 32, "pad_token_id": 3}),
    "phi3": (
        "Phi3",
        {
            "head_dim": None,
            "hidden_size": 32,
            "rope_parameters": {**_LONGROPE, "partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 64,
            "sliding_window": 30,
            "pad_token_id": 3,
        },
    ),
}


def model_of(name):
    """A model with random weights, large enough that its layers matter to its logits."""
    kind, changes = MODELS[name]
    facts = {key: value for key, value in {**SIZES, **changes}.items() if value is not None or key == "pad_token_id"}
    config_class = transformers.Gemma3TextConfig if kind == "Gemma3" else getattr(transformers, f"{kind}Config")
    config = config_class(**facts, attn_implementation="eager")
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" in key:
                weight.add_(0.2 * torch.randn_like(weight))
            elif weight.ndim == 1 or "bias" in key or "sinks" in key:
                weight.copy_(0.5 * torch.randn_like(weight))
            else:
                size = 0.2 if "embed" in key and kind.startswith("Gemma") else 1.5
                weight.copy_(torch.randn_like(weight) * (size / weight.shape[-1] ** 0.5))
        for weight in model.parameters():  # not the tables of the rotary embedding, which are no parameters
            weight.copy_(weight.bfloat16().float())
    return model


def expected_of(model, prompt):
    """Logits and greedy tokens, and what each layer gave to its attention."""
    seen, layer_of = {}, {}
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    module = __import__(type(model).__module__, fromlist=["eager_attention_forward"])
    eager = module.eager_attention_forward

    def watched(attention, q, k, v, *args, **kwargs):
        for part, x in zip("qkv", (q, k, v), strict=True):
            seen.setdefault(f"layers.{layer_of[attention]}.{part}", x[0].transpose(0, 1).contiguous().clone())
        return eager(attention, q, k, v, *args, **kwargs)

    for i, layer in enumerate(model.model.layers):
        layer_of[layer.self_attn] = i
    functions.register("watched", watched)
    model.config._attn_implementation = "watched"
    functions_masks = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    functions_masks.register("watched", functions_masks["eager"])
    with torch.no_grad():
        logits = model(prompt[None], use_cache=False).logits[0]
        tokens = prompt
        for _ in range(NEW_TOKENS):
            last = model(tokens[None], use_cache=False).logits[0, -1]
            tokens = torch.cat([tokens, last.argmax()[None]])
        final = model(tokens[None, :-1], use_cache=False).logits[0]
    top = final[len(prompt) - 1 :].topk(2).values
    gap = float((top[:, 0] - top[:, 1]).min())
    return {"prompt": prompt, "logits": logits, "tokens": tokens[len(prompt) :], **seen}, gap


def main():
    for name in MODELS:
        model = model_of(name)
        prompt = torch.randint(3, SIZES["vocab_size"], (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(0))
        expected, gap = expected_of(model, prompt)
        folder = FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        model.config._attn_implementation = "eager"
        model.bfloat16().save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        save_file({key: x.contiguous() for key, x in expected.items()}, folder / "expected.safetensors")
        facts = {
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "smallest gap of a greedy token": round(gap, 4),
        }
        (folder / "expected.json").write_text(json.dumps(facts, indent=2) + "\n")
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name}: {size / 1000:.0f} kB, smallest gap {gap:.4f}, tokens {expected['tokens'].tolist()}")


if __name__ == "__main__":
    main()
