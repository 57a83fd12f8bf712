"""A worker that serves by ``transformers``, as its users call it: ``model.generate`` over a batch of prompts."""

import importlib
from typing import Any

from benchmarks.worker import Generate, serve


def load(path: str, dtype: str, threads: int) -> Generate:
    """A model from a folder."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    def run(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        how = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        return tokens[:, ids.shape[1] :].tolist()

    return run


if __name__ == "__main__":
    serve(load)
