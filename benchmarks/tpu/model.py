"""The child process' part: compile one call, run its scalar program, add its kernels up."""

import dataclasses
import json
import re

from . import static
from .own import WRITING
from .row import Row

BUILD = "candidates:build"  # what every benchmark names its builder, `build(candidate, shape, generation)`
_SPILL_UNITS = ("VLOAD:FILL", "VSTORE:SPILL")
_FROM_A_VECTOR = "scalar taken from a vector (zero)"
_ERROR_LENGTH = 300


def model(row: Row, benchmark: str, timeout: float, *, is_run: bool = True) -> None:
    """Fill in what is modelled of the row's call, or the error; without ``is_run`` only what compiling it shows.

    Our kernels that write ask of a vector whether two sequences write to the same rows of a page. In every shape here
    no two do, so that the answer is the zero that the tool takes for such a number, and needs no note.
    """
    kwargs = {"candidate": row.candidate, "shape": row.shape, "generation": row.generation}
    report = static.model(f"{benchmark}.{BUILD}", row.generation, kwargs, is_run=is_run, timeout=timeout)
    row.versions = report.versions
    if not report.ok:
        row.error = _short(report.error)
    elif not report.kernels:
        row.error = "compiled, but to no Pallas kernel"
    else:
        _fill(row, report)


def print_row(row: Row) -> None:
    """One row as a JSON line on standard output."""
    print(json.dumps(dataclasses.asdict(row)), flush=True)


def _fill(row: Row, report: static.Report) -> None:
    """Add up the call's kernels, which run one after the other; of the cores, which run together, the slower counts."""
    unmodelled: list[str] = []
    for kernel in report.kernels:
        runs = kernel.runs
        row.cycles += max((max(run.model_cycles, run.matrix_cycles) for run in runs), default=0)
        row.model_cycles += max((run.model_cycles for run in runs), default=0)
        row.mxu_cycles += max((run.matrix_cycles for run in runs), default=0)
        row.bundles += max((run.issue_cycles for run in runs), default=0)
        row.all_bundles += sum(run.issue_cycles for run in runs)
        row.read_bytes += sum(run.hbm_read_bytes for run in runs)
        row.written_bytes += sum(run.hbm_written_bytes for run in runs)
        row.transfers += sum(run.transfers for run in runs)
        row.spills += sum(run.units.get(unit, 0) for run in runs for unit in _SPILL_UNITS)
        row.cores = max(row.cores, sum(run.hbm_read_bytes > 0 for run in runs))
        row.vmem_bytes = max(row.vmem_bytes, kernel.vmem_bytes)
        notes = [text for run in runs for text in run.unmodelled]
        unmodelled += [text for text in notes if not (row.candidate in WRITING and text.startswith(_FROM_A_VECTOR))]
    row.compile_seconds, row.kernels = report.compile_seconds, [kernel.name for kernel in report.kernels]
    row.other_operations = report.other_operations
    row.note = "; ".join(dict.fromkeys(unmodelled))[:_ERROR_LENGTH]
    _fill_whole(row, report.whole)


def _fill_whole(row: Row, whole: static.Whole | str | None) -> None:
    """The whole call, unless something of it can't be modelled: the row then says what, and has no such figure."""
    if not isinstance(whole, static.Whole):
        row.whole_note = whole or ""
        return
    row.operations, row.estimated_cycles = whole.operations, whole.estimated_cycles
    row.whole_note = "; ".join(whole.unmodelled)[:_ERROR_LENGTH]
    if row.note or whole.unmodelled:
        row.whole_note = row.whole_note or row.note
        return
    row.whole_cycles, row.before_cycles = whole.cycles, whole.before
    row.between_cycles, row.after_cycles = whole.between, whole.after


def _short(error: str) -> str:
    """One line that names the error, without notes on where it was raised."""
    text = " ".join(re.sub(r"\s*\[[\w.]+\.py:\d+ .*$", "", error, flags=re.S).split())
    return text if len(text) <= _ERROR_LENGTH else f"{text[:_ERROR_LENGTH]} ..."
