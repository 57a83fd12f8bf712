"""What a compiled program does with large arrays inside of its loops, read off its optimised HLO."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
# These give a name to memory that there is already, or run computations that are looked at themselves.
_NO_COPY = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "opt-barrier"}
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_NAMES = r"%?[\w.-]+(?:, ?%?[\w.-]+)*"
_CALLED = re.compile(rf"(?:body|condition|calls|to_apply|branch_computations|\w+_computation)=\{{?({_NAMES})")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    is_root: bool
    shape: str
    opcode: str
    rest: str  # the operands and attributes

    @property
    def called(self) -> list[str]:
        return [name.strip(" %") for names in _CALLED.findall(self.rest) for name in names.split(",")]


def copies_in_loops(hlo: str, least_bytes: int) -> list[str]:
    """The instructions in loops, at any depth, that make a new array of at least so many bytes.

    An update in place of a small part of an array makes none, nor does a kernel whose result is its operand's memory.
    """
    computations = dict(_computations(hlo))
    return [
        f"{instruction.name} = {instruction.shape} {instruction.opcode} in {name}"
        for name, instruction in _in_loops(hlo, computations)
        if _largest(instruction.shape) >= least_bytes and not _is_in_place(instruction, name, computations, least_bytes)
    ]


def opcodes_in_loops(hlo: str) -> set[str]:
    """What the instructions in loops do, at any depth, those of fusions included."""
    computations = dict(_computations(hlo))
    found = [instruction for _, instruction in _in_loops(hlo, computations)]
    fused = [x for fusion in found if fusion.opcode == "fusion" for x in computations[fusion.called[0]]]
    return {instruction.opcode for instruction in (*found, *fused)}


def _in_loops(hlo: str, computations: dict[str, list[Instruction]]) -> Iterable[tuple[str, Instruction]]:
    """The instructions in loops, at any depth, each with the computation that it is in. A fusion counts as one."""
    bodies = [re.search(r"body=%?([\w.-]+)", line) for line in hlo.splitlines() if " while(" in line]
    waiting, seen = [match.group(1) for match in bodies if match], set()
    assert waiting, "the program has no loop"
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for instruction in computations[name]:
            if instruction.opcode != "fusion":
                waiting += [called for called in instruction.called if called in computations]
            yield name, instruction


def _is_in_place(instruction: Instruction, where: str, computations: Any, least_bytes: int) -> bool:
    if instruction.opcode in _NO_COPY:
        return True
    if instruction.opcode == "custom-call":
        return "output_to_operand_aliasing" in instruction.rest
    if instruction.opcode == "fusion":
        where = instruction.called[0]
    by_name = {x.name: x for x in computations[where]}
    root = next(x for x in computations[where] if x.is_root) if instruction.opcode == "fusion" else instruction
    while root.opcode == "bitcast":
        root = by_name[_operands(root)[0]]
    return root.opcode == "dynamic-update-slice" and _largest(by_name[_operands(root)[1]].shape) < least_bytes


def _computations(hlo: str) -> Iterable[tuple[str, list[Instruction]]]:
    name, lines = None, []
    for line in hlo.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            name, lines = header.group(1), []
        elif line.startswith("}") and name is not None:
            yield name, lines
            name = None
        elif name is not None and (match := _INSTRUCTION.match(line)):
            is_root, own, shape, opcode, rest = match.groups()
            lines.append(Instruction(own, bool(is_root), shape, opcode, rest))


def _operands(instruction: Instruction) -> list[str]:
    return [name.strip(" %") for name in re.split(r"[,)]", re.sub(r"/\*.*?\*/", "", instruction.rest))]


def _largest(shape: str) -> int:
    """The bytes of the largest array of a shape, which may be a tuple."""
    sizes = [0]
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape):
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        sizes.append(count * _BYTES.get(dtype, 0))
    return max(sizes)
