"""`python -m benchmarks.overhead.engine CHECKPOINT`: what the host does for each step of an `Engine`.

The host's time is that of the thread that runs the engine. While the device computes, this thread waits and takes none.
The figures are of steps that decode in every slot.
"""

import argparse
import time
from pathlib import Path

import paged.models
from paged.runtime import Engine


def main() -> None:
    """Print one line of figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a model as paged.models.load reads it")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="that each slot decodes")
    arguments = parser.parse_args()
    slots, tokens = arguments.slots, arguments.tokens
    most = 16 + tokens
    pages = slots * -(-most // 16)
    model, state, _ = paged.models.load(arguments.checkpoint, num_pages=pages, page_size=16)
    engine = Engine(model, state, num_slots=slots, max_tokens=most, chunk_size=16, max_requests=slots)
    engine.warmup()
    for slot in range(slots):
        engine.submit([slot + 1] * 8, tokens)
    for _ in engine.stream():
        if all(handle.tokens for handle in engine._handles.values()):
            break  # every slot decodes
    before, host, wall = engine.stats(), time.thread_time(), time.perf_counter()
    for _ in engine.stream():
        pass
    host, wall, after = time.thread_time() - host, time.perf_counter() - wall, engine.stats()
    steps = after.steps - before.steps
    print(
        f"{slots} slots: {steps} steps in {after.launches - before.launches} launches; {1e3 * wall / steps:.2f} ms per "
        f"step, of the host {1e3 * host / steps:.3f} ms, {100 * host / wall:.1f} %"
    )


if __name__ == "__main__":
    main()
