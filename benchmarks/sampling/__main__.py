"""Times `sample` and its whole-vocabulary twin in turn, and prints a table: ``python -m benchmarks.sampling``."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paged.runtime import Sampler, sample

TOP_P = 0.95
# By what part of the vocabulary holds the mass: the factor of standard normal logits, at temperature 1.
LOGITS = {"some tens of tokens": 6.0, "some thousands": 2.5, "most of the vocabulary": 0.5}


def main() -> None:
    """Parse, measure, print."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    options.add_argument("--rounds", type=int, default=15, help="times that either is timed (default 15)")
    options.add_argument("--rows", type=int, default=8, help="rows of logits (default 8)")
    options.add_argument("--vocab", type=int, default=49152, help="logits per row (default 49152)")
    given = options.parse_args()
    keys, sampler = jax.random.split(jax.random.key(0), given.rows), Sampler(temperature=1.0, top_p=TOP_P)
    print(f"Milliseconds of CPU per call, *measured* on {jax.devices()[0].device_kind}, jax {jax.__version__}:")
    print(f"medians of {given.rounds} rounds in turn; {given.rows} rows of {given.vocab} logits, top_p={TOP_P}.\n")
    print("| what holds the mass | `sample` | whole vocabulary ranked | ratio |\n|---|---|---|---|")
    for name, factor in LOGITS.items():
        logits = factor * jax.random.normal(jax.random.key(1), (given.rows, given.vocab))
        own, other = jax.jit(lambda logits, keys: sample(logits, sampler, keys)), jax.jit(jax.vmap(draw_from_all))
        pairs = [
            (_milliseconds(own, logits, keys), _milliseconds(other, logits, keys)) for _ in range(given.rounds + 1)
        ]
        ours, theirs = (statistics.median(each) for each in zip(*pairs[1:], strict=True))  # the first round compiles
        ratio = statistics.median(a / b for a, b in pairs[1:])
        print(f"| {name} | {ours:.1f} | {theirs:.1f} | {ratio:.2f} |", flush=True)


def draw_from_all(logits: jax.Array, key: jax.Array) -> jax.Array:
    """One draw by the rule of `Sampler`, with a ranking of all tokens."""
    ranked, ids = jax.lax.top_k(logits, logits.shape[0])
    mass = jax.nn.softmax(ranked)
    is_kept = (jnp.cumsum(mass) - mass < TOP_P) | (jnp.arange(len(ranked)) == 0)
    return ids[jax.random.categorical(key, jnp.where(is_kept, ranked, -jnp.inf))]


def _milliseconds(call: Callable[..., Any], *args: Any) -> float:
    """CPU time of the process, which other work on the machine does not lengthen much."""
    start = time.process_time()
    jax.block_until_ready(call(*args))
    return 1e3 * (time.process_time() - start)


if __name__ == "__main__":
    main()
