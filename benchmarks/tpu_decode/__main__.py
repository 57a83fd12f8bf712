"""The one command: compiles every candidate for every shape and generation, models it, and prints the tables."""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import sys
import time
from typing import Any

from .candidates import CEILING, is_for, names
from .measure import TOOL, Row, measure
from .shapes import SHAPES
from .tables import tables

GENERATIONS = ("v5e", "v5p", "v6e", "tpu7x")
_QUICK_SHAPES, _QUICK_GENERATIONS = ("llama-p16", "window-d64-p16"), ("v5e", "tpu7x")
# Half a minute to six minutes of compiling a row, and a variant that says little more.
_LEFT_OUT = ("JAX ragged_paged_attention", "tpu-inference RPA v3 hd64", "tpu-inference RPA v3, read only")


def main() -> None:
    """Parse, run, print."""
    options = _parser().parse_args()
    if options.tool is not None:
        path = [str(options.tool.resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
        sys.path.insert(0, path[0])
    if importlib.util.find_spec(TOOL) is None:
        raise SystemExit(f"{TOOL}.py is not importable: name it by --tool PATH, or put its folder into PYTHONPATH.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that the child in hand is ended too
    start = time.perf_counter()
    rows = _rows(options)
    versions = next((row.versions for row in rows if row.versions), {})
    print(f"All figures are *modelled*: {_described(versions)}; {time.perf_counter() - start:.0f} s.\n")
    print(tables(rows))
    if options.json:
        kept = {"versions": versions, "rows": [dataclasses.asdict(row) for row in rows]}
        options.json.write_text(json.dumps(kept, indent=1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_decode", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two shapes, two generations, no slow peers: 2 minutes")
    parser.add_argument("--generations", type=_one_of(GENERATIONS), help=f"of {','.join(GENERATIONS)}, by commas")
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--candidates", nargs="+", choices=names(), metavar="NAME", help=f"of {'; '.join(names())}")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a row may take (default 600)")
    parser.add_argument("--json", type=pathlib.Path, help="write every row here")
    parser.add_argument("--tool", type=pathlib.Path, help=f"path of {TOOL}.py, when it isn't importable")
    return parser


def _one_of(allowed: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(allowed)}")
        return chosen

    return parse


def _rows(options: argparse.Namespace) -> list[Row]:
    """Every row that was asked for, announced on stderr as it comes."""
    shapes = options.only or (_QUICK_SHAPES if options.quick else SHAPES)
    generations = options.generations or (_QUICK_GENERATIONS if options.quick else GENERATIONS)
    candidates = options.candidates or [name for name in names() if not (options.quick and name in _LEFT_OUT)]
    if CEILING not in candidates:
        candidates = [CEILING, *candidates]  # the others are shares of it
    points = [
        (shape, generation, candidate)
        for shape in shapes
        for candidate in candidates
        if is_for(candidate, SHAPES[shape])
        for generation in generations
    ]
    rows = []
    for i, (shape, generation, candidate) in enumerate(points):
        start = time.perf_counter()
        row = measure(shape, generation, candidate, options.timeout)
        outcome = row.error or f"{100 * row.needed_cycles / row.cycles:.1f} % of HBM bandwidth"
        seconds = time.perf_counter() - start
        print(
            f"[{i + 1}/{len(points)}, {seconds:.0f} s] {shape}, {generation}, {candidate}: {outcome}", file=sys.stderr
        )
        rows.append(row)
    return rows


def _described(versions: dict[str, Any]) -> str:
    known = [f"{name} {versions[name]}" for name in ("jax", "libtpu") if versions.get(name)]
    return f"compiled by {', '.join(known)}, no TPU" if known else "nothing compiled"


if __name__ == "__main__":
    main()
