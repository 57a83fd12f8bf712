"""A worker that serves by `paged.runtime.generate`."""

from typing import Any

import jax

from benchmarks.worker import Generate, serve
from paged import models
from paged.runtime import generate

_PAGE_SIZE = 16
_PAGES = 400  # of each layer: 6400 tokens


def load(path: str, dtype: str, threads: int) -> Generate:
    """A model from a folder or a GGUF file."""
    del threads  # XLA counts the cores that the process may use
    model, state, _ = models.load(path, num_pages=_PAGES, page_size=_PAGE_SIZE, dtype=dtype)
    model = model.apart()

    def run(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        own: Any = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, state)
        how: dict[str, Any] = {
            "max_new_tokens": new_tokens,
            "num_slots": len(prompts),
            "chunk_size": max(map(len, prompts)),
        }
        return [list(result.tokens) for result in generate(model, own, prompts, **how)]

    return run


if __name__ == "__main__":
    serve(load)
