"""The one command: compiles every candidate for every shape and generation, models it, and prints the tables."""

import argparse
import pathlib
import time

from benchmarks import tpu

from .candidates import is_for, names
from .row import Row
from .shapes import SHAPES
from .tables import floor_ratio, tables

_QUICK_SHAPES = ("llama-512-p16", "window-32k-512-p16", "mixed-p16")
_QUICK_GENERATIONS = ("v5e", "tpu7x")


def main() -> None:
    """Parse, run, print."""
    quick = "three shapes and one's parts, two generations, no peers: under 3 minutes"
    parser = tpu.parser("python -m benchmarks.tpu_prefill", __doc__, quick, list(SHAPES), names())
    parser.add_argument(
        "--show", nargs="+", type=pathlib.Path, help="print the tables of what --json kept; run nothing"
    )
    options = parser.parse_args()
    start = time.perf_counter()
    if options.show:
        rows = _sorted(tpu.rows_of(Row, options.show))
        took = "as it was kept"
    else:
        rows = tpu.measured(Row, __package__ or "", _points(options), options, _outcome)
        took = f"{time.perf_counter() - start:.0f} s"
    print(f"All figures are *modelled*: {tpu.described(rows)}; {took}.\n")
    print(tables(rows))


def _points(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Every (shape, generation, candidate) that was asked for, and those of a mixed batch's parts."""
    shapes = options.only or (_QUICK_SHAPES if options.quick else SHAPES)
    wanted = {*shapes, *(part for name in shapes for part in SHAPES[name].parts)}
    generations = options.generations or (_QUICK_GENERATIONS if options.quick else tpu.GENERATIONS)
    candidates = options.candidates or (list(tpu.OWN) if options.quick else names())
    return [
        (shape, generation, candidate)
        for shape in SHAPES
        if shape in wanted
        for candidate in candidates
        if is_for(candidate, SHAPES[shape])
        for generation in generations
    ]


def _sorted(rows: list[Row]) -> list[Row]:
    """In the order in which they would have been run."""
    known, candidates = list(SHAPES), names()
    rows = [row for row in rows if row.shape in SHAPES and row.candidate in candidates]
    place = lambda row: (
        known.index(row.shape),
        candidates.index(row.candidate),
        tpu.GENERATIONS.index(row.generation),
    )
    return sorted(rows, key=place)


def _outcome(row: Row) -> str:
    ratio = floor_ratio(row)
    return "compiled" if ratio is None else f"{ratio:.2f} times the floor"


if __name__ == "__main__":
    main()
