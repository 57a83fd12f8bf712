"""The child process: one row as a JSON line on standard output."""

import sys

from benchmarks import tpu
from benchmarks.tpu.static import CHIPS, Chip

from .candidates import writes
from .row import Row
from .shapes import SHAPES, Shape

_TOO_LONG, _HANGS = "emulation limit", "would hang"  # in the notes of a run


def main(shape: str, generation: str, candidate: str, timeout: str) -> None:
    """Compile, run the scalar program, print."""
    row, found = Row(shape, generation, candidate), SHAPES[shape]
    tpu.model(row, __package__ or "", float(timeout), is_run=found.is_emulated)
    chip = CHIPS[generation]
    row.pairs, row.visible_bytes = found.q_heads * found.visible_pairs, found.needed_bytes
    row.floor_cycles = row.pairs * cycles_a_pair(found, chip)
    row.needed_cycles = found.needed_bytes / chip.bytes_per_cycle
    row.is_emulated = found.is_emulated and _TOO_LONG not in row.note
    if _HANGS in row.note:  # the time line means nothing then; what is issued still does
        row.cycles = max(row.bundles, row.mxu_cycles)
    row.writes = writes(candidate)
    tpu.print_row(row)


def cycles_a_pair(shape: Shape, chip: Chip) -> float:
    """Matrix-unit cycles of a (query row, KV token) pair of one query head: its score and its share of the output.

    Either product has the head's dim as a side of the stationary tile, which is as deep as the unit whatever of it is
    filled: so 128 of a head's dim or 64 cost the same, and on a unit of 256 so do 256.
    """
    depth = -(-shape.head_dim // chip.mxu_size) * chip.mxu_size
    return 2 * depth / (chip.mxus * chip.mxu_size**2 * chip.rows_per_cycle)


if __name__ == "__main__":
    main(*sys.argv[1:])
