"""`Loop`: what the final code shows of one loop without running it."""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

from .flow import Program, Span
from .units import UNITS, total

_UNIT_SUFFIX = re.compile(r"\.mxu\d|\.mrb\[\d+\]|\.xlu\d|\.(msra|msrb|gmra|gmrb|vlgmr)\b|\.totalorder")


@dataclasses.dataclass
class Loop:
    """A loop of the final code, bundles ``start`` to ``end``, both included. Every count is static.

    ``own_bundles`` are not in a nested loop; all sides of its branches are counted. ``path_min`` and ``path_max`` are
    the shortest and the longest way through one iteration with nested loops counted as none. A predicated instruction
    takes its slot whether its predicate holds or not. ``units`` and the counts below it are of the own bundles;
    ``occupancy`` is a unit's uses over its slots in them.
    """

    name: str
    parent: str | None
    depth: int
    start: int
    end: int
    bundles: int
    own_bundles: int
    path_min: int
    path_max: int
    empty: int
    units: dict[str, int]
    occupancy: dict[str, float]
    transfer_starts: int
    transfer_waits: int
    top_opcodes: list[tuple[str, int]]
    top_lines: list[tuple[str, int]]


def loops_of(program: Program, capacity: Mapping[str, int], rows: Sequence[Sequence[int]]) -> list[Loop]:
    """Every loop, a nested one named after its parent: ``L1``, ``L1.1``, ``L2``."""
    made: list[Loop] = []
    around: list[tuple[int, str]] = []  # (end, name) of the loops that the next one may be nested in
    children: collections.Counter[str] = collections.Counter()
    for span in program.loops:
        while around and span.start > around[-1][0]:
            around.pop()
        parent = around[-1][1] if around else None
        children[parent or ""] += 1
        name = f"{parent}.{children[parent]}" if parent else f"L{children['']}"
        made.append(_loop(program, span, name, parent, capacity, rows))
        around.append((span.end, name))
    return made


def _loop(
    program: Program,
    span: Span,
    name: str,
    parent: str | None,
    capacity: Mapping[str, int],
    rows: Sequence[Sequence[int]],
) -> Loop:
    nested = [other for other in program.loops if span.holds(other)]
    inside = {index for other in nested for index in range(other.start, other.end + 1)}
    own = [index for index in range(span.start, span.end + 1) if index not in inside]
    bundles = [program.bundles[index] for index in own]
    instructions = [instruction for bundle in bundles for instruction in bundle.instructions]
    units = total([rows[index] for index in own if index < len(rows)], [1] * len(own))
    lines = collections.Counter(
        place for bundle in bundles for place in dict.fromkeys(i.place for i in bundle.instructions if i.place)
    )
    return Loop(
        name,
        parent,
        name.count(".") + 1,
        span.start,
        span.end,
        span.end - span.start + 1,
        len(own),
        *program.path_lengths(span),
        sum(not bundle.instructions for bundle in bundles),
        units,
        {unit: round(units[unit] / (capacity.get(unit, 1) * len(own)), 3) for unit in UNITS if units[unit] and own},
        sum(instruction.starts_transfer for instruction in instructions),
        sum(instruction.opcode.startswith("dma.done") for instruction in instructions),
        collections.Counter(_UNIT_SUFFIX.sub("", i.opcode) for i in instructions).most_common(14),
        lines.most_common(10),
    )
