"""`model`: compile a call without a TPU and report what its Pallas kernels would cost on one."""

import dataclasses
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

from .bundles import Bundle, count_bundles, parse_bundles
from .chips import CHIPS
from .compiling import Target, compile_with_dumps, target_name
from .dumps import Dumps, Operation, kernel_name
from .flow import Program
from .loops import Loop, loops_of
from .overlays import delay_slots
from .run import Run, run_program
from .transfers import TransferModel
from .units import parse_utilization, total
from .whole import Whole, whole_call

_VERSIONS = ("jax", "libtpu", "kind", "num_cores")


@dataclasses.dataclass
class Kernel:
    """One Pallas kernel of the compiled program. Counts are exact for the program, and static: of all its paths.

    ``vmem_bytes`` is the VMEM that it may use, windows, scratch and spills. ``capacity`` has a unit's slots per bundle,
    ``units`` its uses. A checked transfer has two ``bounds_checks``. ``delay_slots`` are the different numbers of its
    branches. ``estimated_cycles`` is libtpu's own figure, if it was asked for. ``runs`` has one run per core, if the
    scalar program was run.
    """

    name: str
    bundles: int
    vmem_bytes: int
    vmem_spill_bytes: int
    smem_spills: int
    capacity: dict[str, int]
    units: dict[str, int]
    transfer_starts: int
    bounds_checks: int
    delay_slots: list[int]
    loops: list[Loop]
    estimated_cycles: int | None
    runs: list[Run] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Report:
    """One call, compiled for one generation. ``error`` says why there are no kernels.

    ``other_operations`` are XLA's beside the kernels, by name and size in bundles. ``whole`` is the call with them, if
    its scalar programs were run, or says why it could not be modelled.
    """

    ok: bool
    error: str
    target: str
    generation: str
    kwargs: dict[str, Any]
    compile_seconds: float
    versions: dict[str, Any]
    kernels: list[Kernel]
    other_operations: list[tuple[str, int]]
    whole: Whole | str | None = None
    temporary_bytes: int = 0  # of device memory, beside arguments and results


def model(
    target: Target,
    generation: str,
    kwargs: Mapping[str, Any] | None = None,
    *,
    is_run: bool = False,
    only: str = "",
    transfers: TransferModel | None = None,
    simulate: bool = False,
    flags: str = "",
    timeout: float = 1800,
    keep: pathlib.Path | None = None,
) -> Report:
    """Compile a call for a TPU generation and report on its Pallas kernels.

    **Arguments:**

    - `target`: a builder, ``"file.py:name"``, ``"module:name"`` or a function of a module. It is called in another
      process and returns ``(function, args)``. ``args`` has a `jax.ShapeDtypeStruct` for each array; integers may be
      concrete arrays, and then the kernels' scalars are followed from them.
    - `generation`: one of `CHIPS`.
    - `kwargs`: the builder's arguments; JSON can hold them.
    - `is_run`: whether the kernels' scalar programs are run, which takes seconds for a million bundles.
    - `only`: a pattern that the names of the kernels to run contain.
    - `transfers`: the model of transfers; by default libtpu's own for the generation.
    - `simulate`: whether libtpu estimates cycles itself; it crashes on some kernels.
    - `flags`: more of libtpu's flags.
    - `timeout`: seconds for compiling.
    - `keep`: where the dumps stay. What this folder held is deleted.

    **Returns:** the report. An error of the builder or of the compiler is in it; no kernel, no error.
    """
    folder = pathlib.Path(tempfile.mkdtemp(prefix="tpu_static_")) if keep is None else keep.resolve()
    if keep is not None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        compiled = compile_with_dumps(
            target, generation, kwargs or {}, folder, scalars=is_run, simulate=simulate, flags=flags, timeout=timeout
        )
        found = (
            read_dumps(folder, generation, is_run=is_run, only=only, transfers=transfers)
            if compiled.ok
            else ([], [], None)
        )
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    versions = {name: compiled.info.get(name) for name in _VERSIONS}
    return Report(
        compiled.ok,
        compiled.error,
        target_name(target),
        generation,
        dict(kwargs or {}),
        compiled.seconds,
        versions,
        *found,
        compiled.info.get("temporary_bytes", 0),
    )


def read_dumps(
    folder: pathlib.Path,
    generation: str,
    *,
    is_run: bool = False,
    only: str = "",
    transfers: TransferModel | None = None,
) -> tuple[list[Kernel], list[tuple[str, int]], Whole | str | None]:
    """``(kernels, other operations, the whole call)`` of dumps that were kept. The arguments are `model`'s."""
    dumps, kernels, others = Dumps(folder), [], []
    scalars = dumps.scalars()
    for operation in dumps.operations():
        if not operation.is_kernel:
            others.append((operation.name, count_bundles(operation.bundles)))
            continue
        inputs = _inputs(operation.name, scalars) if is_run and re.search(only, operation.name) else None
        kernels.append(_kernel(operation, dumps, generation, inputs, transfers))
    return kernels, others, _whole(dumps, kernels, generation, transfers) if is_run else None


def _whole(dumps: Dumps, kernels: list[Kernel], generation: str, transfers: TransferModel | None) -> Whole | str:
    unknown = [kernel.name for kernel in kernels if not kernel.runs]
    if unknown:
        return f"{', '.join(unknown)} was not run"
    cycles = {k.name: max(max(run.model_cycles, run.matrix_cycles) for run in k.runs) for k in kernels}
    return whole_call(dumps, CHIPS[generation], cycles, transfers)


def _kernel(
    operation: Operation,
    dumps: Dumps,
    generation: str,
    inputs: Mapping[int, Any] | None,
    transfers: TransferModel | None,
) -> Kernel:
    """One kernel's report; it is run where ``inputs`` are given."""
    chip = CHIPS[generation]
    bundles = parse_bundles(operation.bundles)
    capacity, rows = parse_utilization(operation.utilization)
    slots = delay_slots(bundles, chip.delay_slots, dumps.assembly)
    program = Program(bundles, slots)
    loops = loops_of(program, capacity, rows)
    return Kernel(
        operation.name,
        len(bundles),
        *dumps.vmem.get(operation.name, (0, 0)),
        dumps.smem_spills.get(operation.name, 0),
        capacity,
        total(rows, [1] * len(rows)),
        sum(instruction.starts_transfer for bundle in bundles for instruction in bundle.instructions),
        _count(bundles, "shalt"),
        sorted(set(slots.values())),
        loops,
        dumps.estimates.get(operation.name),
        [] if inputs is None else run_program(program, rows, loops, inputs, chip, transfers),
    )


def _count(bundles: list[Bundle], opcode: str) -> int:
    return sum(i.opcode.startswith(opcode) for bundle in bundles for i in bundle.instructions)


def _inputs(operation: str, scalars: list[tuple[str, dict[int, Any]]]) -> dict[int, Any]:
    """A kernel's integer operands, taken from the list: by its name, or else those of the first call that is left.

    Operations have no better link to the calls that they were made of than their names and their order.
    """
    name = kernel_name(operation)
    place = next((i for i, (other, _) in enumerate(scalars) if other == name), 0)
    return scalars.pop(place)[1] if scalars else {}
