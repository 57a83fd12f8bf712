"""Times every call beside its bare twin, in turn, and prints a table: ``python -m benchmarks.overhead``."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from .calls import Pair, pairs


def main() -> None:
    """Parse, measure, print."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    options.add_argument("--rounds", type=int, default=200, help="times that either is timed (default 200)")
    options.add_argument("--calls", type=int, default=40, help="calls each time (default 40)")
    given = options.parse_args()
    print(f"Microseconds a call of the calling thread, *measured* on {jax.devices()[0].device_kind}, jax")
    print(f"{jax.__version__}: first deciles of {given.rounds} rounds of {given.calls} calls, in turn.\n")
    print("| call | itself | bare `jax.jit` | adds |\n|---|---|---|---|")
    for name, pair in pairs().items():
        wrapped, bare = measure(pair, given.rounds, given.calls)
        print(f"| `{name}` | {wrapped:.1f} | {bare:.1f} | {wrapped - bare:.1f} |", flush=True)


def measure(pair: Pair, rounds: int, calls: int) -> tuple[float, float]:
    """Microseconds of the wrapped call and of the bare one, each the first decile: what else the machine does, on the
    same core too, can only add to them."""
    for call in pair:
        jax.block_until_ready(call())
    taken = [(_microseconds(pair.wrapped, calls), _microseconds(pair.bare, calls)) for _ in range(rounds)]
    wrapped, bare = (statistics.quantiles(each, n=10)[0] for each in zip(*taken, strict=True))
    return wrapped, bare


def _microseconds(call: Callable[[], Any], calls: int) -> float:
    """The calling thread's CPU time per call, which other work on the machine does not lengthen much. Results are
    awaited: else calls would queue up, and the later ones wait for those before."""
    start = time.thread_time()
    for _ in range(calls):
        jax.block_until_ready(call())
    return 1e6 * (time.thread_time() - start) / calls


if __name__ == "__main__":
    main()
