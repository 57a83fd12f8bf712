"""`Whole`: what a whole call takes, its kernels and every operation of XLA around them."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from paged.lower import operations_of

from .alike import Alike
from .bundles import OWN, parse_bundles
from .chips import Chip
from .dumps import Dumps
from .emulator import Emulator
from .flow import Program
from .overlays import inlined_slots
from .toplevel import Call, TopLevel, calls_of, top_level_program
from .transfers import TransferModel
from .translate import Translator
from .units import matrix_cycles
from .unknowns import unknown_control

_MOST = 24  # operations that a report names


@dataclasses.dataclass
class Whole:
    """One call on one core, modelled: the top-level program, with every operation at the cycles that it takes alone.

    ``cycles`` is the call; ``kernel_cycles`` are those of its Pallas kernels. The rest is XLA's: ``before`` the first
    kernel, ``between`` them and ``after`` the last. ``operations`` is how many of XLA's operations ran, a loop's each
    time. ``estimated_cycles`` are XLA's by libtpu's own cost model, and the emulated ones where that has no figure.
    ``largest`` has ``(operation, times, cycles of all times, libtpu's estimate of all times)``.

    ``unmodelled`` says what was met and can't be modelled. A call with such a note has no figure to quote.
    """

    cycles: float
    kernel_cycles: float
    before: float
    between: float
    after: float
    operations: int
    estimated_cycles: float
    largest: list[tuple[str, int, float, float | None]]
    unmodelled: list[str]

    @property
    def xla_cycles(self) -> float:
        """Everything but the kernels."""
        return self.cycles - self.kernel_cycles


def whole_call(dumps: Dumps, chip: Chip, kernels: Mapping[str, float], model: TransferModel | None) -> Whole | str:
    """Model a compiled call as a whole.

    **Arguments:**

    - `dumps`: of one compilation.
    - `chip`: the generation's constants.
    - `kernels`: the cycles of each Pallas kernel by its name.
    - `model`: the model of transfers; by default libtpu's own for the generation.

    **Returns:** the figures, or why there are none.
    """
    if chip.is_megacore:
        return "the operations of a device of two cores are not modelled: XLA shares them between its cores"
    model = model or TransferModel(chip.dma_bytes_per_cycle, chip.dma_latency, chip.dma_overhead)
    programs = {made.name: made for made in dumps.programs()}
    top = next((made for made in programs.values() if made.is_top_level), None)
    if top is None:
        return "the compiler left no top-level program"
    bundles = {name: parse_bundles(made.bundles) for name, made in programs.items()}
    above = bundles.pop(top.name)
    notes, alike = collections.Counter[str](), Alike(dumps.hlo)
    kernels = dict(kernels)
    for name in calls_of(above):
        other = None if name in bundles else alike.first(name, bundles)
        if other is not None:
            bundles[name], programs[name] = bundles[other], programs[other]
            if other in kernels and dumps.has_equal_scalars(other):
                kernels[name] = kernels[other]
    try:
        slots, inner = inlined_slots(above, bundles, chip.delay_slots, dumps.assembly)
    except ValueError as error:
        return str(error)
    costs = dict(kernels)
    for name in calls_of(above):
        if name in bundles and not programs[name].is_kernel:
            control = unknown_control(bundles[name])
            translator = Translator(Program(bundles[name], inner.get(name, {})), {}, control.predicates)
            costs[name] = _operation_cycles(translator, chip, model)
            notes.update(f"{name}: {text}" for text in control.guesses)
    run = TopLevel(top_level_program(above, slots), costs, chip, model)
    run.run()
    control = unknown_control(above)
    notes.update(f"the top-level program: {text}" for text in control.guesses)
    notes.update(["the top-level program: a copy depends on data"] if control.predicates else [])
    notes.update(f"{name} has no code in the dumps" for name in run.missing if not name.startswith(OWN))
    notes.update({text: count for text, count in run.notes.items() if "no value" not in text})
    return _counted(run, kernels, dumps, list(notes))


def _operation_cycles(translator: Translator, chip: Chip, model: TransferModel) -> float:
    """One of XLA's operations by itself. What it computes from is not known, and decides nothing: see the notes."""
    run = Emulator(translator, chip, model, 0).run()
    return max(run.time, matrix_cycles(translator.program.bundles, run.bundle_counts(), chip))


def _counted(run: TopLevel, kernels: Mapping[str, float], dumps: Dumps, notes: list[str]) -> Whole:
    estimates = {made.name: made.estimated_cycles for made in operations_of(dumps.hlo)}
    ours = [call for call in run.calls if call.name in kernels]
    others = [call for call in run.calls if call.name not in kernels and not call.name.startswith(OWN)]
    by_libtpu = [estimates.get(call.name) for call in others]
    kernel_cycles = sum(call.cycles for call in ours)
    before = ours[0].start if ours else run.time
    after = run.time - ours[-1].start - ours[-1].cycles if ours else 0.0
    return Whole(
        run.time,
        kernel_cycles,
        before,
        run.time - kernel_cycles - before - after,
        after,
        len(others),
        sum(call.cycles if cycles is None else cycles for call, cycles in zip(others, by_libtpu, strict=True)),
        _largest(others, estimates),
        notes,
    )


def _largest(calls: Sequence[Call], estimates: Mapping[str, int | None]) -> list[tuple[str, int, float, float | None]]:
    times = collections.Counter(call.name for call in calls)
    cycles = collections.Counter[str]()
    for call in calls:
        cycles[call.name] += call.cycles  # type: ignore[assignment]
    rows = []
    for name, spent in cycles.most_common(_MOST):
        estimate = estimates.get(name)
        rows.append((name, times[name], float(spent), None if estimate is None else float(estimate * times[name])))
    return rows
