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
    options.add_argument("--rounds", type=int, default=60, help="times that either is timed (default 60)")
    options.add_argument("--calls", type=int, default=200, help="calls each time (default 200)")
    given = options.parse_args()
    print(f"Microseconds a call, *measured* on {jax.devices()[0].device_kind}, jax {jax.__version__}: medians of")
    print(
        f"{given.rounds} rounds of {given.calls} calls, in turn; what Python adds is the median of their differences.\n"
    )
    print("| call | itself | bare `jax.jit` | adds |\n|---|---|---|---|")
    for name, pair in pairs().items():
        wrapped, bare, adds = measure(pair, given.rounds, given.calls)
        print(f"| `{name}` | {wrapped:.1f} | {bare:.1f} | {adds:.1f} |", flush=True)


def measure(pair: Pair, rounds: int, calls: int) -> tuple[float, float, float]:
    """Medians of microseconds a call: of the wrapped call, of the bare one, and of the differences a round."""
    for call in pair:
        jax.block_until_ready(call())
    taken = [(_microseconds(pair.wrapped, calls), _microseconds(pair.bare, calls)) for _ in range(rounds)]
    wrapped, bare = zip(*taken, strict=True)
    return statistics.median(wrapped), statistics.median(bare), statistics.median(a - b for a, b in taken)


def _microseconds(call: Callable[[], Any], calls: int) -> float:
    """A call's time, its result awaited: else calls would queue up, and the later ones wait for those before."""
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(call())
    return 1e6 * (time.perf_counter() - start) / calls


if __name__ == "__main__":
    main()
