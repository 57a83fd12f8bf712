"""The command line that the benchmarks share: which rows, where they are kept, what they were compiled by."""

import argparse
import dataclasses
import json
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from .measure import measure
from .row import Row

GENERATIONS = ("v5e", "v5p", "v6e", "tpu7x")

RowT = TypeVar("RowT", bound=Row)


def parser(prog: str, about: str | None, quick: str, shapes: Sequence[str], names: Sequence[str]):
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(prog=prog, description=about)
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--generations", type=_one_of(GENERATIONS), help=f"of {','.join(GENERATIONS)}, by commas")
    made.add_argument("--only", nargs="+", choices=list(shapes), metavar="SHAPE", help=f"of {', '.join(shapes)}")
    made.add_argument("--candidates", nargs="+", choices=list(names), metavar="NAME", help=f"of {'; '.join(names)}")
    made.add_argument("--timeout", type=float, default=600, help="seconds a row may take (default 600)")
    made.add_argument("--json", type=pathlib.Path, help="write every row here")
    return made


def measured(
    row: type[RowT],
    benchmark: str,
    points: Sequence[tuple[str, str, str]],
    options: argparse.Namespace,
    outcome: Callable[[RowT], str],
) -> list[RowT]:
    """Every row that was asked for, announced on stderr and kept as it comes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that the child in hand is ended too
    rows = []
    for i, key in enumerate(points):
        start = time.perf_counter()
        rows.append(measure(row, benchmark, key, options.timeout))
        took, said = time.perf_counter() - start, rows[-1].error or outcome(rows[-1])
        print(f"[{i + 1}/{len(points)}, {took:.0f} s] {', '.join(key)}: {said}", file=sys.stderr)
        if options.json:
            write(rows, options.json)
    return rows


def write(rows: Iterable[Row], path: pathlib.Path) -> None:
    """Keep the rows and the versions that they were compiled by."""
    kept = {"versions": _versions(rows), "rows": [dataclasses.asdict(row) for row in rows]}
    path.write_text(json.dumps(kept, indent=1))


def rows_of(row: type[RowT], paths: Iterable[pathlib.Path]) -> list[RowT]:
    """Rows that were kept; of two of the same candidate, shape and generation the later one."""
    found = [row(**kept) for path in paths for kept in json.loads(path.read_text())["rows"]]
    return list({(r.shape, r.generation, r.candidate): r for r in found}.values())


def described(rows: Iterable[Row]) -> str:
    """What compiled the rows."""
    compiled = [row.versions for row in rows if row.versions and not row.error]
    each = [", ".join(f"{name} {known[name]}" for name in ("jax", "libtpu") if known.get(name)) for known in compiled]
    return f"compiled by {' and by '.join(dict.fromkeys(each))}, no TPU" if each else "nothing compiled"


def _versions(rows: Iterable[Row]) -> dict[str, Any]:
    return next((row.versions for row in rows if row.versions and not row.error), {})


def _one_of(allowed: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(allowed)}")
        return chosen

    return parse
