"""Control flow: a program's branches, their targets and delay slots, and the loops that they make."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .bundles import Bundle, predicate

_TARGET = re.compile(r"\$region(\d+)")
_UNREACHED = (math.inf, -math.inf)


class Branch(NamedTuple):
    """A branch to the bundle ``target``, taken always or by a predicate register."""

    predicate: str | None
    is_negated: bool
    target: int


@dataclasses.dataclass
class Span:
    """A loop's bundles from ``start`` to ``end``, both included, and the backward branches at its end.

    ``end`` is the last delay slot of the last of them.
    """

    start: int
    end: int
    backs: list[int]

    def holds(self, other: "Span") -> bool:
        """Whether ``other`` is nested in this one."""
        return self.start < other.start and other.end <= self.end


class Program:
    """Bundles with their control flow: ``branches`` by index, ``loops`` with the outer ones first."""

    def __init__(self, bundles: Sequence[Bundle], slots: Mapping[int, int]):
        self.bundles = bundles
        self.slots = slots
        regions: dict[int, int] = {}
        for bundle in bundles:
            for number in bundle.starts:
                regions.setdefault(number, bundle.index)
        self.branches: dict[int, Branch] = {}
        for bundle in bundles:
            for instruction in bundle.instructions:
                if instruction.opcode == "sbr.rel":
                    target = _TARGET.search(instruction.text)
                    if target is None:
                        raise ValueError(f"the branch in bundle {bundle.index:#x} names no region: {instruction.text}")
                    register, _, is_negated, _ = predicate(instruction.text)
                    index = regions.get(int(target.group(1)), len(bundles) - 1)  # a region of no bundle is the exit
                    self.branches[bundle.index] = Branch(register, is_negated, index)
        self.loops = self._find_loops()

    def path_lengths(self, loop: Span) -> tuple[int, int]:
        """Bundles of the shortest and of the longest way through one iteration. Nested loops count as no bundles."""
        inner = [other for other in self.loops if loop.holds(other)]
        free = {index for other in inner for index in range(other.start, other.end + 1)}
        passed = {index for other in inner for index in other.backs}
        known: dict[int, tuple[float, float]] = {}  # from a bundle to the end of the iteration
        for index in range(loop.end, loop.start - 1, -1):
            if index in self.branches and index not in passed:
                known[index] = self._from_branch(index, loop, free, known)
            else:
                least, most = known.get(index + 1, (0, 0) if index == loop.end else _UNREACHED)
                known[index] = (least + (index not in free), most + (index not in free))
        least, most = known[loop.start]
        if math.isfinite(least) and math.isfinite(most):
            return int(least), int(most)
        own = sum(index not in free for index in range(loop.start, loop.end + 1))
        return own, own

    def _from_branch(
        self, index: int, loop: Span, free: set[int], known: Mapping[int, tuple[float, float]]
    ) -> tuple[float, float]:
        after = index + self.slots[index] + 1
        cost = sum(i not in free for i in range(index, min(loop.end + 1, after)))
        if index in loop.backs:
            return cost, cost
        branch, ways = self.branches[index], []
        if index < branch.target <= loop.end:
            ways.append(known.get(branch.target, _UNREACHED))
        if branch.predicate is not None and after <= loop.end:
            ways.append(known.get(after, _UNREACHED))
        least = min((way[0] for way in ways), default=math.inf)
        most = max((way[1] for way in ways), default=-math.inf)
        return cost + least, cost + most

    def _find_loops(self) -> list[Span]:
        """One span for each target of backward branches."""
        loops: dict[int, Span] = {}
        for index, branch in self.branches.items():
            if branch.target <= index:
                end = min(len(self.bundles) - 1, index + self.slots[index])
                span = loops.setdefault(branch.target, Span(branch.target, end, []))
                span.end = max(span.end, end)
                span.backs.append(index)
        return sorted(loops.values(), key=lambda span: (span.start, -span.end))
