"""The child process: one row as a JSON line on standard output."""

import sys

from benchmarks import tpu
from benchmarks.tpu.static import CHIPS

from .candidates import writes
from .row import Row
from .shapes import SHAPES


def main(shape: str, generation: str, candidate: str, timeout: str) -> None:
    """Compile, run the scalar program, print."""
    row, found = Row(shape, generation, candidate), SHAPES[shape]
    tpu.model(row, __package__ or "", float(timeout))
    row.tokens, row.visible_bytes = found.visible_pairs, found.visible_bytes
    row.needed_cycles = found.visible_bytes / CHIPS[generation].bytes_per_cycle
    row.writes = writes(candidate)
    tpu.print_row(row)


if __name__ == "__main__":
    main(*sys.argv[1:])
