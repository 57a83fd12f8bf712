"""The child process: one row as a JSON line on standard output."""

import dataclasses
import importlib
import json
import re
import sys
from typing import Any

from .measure import TOOL, Row
from .shapes import SHAPES, Shape

_BUILDER = f"{__package__}.candidates:build"
_SPILL_UNITS = ("VLOAD:FILL", "VSTORE:SPILL")
_ERROR_LENGTH = 300


def main(shape: str, generation: str, candidate: str, timeout: str) -> None:
    """Compile, run the scalar program, print."""
    tool = importlib.import_module(TOOL)
    kwargs = {"candidate": candidate, "shape": shape, "generation": generation}
    report = tool.measure(_BUILDER, generation, kwargs, run=True, timeout=float(timeout))
    row = Row(shape, generation, candidate)
    if not report.ok:
        row.error = _short(report.error)
    elif not report.kernels:
        row.error = "compiled, but to no Pallas kernel"
    else:
        _fill(row, report, SHAPES[shape], tool.CHIPS[generation])
    print(json.dumps(dataclasses.asdict(row)), flush=True)


def _fill(row: Row, report: Any, shape: Shape, chip: Any) -> None:
    """Add up the call's kernels, which run one after the other; of the cores, which run together, the slower counts."""
    unmodelled: list[str] = []
    for kernel in report.kernels:
        runs = kernel.runs
        row.cycles += max(max(run.model_cycles, run.mxu_cycles) for run in runs)
        row.bundles += max(run.issue_cycles for run in runs)
        row.read_bytes += sum(run.hbm_read_bytes for run in runs)
        row.written_bytes += sum(run.hbm_write_bytes for run in runs)
        row.transfers += sum(run.dma_starts for run in runs)
        row.spills += sum(run.units.get(unit, 0) for run in runs for unit in _SPILL_UNITS)
        row.cores = max(row.cores, sum(run.hbm_read_bytes > 0 for run in runs))
        row.vmem_bytes = max(row.vmem_bytes, kernel.vmem_bytes)
        unmodelled += [text for run in runs for text in run.unmodelled]
    row.tokens, row.visible_bytes = shape.visible_tokens, shape.visible_bytes
    row.needed_cycles = shape.visible_bytes / chip.bytes_per_cycle
    row.compile_seconds, row.versions = report.compile_s, report.versions
    row.other_operations = report.other_ops
    row.note = "; ".join(dict.fromkeys(unmodelled))[:_ERROR_LENGTH]


def _short(error: str) -> str:
    """One line that names the error, without the tool's notes on where it was raised."""
    text = " ".join(re.sub(r"\s*\[[\w.]+\.py:\d+ .*$", "", error, flags=re.S).split())
    return text if len(text) <= _ERROR_LENGTH else f"{text[:_ERROR_LENGTH]} ..."


if __name__ == "__main__":
    main(*sys.argv[1:])
