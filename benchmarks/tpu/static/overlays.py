"""Delay slots of branches where every branch encodes its own number, which only the assembly shows: tpu7x.

The assembly holds the code of all kernels, cut into overlays: pieces that are loaded into the instruction memory one
at a time. Each line begins with its overlay's number and its address in the overlay. A kernel may begin in one overlay
and go on in the next. Where it is cut, a branch across the cut leads to a stub that loads the other overlay, so that
its distance is another one than in the bundles; everything else of the code is the same.

So the branches are matched piece by piece, each piece within one overlay. Two things can be compared bundle by bundle:
whether a bundle is empty, and the predicate register of its branch.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from .bundles import Bundle, called_name, predicate

_LINE = re.compile(r"^(\d+):(0x[0-9a-f]+)\s*:\s*\{(.*)\}")
_BRANCH = re.compile(r"sbr\.(\w+)\s+(?:@(!?\w+)\s+)?(?:\$[+-]\d+(?:, \$(\d+))?)?")
_EMPTY, _CODE = "", "code"  # marks of bundles without a branch


@dataclasses.dataclass
class _Overlay:
    marks: list[str]  # of each bundle, as `_mark` makes them
    slots: dict[int, int]  # delay slots by a branch's address


def delay_slots(bundles: Sequence[Bundle], fixed: int | None, assembly: str | None) -> dict[int, int]:
    """Delay slots of each branch, by its bundle's index.

    **Arguments:**

    - `bundles`: a kernel's final bundles.
    - `fixed`: the generation's number of delay slots; ``None`` where each branch encodes its own.
    - `assembly`: the text of the dump ``*-assembly.txt``. It is read only where there is no fixed number.

    **Returns:** ``{index: delay slots}``; empty for a kernel without branches.

    Raises ``ValueError`` where a branch is in no overlay: with a guess the program would run another way.
    """
    branches = [bundle.index for bundle in bundles if _is_branch(bundle)]
    if fixed is not None or not branches:
        return {index: fixed or 0 for index in branches}
    if assembly is None:
        raise ValueError("the delay slots of this generation's branches are in the assembly, and there is no assembly")
    return _matched(bundles, _overlays(assembly))


def inlined_slots(
    top: Sequence[Bundle], programs: Mapping[str, Sequence[Bundle]], fixed: int | None, assembly: str | None
) -> tuple[dict[int, int], dict[str, dict[int, int]]]:
    """Delay slots of a program that calls others, and of those, found together.

    The assembly has the code of an operation wherever it is called. A small operation alone might be found anywhere.

    **Arguments:**

    - `top`: the bundles of the program that calls.
    - `programs`: the bundles of the others by name. One that is called and is not here counts as one bundle.
    - `fixed`, `assembly`: as for `delay_slots`.

    **Returns:** `top`'s ``{index: delay slots}``, and those of the others by name.

    Raises ``ValueError`` as `delay_slots` does.
    """
    if fixed is not None:
        slots = {name: delay_slots(bundles, fixed, None) for name, bundles in programs.items()}
        return delay_slots(top, fixed, None), slots
    if assembly is None:
        return delay_slots(top, fixed, assembly), {}
    line: list[tuple[str, Bundle]] = []  # the empty name is `top`
    for bundle in top:
        names = [called_name(i) for i in bundle.instructions if i.opcode == "inlined_call"]
        known = [(name, inner) for name in names for inner in programs.get(name, ())]
        line += known or [("", bundle)]
    found = _matched([bundle for _, bundle in line], _overlays(assembly))
    made: dict[str, dict[int, int]] = {name: {} for name in ("", *programs)}
    for index, slots in found.items():
        name, bundle = line[index]
        made[name].setdefault(bundle.index, slots)
    return made.pop(""), made


def _matched(bundles: Sequence[Bundle], overlays: Mapping[str, _Overlay]) -> dict[int, int]:
    """Delay slots by a branch's place in ``bundles``, piece by piece."""
    branches = [index for index, bundle in enumerate(bundles) if _is_branch(bundle)]
    marks = [_mark(bundle) for bundle in bundles]
    found: dict[int, int] = {}
    for index in branches:
        if index not in found:
            number, offset, end = _piece(marks, index, max(found, default=-1) + 1, overlays)
            found |= {i: overlays[number].slots[i + offset] for i in branches if index <= i < end}
    return found


def _piece(marks: list[str], index: int, begin: int, overlays: Mapping[str, _Overlay]) -> tuple[str, int, int]:
    """The longest stretch of code around the branch at ``index`` that one overlay holds too.

    ``(overlay, what to add to an index for the address, end of the stretch)``; it doesn't reach back before ``begin``.
    """
    best, longest = None, 0
    for number, overlay in overlays.items():
        for address in overlay.slots:
            offset = address - index
            if overlay.marks[address] == marks[index]:
                first, end = _stretch(marks, overlay.marks, index, begin, offset)
                if end - first > longest:
                    best, longest = (number, offset, end), end - first
    if best is None:
        raise ValueError(f"no overlay of the assembly holds the branch in bundle {index:#x}")
    return best


def _stretch(marks: list[str], others: list[str], index: int, begin: int, offset: int) -> tuple[int, int]:
    """The stretch around ``index``, ``(first, end)``, in which both have the same marks."""
    first, end = index, index + 1
    while first > max(begin, -offset) and marks[first - 1] == others[first - 1 + offset]:
        first -= 1
    while end < min(len(marks), len(others) - offset) and marks[end] == others[end + offset]:
        end += 1
    return first, end


def _overlays(assembly: str) -> dict[str, _Overlay]:
    overlays: dict[str, _Overlay] = {}
    for line in assembly.splitlines():
        found = _LINE.match(line)
        if not found:
            continue
        number, address, code = found.groups()
        overlay = overlays.setdefault(number, _Overlay([], {}))
        if int(address, 16) != len(overlay.marks):
            raise ValueError(f"overlay {number} of the assembly has no line for {len(overlay.marks):#x}")
        branch = _BRANCH.search(code)
        if branch and branch.group(1) == "rel":
            if branch.group(3) is None:
                raise ValueError(f"the branch at {number}:{address} of the assembly encodes no delay slots: {code}")
            overlay.slots[len(overlay.marks)] = int(branch.group(3))
            overlay.marks.append(f"branch {branch.group(2) or ''}")
        else:
            overlay.marks.append(f"other branch {code}" if branch else _CODE if code else _EMPTY)
    return overlays


def _mark(bundle: Bundle) -> str:
    """A bundle as it is compared: empty, some code, or a branch with its predicate register."""
    if not bundle.instructions:
        return _EMPTY
    for instruction in bundle.instructions:
        if instruction.opcode == "sbr.rel":
            register, _, is_negated, _ = predicate(instruction.text)
            name = register.rpartition("_")[2] if register else ""
            return f"branch {'!' if is_negated else ''}{name}"
    return _CODE


def _is_branch(bundle: Bundle) -> bool:
    return any(instruction.opcode == "sbr.rel" for instruction in bundle.instructions)
