"""The one command: compiles every candidate for every shape and generation, models it, and prints the tables."""

import argparse
import time

from benchmarks import tpu

from .candidates import CEILING, is_for, names
from .row import Row
from .shapes import SHAPES
from .tables import tables

_QUICK_SHAPES, _QUICK_GENERATIONS = ("llama-p16", "window-d64-p16"), ("v5e", "tpu7x")
# Half a minute to six minutes of compiling a row, and a variant that says little more.
_LEFT_OUT = ("JAX ragged_paged_attention", "tpu-inference RPA v3 hd64", "tpu-inference RPA v3, read only")


def main() -> None:
    """Parse, run, print."""
    quick = "two shapes, two generations, no slow peers: 2 minutes"
    options = tpu.parser("python -m benchmarks.tpu_decode", __doc__, quick, list(SHAPES), names()).parse_args()
    start = time.perf_counter()
    rows = tpu.measured(Row, __package__ or "", _points(options), options, _outcome)
    print(f"All figures are *modelled*: {tpu.described(rows)}; {time.perf_counter() - start:.0f} s.\n")
    print(tables(rows))


def _points(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Every (shape, generation, candidate) that was asked for."""
    shapes = options.only or (_QUICK_SHAPES if options.quick else SHAPES)
    generations = options.generations or (_QUICK_GENERATIONS if options.quick else tpu.GENERATIONS)
    candidates = options.candidates or [name for name in names() if not (options.quick and name in _LEFT_OUT)]
    if CEILING not in candidates:
        candidates = [CEILING, *candidates]  # the others are shares of it
    return [
        (shape, generation, candidate)
        for shape in shapes
        for candidate in candidates
        if is_for(candidate, SHAPES[shape])
        for generation in generations
    ]


def _outcome(row: Row) -> str:
    return f"{100 * row.needed_cycles / row.cycles:.1f} % of HBM bandwidth"


if __name__ == "__main__":
    main()
