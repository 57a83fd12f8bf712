"""A worker that answers one request after the other by ``model.generate`` of ``transformers``."""

from typing import Any

from benchmarks.worker import serve

from .clock import Clock
from .report import report
from .transformers_worker import loaded


def load(path: str, dtype: str, threads: int) -> Any:
    """A model from a folder, and what answers one request after the other by ``model.generate``."""
    model, torch = loaded(path, dtype, threads)

    def run(arrivals: list, prompts: list, new_tokens: list, slots: int, pages: int, clock: str, how: dict) -> dict:
        del slots, pages, how
        own, last, tokens = Clock(clock), [], []
        own.start()
        for arrival, prompt, n in zip(arrivals, prompts, new_tokens, strict=True):
            own.wait(arrival)
            ids = torch.tensor([prompt])
            rule = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
            with torch.inference_mode():
                drawn = model.generate(ids, attention_mask=torch.ones_like(ids), **rule)
            tokens.append(drawn[0, ids.shape[1] :].tolist())
            last.append(own.now())
        # The answer comes as a whole: its first token with its last.
        return report(arrivals, last, last, tokens)

    return run


if __name__ == "__main__":
    serve(load)
