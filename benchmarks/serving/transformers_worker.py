"""A worker that serves a load by the continuous batching of ``transformers``."""

import importlib
from typing import Any

from benchmarks.worker import serve

from .clock import Clock
from .report import report


def load(path: str, dtype: str, threads: int) -> Any:
    """A model from a folder, and what serves a load with its continuous batching."""
    model, torch = loaded(path, dtype, threads)
    transformers: Any = importlib.import_module("transformers")

    def run(arrivals: list, prompts: list, new_tokens: list, slots: int, pages: int, clock: str, how: dict) -> dict:
        settings = {"max_requests_per_batch": slots, "num_blocks": pages, "page_size": 16, **how}
        config = transformers.ContinuousBatchingConfig(**settings)
        rule = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        with (
            torch.inference_mode(),
            model.continuous_batching_context_manager(rule, continuous_batching_config=config) as manager,
        ):
            return _serve(manager, arrivals, prompts, new_tokens, Clock(clock))

    return run


def _serve(manager: Any, arrivals: list, prompts: list, new_tokens: list, clock: Clock) -> dict[str, Any]:
    first, last, tokens, sent = {}, {}, {}, 0
    clock.start()
    while len(last) < len(prompts):
        if len(last) == sent:
            clock.wait(arrivals[sent])
        while sent < len(prompts) and arrivals[sent] <= clock.now():
            manager.add_request(prompts[sent], str(sent), max_new_tokens=new_tokens[sent], streaming=True)
            sent += 1
        result = manager.get_result(timeout=0.02)
        if result is None:
            if not manager.is_running():
                raise RuntimeError(f"continuous batching ended after {len(last)} of {len(prompts)} requests")
            continue
        i = int(result.request_id)
        if result.generated_tokens:
            first.setdefault(i, clock.now())
        if result.is_finished():
            if result.error:
                raise RuntimeError(f"request {i}: {result.error}")
            last[i], tokens[i] = clock.now(), list(result.generated_tokens)
    order = range(len(prompts))
    return report(arrivals, [first[i] for i in order], [last[i] for i in order], [tokens[i] for i in order])


def loaded(path: str, dtype: str, threads: int) -> tuple[Any, Any]:
    """The model in a folder, to be used with so many threads; and ``torch``."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(threads)
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval(), torch


if __name__ == "__main__":
    serve(load)
