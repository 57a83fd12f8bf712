"""`Run`: what one run of a kernel's scalar program counted."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .bundles import Bundle
from .chips import Chip
from .emulator import LIMIT, Emulator
from .flow import Program
from .loops import Loop
from .transfers import TransferModel
from .translate import Translator
from .units import bundle_kind, matrix_cycles, opcode_class, total

_LEAST_SHARE = 0.05  # of the bytes read: a core that reads less leaves the bandwidth to the other one


@dataclasses.dataclass
class Run:
    """One run of a kernel's scalar program on one core. Cycles are modelled; counts of bundles and bytes are exact.

    ``issue_cycles`` are the bundles issued, with the delays that the program asks for and the bubbles of branches:
    what the kernel takes if every transfer is instantaneous. ``model_cycles`` also has the waits for transfers,
    ``stall_cycles``, by the transfers' model. ``hbm_cycles`` are the bytes over the public peak. ``matrix_cycles`` are
    those of the busiest matrix unit.

    ``units`` are uses of each unit, ``kinds`` bundles by what they issue for, ``classes`` vector instructions by class.
    ``loops`` has ``(iterations, own cycles)`` by a loop's name. ``unmodelled`` says what the figures don't know.
    """

    core: int
    issue_cycles: int
    model_cycles: float
    stall_cycles: float
    hbm_cycles: float
    matrix_cycles: float
    transfers: int
    transfer_bytes: int
    hbm_read_bytes: int
    hbm_written_bytes: int
    hbm_sizes: list[tuple[int, int]]  # (bytes, transfers), those with most bytes together first
    transfer_bundles: int  # bundles that start a transfer
    units: dict[str, int]
    kinds: dict[str, int]
    classes: dict[str, int]
    loops: dict[str, tuple[int, int]]
    top_lines: list[tuple[str, int]]
    top_waits: list[tuple[str, int]]
    unmodelled: list[str]


def run_program(
    program: Program,
    rows: Sequence[Sequence[int]],
    loops: Sequence[Loop],
    inputs: Mapping[int, Any],
    chip: Chip,
    model: TransferModel | None = None,
    limit: int = LIMIT,
) -> list[Run]:
    """Run a program on each core of a device.

    **Arguments:**

    - `program`: the kernel's bundles with their control flow.
    - `rows`: uses of the units by each bundle, from `parse_utilization`.
    - `loops`: the kernel's loops, from `loops_of`.
    - `inputs`: integer operands by index. An operand without a value counts as zeros, and a note says so.
    - `chip`: the generation's constants.
    - `model`: the model of transfers; by default libtpu's own for the generation.
    - `limit`: bundles after which a run is stopped, which a note says too.

    **Returns:** one run for each core that the kernel asks for: one, or both of a device that has two.

    A program runs twice: first with instantaneous transfers, which gives the bundles and tells how many cores read
    from HBM and so share its bandwidth, then with the model of transfers, which gives the time.
    """
    translator = Translator(program, inputs)
    asks_for_core = any("core id" in i.comment for bundle in program.bundles for i in bundle.instructions)
    cores = range(2 if chip.is_megacore and asks_for_core else 1)
    issued = [Emulator(translator, chip, None, core, limit).run() for core in cores]
    read = [emulator.transfers.read_bytes for emulator in issued]
    active = max(1, sum(bytes_ > _LEAST_SHARE * (sum(read) or 1) for bytes_ in read))
    model = model or TransferModel(chip.dma_bytes_per_cycle / active, chip.dma_latency, chip.dma_overhead)
    timed = [Emulator(translator, chip, model, core, limit).run() for core in cores]
    return [_counted(a, b, rows, loops, chip) for a, b in zip(issued, timed, strict=True)]


def _counted(
    issued: Emulator, timed: Emulator, rows: Sequence[Sequence[int]], loops: Sequence[Loop], chip: Chip
) -> Run:
    bundles, moved = issued.translator.program.bundles, issued.transfers
    counts = issued.bundle_counts()
    kinds: collections.Counter[str] = collections.Counter()
    classes: collections.Counter[str] = collections.Counter()
    for bundle, count in zip(bundles, counts, strict=True):
        if count:
            kinds[bundle_kind(bundle)] += count
            for name in filter(None, (opcode_class(i.opcode) for i in bundle.instructions)):
                classes[name] += count
    notes = issued.translator.notes + issued.notes
    return Run(
        core=issued.core,
        issue_cycles=issued.issued,
        model_cycles=timed.time,
        stall_cycles=timed.stalled,
        hbm_cycles=(moved.read_bytes + moved.written_bytes) / chip.bytes_per_cycle,
        matrix_cycles=matrix_cycles(bundles, counts, chip),
        transfers=moved.count,
        transfer_bytes=moved.all_bytes,
        hbm_read_bytes=moved.read_bytes,
        hbm_written_bytes=moved.written_bytes,
        hbm_sizes=sorted(moved.hbm_sizes.items(), key=lambda item: -item[0] * item[1])[:8],
        transfer_bundles=sum(n for bundle, n in zip(bundles, counts, strict=True) if bundle.starts_transfer),
        units=total(rows, counts),
        kinds=dict(kinds),
        classes=dict(classes),
        loops=_loop_cycles(loops, counts),
        top_lines=_lines(bundles, counts),
        top_waits=[(place, round(cycles)) for place, cycles in timed.waits.most_common(6)],
        unmodelled=[f"{text} x{count}" for text, count in notes.most_common(8)],
    )


def _loop_cycles(loops: Sequence[Loop], counts: Sequence[int]) -> dict[str, tuple[int, int]]:
    """``(iterations, own cycles)`` of each loop that ran, and of the code outside loops, ``"top"``."""
    owners = ["top"] * len(counts)
    for loop in sorted(loops, key=lambda loop: loop.depth):
        owners[loop.start : loop.end + 1] = [loop.name] * loop.bundles
    cycles: collections.Counter[str] = collections.Counter()
    for owner, count in zip(owners, counts, strict=True):
        cycles[owner] += count
    iterations = {loop.name: counts[loop.start] for loop in loops}
    return {name: (iterations.get(name, 1), spent) for name, spent in cycles.items() if spent}


def _lines(bundles: Sequence[Bundle], counts: Sequence[int]) -> list[tuple[str, int]]:
    """Bundles issued for each source line; one that several lines share is split evenly among them."""
    lines: collections.defaultdict[str, float] = collections.defaultdict(float)
    for bundle, count in zip(bundles, counts, strict=True):
        places = [i.place for i in bundle.instructions if i.place] or ["(no source)"]
        for place in places if count else ():
            lines[place] += count / len(places)
    most = sorted(lines.items(), key=lambda item: -item[1])[:16]
    return [(place, round(bundles)) for place, bundles in most]
