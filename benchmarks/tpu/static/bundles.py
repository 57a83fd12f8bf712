"""The parser of libtpu's final bundles: one bundle of instructions per cycle, as the dump prints them.

A line of the dump is an index, a label, marks of the loop depth, the instructions in braces, separated by ``;;``, and
a comment that names the regions which begin or end with this bundle. Comments stand between ``/*`` and ``*/`` and may
be nested. A comment holds the source line of its instruction, and the names of a transfer's operands.
"""

import dataclasses
import re
from typing import NamedTuple

OWN = "<"  # how the names begin of the code with which the compiler begins and ends a program
_HEAD = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*>*\s*\{")
_REGION = re.compile(r"(Start/End empty|Start|End) region (\d+)")
_SOURCE = re.compile(r'loc\("([^"]*)":(\d+)')
_MARK = re.compile(r"(/\*|\*/|;;)")
_NAMED = re.compile(r"/\*(\w+)=\*/\s*(\[[^\]]*\]|[^,\s;}]+)")
_ASSIGNMENT = re.compile(r"^(?:%(\w+)(?:, %\w+)* = )?(.*)$", re.S)
_OPCODE = re.compile(r"[^\s({\[]+")
_THREAD = re.compile(r"^\[thread:\$\d+\]\s*")
_CALLED = re.compile(r"%?([^\s=]+)")
_PREDICATE = re.compile(r"\((!?)%(\w+)(?:,\s*%(\w+))?\)\s*,?\s*")


@dataclasses.dataclass
class Instruction:
    """One instruction: ``result`` is its value's name (``s44_s24`` is value 44 in register s24), if it has one."""

    result: str | None
    opcode: str
    text: str  # operands, without comments
    comment: str
    source: tuple[str, int] | None  # file and line
    named: dict[str, str]  # operands that the dump names

    @property
    def starts_transfer(self) -> bool:
        """Whether a DMA begins here."""
        return self.opcode.startswith("dma.") and not self.opcode.startswith("dma.done")

    @property
    def place(self) -> str | None:
        """The source line, as ``file.py:12``."""
        return f"{self.source[0].rpartition('/')[2]}:{self.source[1]}" if self.source else None


@dataclasses.dataclass
class Bundle:
    """The instructions that issue in one cycle, and the numbers of the regions that begin or end with them."""

    index: int
    instructions: list[Instruction]
    starts: list[int]
    ends: list[int]

    @property
    def starts_transfer(self) -> bool:
        """Whether a DMA begins here."""
        return any(instruction.starts_transfer for instruction in self.instructions)


class Predicate(NamedTuple):
    """An instruction's condition, and its operands in ``rest``. Without a condition ``register`` is ``None``."""

    register: str | None
    otherwise: str | None  # the value that the result has when the instruction doesn't execute
    is_negated: bool
    rest: str


def parse_bundles(text: str) -> list[Bundle]:
    """Every bundle of one program, from the text of its dump ``*-final_bundles.txt``.

    Raises ``ValueError`` where the bundles' numbers have a gap.
    """
    bundles: list[Bundle] = []
    for index, body in _bodies(text):
        if index != len(bundles):
            raise ValueError(f"bundle {len(bundles):#x} is missing: {index:#x} follows the one before it")
        code, _, tail = body.rpartition("}")
        regions = [(kind, int(number)) for kind, number in _REGION.findall(tail)]
        starts = [number for kind, number in regions if kind != "End"]
        ends = [number for kind, number in regions if kind != "Start"]
        bundles.append(Bundle(index, _instructions(code), starts, ends))
    return bundles


def count_bundles(text: str) -> int:
    """The number of bundles of one program, without parsing them."""
    return sum(_HEAD.match(line) is not None for line in text.split("\n"))


def predicate(text: str) -> Predicate:
    """Split a leading ``(%p)``, ``(!%p)`` or ``(%p, %old)`` from an instruction's operands."""
    thread = _THREAD.match(text)
    text = text[thread.end() :] if thread else text
    found = _PREDICATE.match(text)
    if not found:
        return Predicate(None, None, False, text)
    return Predicate(found.group(2), found.group(3), found.group(1) == "!", text[found.end() :])


def operands(text: str) -> list[str]:
    """Split operands at the commas outside brackets."""
    split, depth, begin = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            split.append(text[begin:i].strip())
            begin = i + 1
    last = text[begin:].strip()
    return [*split, last] if last else split


def called_name(instruction: Instruction) -> str:
    """The operation whose code stands in the place of a call, such as ``fusion.3`` or ``<late-finalization>``."""
    found = _CALLED.match(instruction.comment.strip())
    return found.group(1) if found else instruction.comment.strip()


def _bodies(text: str) -> list[tuple[int, str]]:
    """``(index, text after the opening brace)`` of each bundle, which may go on over several lines."""
    found: list[tuple[int, list[str]]] = []
    for line in text.split("\n"):
        head = _HEAD.match(line)
        if head:
            found.append((int(head.group(1), 0), [line[head.end() :]]))
        elif found:
            found[-1][1].append(line)
    return [(index, "\n".join(lines)) for index, lines in found]


def _instructions(body: str) -> list[Instruction]:
    """The instructions between a bundle's braces."""
    made, code, comment, whole, depth = [], [], [], [], 0
    for token in [*_MARK.split(body), ";;"]:
        if token == ";;" and depth == 0:
            instruction = _instruction("".join(code).strip(), "".join(comment), "".join(whole))
            made += [instruction] if instruction else []
            code, comment, whole = [], [], []
            continue
        whole.append(token)
        if token == "/*":
            depth += 1
            comment.append(" ")
        elif token == "*/" and depth:
            depth -= 1
        else:
            (comment if depth else code).append(token)
    return made


def _instruction(code: str, comment: str, whole: str) -> Instruction | None:
    assignment = _ASSIGNMENT.match(code)
    if not code or assignment is None:
        return None
    result, rest = assignment.groups()
    opcode = _OPCODE.match(rest)
    name = opcode.group() if opcode else rest
    sources = _SOURCE.findall(comment)
    source = (sources[-1][0], int(sources[-1][1])) if sources else None
    return Instruction(result, name, rest[len(name) :].strip(), comment, source, dict(_NAMED.findall(whole)))
