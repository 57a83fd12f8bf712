"""Times a step of a model whose layers are a list, a `LayerStack`, and a stack ``apart()``, in turn.

``python -m benchmarks.layers``
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .model import inputs, model

# Sequences, rows of each, and their length with these rows.
SHAPES = {"decode, 4 x 256": (4, 1, 256), "decode, 16 x 1024": (16, 1, 1024), "prefill, 128 of 512": (1, 128, 512)}
WAYS = ("list", "stack", "apart")


@dataclasses.dataclass
class Step:
    """A compiled step, its state, and what compiling it took."""

    call: Any
    state: Any
    compile_seconds: float
    temporaries: int

    def run(self) -> float:
        """CPU seconds of one step."""
        start = time.process_time()
        y, self.state = self.call(self.state)
        jax.block_until_ready(y)
        return time.process_time() - start


def main() -> None:
    """Parse, measure, print."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__)
    options.add_argument("--layers", type=int, default=30, help="layers of the model (default 30)")
    options.add_argument("--rounds", type=int, default=15, help="times that each is timed (default 15)")
    options.add_argument("--shape", choices=list(SHAPES), help="one shape (default all)")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], help="one dtype (default both)")
    given = options.parse_args()
    print(f"CPU milliseconds of a step of {given.layers} layers, *measured*, jax {jax.__version__}: medians of")
    print(f"{given.rounds} rounds in which they take turns; a ratio is the median of the rounds' ratios.\n")
    print("| step | dtype | list | stack | apart | stack / list | apart / list | compiling | temporaries |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        for dtype in ("float32", "bfloat16"):
            if name == (given.shape or name) and dtype == (given.dtype or dtype):
                print(row(name, shape, dtype, given.layers, given.rounds), flush=True)


def row(name: str, shape: tuple[int, int, int], dtype: str, num_layers: int, rounds: int) -> str:
    """One line of the table."""
    steps = [compiled(how, shape, jnp.dtype(dtype), num_layers) for how in WAYS]
    for step in steps:
        step.run()
    taken = [[step.run() for step in steps] for _ in range(rounds)]
    listed, stacked, divided = (1e3 * statistics.median(each) for each in zip(*taken, strict=True))
    ratio, other = (statistics.median(each[i] / each[0] for each in taken) for i in (1, 2))
    compiling = ", ".join(f"{step.compile_seconds:.1f}" for step in steps)
    temporaries = ", ".join(f"{step.temporaries / 2**20:.0f}" for step in steps)
    times = f"{listed:.1f} | {stacked:.1f} | {divided:.1f} | {ratio:.3f} | {other:.3f}"
    return f"| {name} | {dtype} | {times} | {compiling} s | {temporaries} MiB |"


def compiled(how: str, shape: tuple[int, int, int], dtype: Any, num_layers: int) -> Step:
    """A step with its state donated, so that pages are written in place."""
    x, batch, num_pages = inputs(*shape, dtype)
    layers, state = model(how, num_layers, num_pages, dtype)
    arrays, static = eqx.partition(layers, eqx.is_array)

    def step(arrays: Any, x: Any, batch: Any, state: Any) -> Any:
        return eqx.combine(arrays, static)(x, batch, state)

    jax.clear_caches()  # else the second way would find what the first one has traced
    # JAX returns arrays before they are computed: CPU time would count what is still being drawn.
    jax.block_until_ready((arrays, x, batch, state))
    start = time.process_time()
    program: Any = jax.jit(step, donate_argnums=3).lower(arrays, x, batch, state).compile()
    seconds = time.process_time() - start
    temporaries = program.memory_analysis().temp_size_in_bytes
    return Step(lambda state: program(arrays, x, batch, state), state, seconds, temporaries)


if __name__ == "__main__":
    main()
