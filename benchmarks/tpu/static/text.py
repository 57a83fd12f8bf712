"""A report as text."""

from collections.abc import Iterable, Iterator, Mapping

from .loops import Loop
from .report import Kernel, Report
from .run import Run
from .whole import Whole

_MIB, _KIB = 2**20, 2**10


def described(report: Report) -> str:
    """A report's figures, one kernel after the other."""
    if not report.ok:
        return f"{report.target} on {report.generation}: not compiled: {report.error}"
    versions = ", ".join(f"{name} {value}" for name, value in report.versions.items())
    arguments = f" {report.kwargs}" if report.kwargs else ""
    lines = [
        f"{report.target}{arguments} on {report.generation}: modelled, compiled in {report.compile_seconds:.1f} s,"
        f" {report.temporary_bytes / _MIB:.1f} MiB of temporaries ({versions})"
    ]
    for kernel in report.kernels:
        lines += _kernel(kernel)
    if report.other_operations:
        others = ", ".join(f"{name} ({bundles})" for name, bundles in report.other_operations)
        lines.append(f"other operations (bundles): {others}")
    if report.whole is not None:
        lines += _whole(report.whole)
    return "\n".join(lines)


def _whole(whole: Whole | str) -> Iterator[str]:
    if isinstance(whole, str):
        yield f"the whole call: NOT MODELLED: {whole}"
        return
    yield (
        f"the whole call: {whole.cycles:.0f} cycles, of which kernels {whole.kernel_cycles:.0f}, XLA before them"
        f" {whole.before:.0f}, between {whole.between:.0f}, after {whole.after:.0f}; {whole.operations} operations,"
        f" by libtpu's estimates {whole.estimated_cycles:.0f}"
    )
    for name, times, cycles, estimate in whole.largest:
        by_libtpu = "none" if estimate is None else f"{estimate:.0f}"
        yield f"  {name} x{times}: {cycles:.0f} cycles, libtpu's estimate {by_libtpu}"
    if whole.unmodelled:
        yield f"  NOT MODELLED: {'; '.join(whole.unmodelled)}"


def _kernel(kernel: Kernel) -> Iterator[str]:
    slots = ", ".join(map(str, kernel.delay_slots))
    yield (
        f"kernel {kernel.name}: {kernel.bundles} bundles, VMEM {kernel.vmem_bytes / _MIB:.2f} MiB"
        f" ({kernel.vmem_spill_bytes / _KIB:.0f} KiB of spills), {kernel.smem_spills} scalars spilled,"
        f" {kernel.transfer_starts} transfers, {kernel.bounds_checks} bounds checks, delay slots {slots or 'none'}"
    )
    if kernel.estimated_cycles is not None:
        yield f"  libtpu's own estimate: {kernel.estimated_cycles} cycles"
    yield f"  uses of units: {_pairs(kernel.units.items())}"
    for loop in kernel.loops:
        yield "  " * loop.depth + _loop(loop)
    for run in kernel.runs:
        yield from _run(run, kernel.capacity)


def _loop(loop: Loop) -> str:
    fullest = sorted(loop.occupancy.items(), key=lambda item: -item[1])[:5]
    return (
        f"loop {loop.name} [{loop.start:#x} to {loop.end:#x}]: {loop.own_bundles} own bundles, {loop.empty} empty,"
        f" path {loop.path_min} to {loop.path_max}, {loop.transfer_starts} transfers, {loop.transfer_waits} waits,"
        f" {loop.units['VLOAD:FILL']} fills, {loop.units['VSTORE:SPILL']} spills; occupancy {_pairs(fullest)};"
        f" lines {_pairs(loop.top_lines[:5])}"
    )


def _run(run: Run, capacity: Mapping[str, int]) -> Iterator[str]:
    occupied = {unit: f"{n / (capacity.get(unit, 1) * run.issue_cycles):.2f}" for unit, n in run.units.items() if n}
    spent = sorted(run.loops.items(), key=lambda item: -item[1][1])[:6]
    read, written = run.hbm_read_bytes / _MIB, run.hbm_written_bytes / _MIB
    yield (
        f"  run on core {run.core}: {run.issue_cycles} cycles issued, {run.model_cycles:.0f} with"
        f" {run.stall_cycles:.0f} of waits for transfers, matrix unit busy {run.matrix_cycles:.0f},"
        f" bytes at the public peak {run.hbm_cycles:.0f}"
    )
    yield (
        f"    {run.transfers} transfers, {read:.2f} MiB read, {written:.2f} MiB written;"
        f" by bytes: {_pairs(run.hbm_sizes[:5])}; started in {run.transfer_bundles} bundles"
    )
    yield f"    loops (iterations, cycles): {', '.join(f'{name} ({n}, {cycles})' for name, (n, cycles) in spent)}"
    yield f"    bundles: {_pairs(run.kinds.items())}; occupancy {_pairs(occupied.items())}"
    classes = sorted(run.classes, key=lambda name: -run.classes[name])
    yield f"    vector instructions: {_pairs((name, run.classes[name]) for name in classes)}"
    yield f"    lines: {_pairs(run.top_lines[:8])}"
    if run.top_waits:
        yield f"    waits: {_pairs(run.top_waits[:4])}"
    if run.unmodelled:
        yield f"    NOT MODELLED: {'; '.join(run.unmodelled)}"


def _pairs(items: Iterable[tuple[object, object]]) -> str:
    return ", ".join(f"{name} {value}" for name, value in items if value)
