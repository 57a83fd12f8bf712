"""What a compiled kernel's machine code says: its loops, and how many instructions one turn of a loop issues."""

import re
from collections.abc import Iterable

_LABEL = re.compile(r"^\s*(\.L_x_\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;?\s*$")
_BRANCH = re.compile(r"\bBRA\b.*?(\.L_x_\w+)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")


def instructions(listing: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of a listing by nvdisasm, in order; and for each label the number of the one after it."""
    found, labels = [], {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(found)
        elif instruction := _INSTRUCTION.search(line):
            found.append(instruction.group(1))
    return found, labels


def opcode(instruction: str) -> str:
    """An instruction's name, such as ``HGMMA``, without its predicate and its modifiers."""
    return _PREDICATE.sub("", instruction).split()[0].split(".")[0]


def count(found: Iterable[str], name: str) -> int:
    """How many instructions have this name."""
    return sum(opcode(instruction) == name for instruction in found)


def loop_with(listing: str, name: str) -> list[str]:
    """The instructions of the smallest loop that holds all instructions ``name`` that are in any loop.

    A loop is all that can be reached from its head and leads back to it, branches that are seldom taken included.
    """
    found, labels = instructions(listing)
    follow = [_followers(i, found, labels) for i in range(len(found))]
    before: list[list[int]] = [[] for _ in found]
    for i, after in enumerate(follow):
        for j in after:
            before[j].append(i)
    loops = []
    for tail, after in enumerate(follow):
        for head in after:
            # The branches that only repeat a wait jump back too, to a place that their own head does not lead by.
            if head <= tail and not _can_avoid(follow, head, tail):
                loops.append(_natural(before, head, tail))
    holding = [loop for loop in loops if any(opcode(found[i]) == name for i in loop)]
    most = max(count((found[i] for i in loop), name) for loop in holding)
    best = min((loop for loop in holding if count((found[i] for i in loop), name) == most), key=len)
    return [found[i] for i in sorted(best)]


def _followers(i: int, found: list[str], labels: dict[str, int]) -> list[int]:
    name, is_sure = opcode(found[i]), not _PREDICATE.match(found[i])
    target = _BRANCH.search(found[i])
    jumps = [labels[target.group(1)]] if name == "BRA" and target else []
    # A second predicate, `BRA P4, ...`, makes a branch one that may not be taken.
    is_sure &= not re.search(r"\bBRA(\.\w+)*\s+!?U?P\d", found[i])
    falls = [] if is_sure and name in ("BRA", "EXIT", "RET") else [i + 1]
    return [j for j in (*jumps, *falls) if j < len(found)]


def _can_avoid(follow: list[list[int]], head: int, tail: int) -> bool:
    """Whether the tail of a loop can be reached from the kernel's start without passing its head."""
    seen, pending = {0}, [0] if head else []
    while pending:
        for j in follow[pending.pop()]:
            if j != head and j not in seen:
                seen.add(j)
                pending.append(j)
    return tail in seen and tail != head


def _natural(before: list[list[int]], head: int, tail: int) -> set[int]:
    loop, pending = {head, tail}, [tail] if tail != head else []
    while pending:
        for i in before[pending.pop()]:
            if i not in loop:
                loop.add(i)
                pending.append(i)
    return loop
