"""A worker that serves a load by `paged.runtime.Engine`: requests are submitted while others run."""

from typing import Any

import jax

from benchmarks.worker import serve
from paged import models
from paged.runtime import Engine

from .clock import Clock
from .report import report

_PAGE_SIZE = 16


def load(path: str, dtype: str, threads: int) -> Any:
    """A model from a folder or a GGUF file, and what serves a load with it."""
    del threads  # XLA counts the cores that the process may use
    made: dict[int, Any] = {}

    def run(arrivals: list, prompts: list, new_tokens: list, slots: int, pages: int, clock: str, how: dict) -> dict:
        if pages not in made:
            model, state, _ = models.load(path, num_pages=pages, page_size=_PAGE_SIZE, dtype=dtype)
            made[pages] = model.apart(), state
        model, state = made[pages]
        own = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, state)
        most = max(len(prompt) + n for prompt, n in zip(prompts, new_tokens, strict=True))
        engine = Engine(model, own, num_slots=slots, max_tokens=-(-most // 64) * 64, **how)
        return _serve(engine, arrivals, prompts, new_tokens, Clock(clock))

    return run


def _serve(engine: Any, arrivals: list, prompts: list, new_tokens: list, clock: Clock) -> dict[str, Any]:
    handles, first, last, most_pages = [], {}, {}, 0
    clock.start()

    def submit() -> None:
        while len(handles) < len(prompts) and arrivals[len(handles)] <= clock.now():
            i = len(handles)
            handles.append(engine.submit(prompts[i], new_tokens[i]))

    while len(handles) < len(prompts) or not engine.is_idle:
        if engine.is_idle:
            clock.wait(arrivals[len(handles)])
        submit()
        for event in engine.stream():
            now = clock.now()
            first.setdefault(event.request, now)
            last[event.request] = now
            most_pages = max(most_pages, engine.stats().pages_in_use)
            submit()
    stats = engine.stats()
    told = {
        "preemptions": stats.preemptions,
        "reused_tokens": stats.reused_tokens,
        "prompt_tokens": stats.prompt_tokens,
        "steps": stats.steps,
        "most_pages": most_pages,
    }
    tokens = [handle.tokens for handle in handles]
    return report(arrivals, [first[h] for h in handles], [last[h] for h in handles], tokens, **told)


if __name__ == "__main__":
    serve(load)
