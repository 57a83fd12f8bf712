"""`Around`: what XLA runs around the kernels of a compiled TPU program, counted from the program's text."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
_BODIES = re.compile(r"(?:condition|body|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%[^\s,]+)")
_CALLED = re.compile(r"to_apply=(%[^\s,]+)")
_NAME = re.compile(r"%([^\s,(){}]+)")
_ARRAY = re.compile(r"(pred|bf16|[suf]\d+\w*|c\d+)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_KERNEL = 'custom_call_target="tpu_custom_call"'
_ALLOCATION = 'custom_call_target="AllocateBuffer"'
_LOOP, _SORT, _FUSION, _COPIES = "while", "sort", "fusion", ("copy", "copy-start")
# Names for values, and ends of what began elsewhere: no code of their own.
_FREE = ("bitcast", "get-tuple-element", "parameter", "tuple", "constant", "copy-done", "after-all", "opt-barrier")
_CONTROL = ("while", "conditional", "call")


class Operation(NamedTuple):
    """One instruction of a compiled program that runs: in the program itself, or in a loop or branch of it.

    ``line`` is its text after the name, ``result_bytes`` the size of its result, ``estimated_cycles`` the compiler's
    own estimate, if it has one, and ``frame`` the number of its place in the sources.
    """

    name: str
    opcode: str
    shape: str
    line: str
    is_kernel: bool
    result_bytes: int
    estimated_cycles: int | None
    frame: int


@dataclasses.dataclass(frozen=True)
class Around:
    """What XLA runs around the kernels of a compiled TPU program. What a loop's body holds is counted once.

    * ``kernels``: Pallas kernels.
    * ``operations``: everything else that has code of its own.
    * ``loops``, ``sorts``, ``fusions``, ``copies``: of these. A copy is of an array, or of a number into memory.
    * ``written_bytes``: the size of the operations' results. One that sets a part of an array counts the whole array.
    """

    kernels: int
    operations: int
    loops: int
    sorts: int
    fusions: int
    copies: int
    written_bytes: int

    @staticmethod
    def of(text: str) -> "Around":
        """Count a compiled program, ``compiled.as_text()``."""
        found = list(operations_of(text))
        others = [operation for operation in found if not operation.is_kernel]
        opcodes = [operation.opcode for operation in others]
        coded = [operation for operation in others if operation.opcode not in _CONTROL]
        return Around(
            len(found) - len(others),
            len(coded),
            opcodes.count(_LOOP),
            opcodes.count(_SORT),
            opcodes.count(_FUSION),
            sum(map(opcodes.count, _COPIES)),
            sum(operation.result_bytes for operation in coded),
        )


def operations_of(text: str) -> Iterator[Operation]:
    """Every operation of a compiled program that runs, loops and branches before what they hold."""
    computations, entry = _computations(text)
    yield from _run(entry, computations, set())


def _run(name: str, computations: Mapping[str, list[str]], entered: set[str]) -> Iterator[Operation]:
    if name in entered:
        return
    entered.add(name)
    for text in computations.get(name, []):
        found = _INSTRUCTION.match(text)
        if found is None:
            continue
        instruction, shape, opcode, rest = found.groups()
        if opcode in _FREE or _ALLOCATION in rest:
            continue
        cycles, frame = _CYCLES.search(rest), _FRAME.search(rest)
        yield Operation(
            instruction,
            opcode,
            shape,
            rest,
            _KERNEL in rest,
            _result_bytes(shape, opcode),
            int(cycles.group(1)) if cycles else None,
            int(frame.group(1)) if frame else 0,
        )
        held = _BODIES.findall(rest) + (_CALLED.findall(rest) if opcode == "call" else [])
        for inner in _NAME.findall(" ".join(held)):
            yield from _run(inner, computations, entered)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the program's own."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            lines = found.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        else:
            lines.append(line)
    return found, entry


def _result_bytes(shape: str, opcode: str) -> int:
    """Bytes of a result as XLA writes its shape, without padding. An asynchronous copy also names what it copies."""
    bits = [_bits(dtype) * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in _ARRAY.findall(shape)]
    return -(-sum(bits[:1] if opcode == "copy-start" else bits) // 8)


def _bits(dtype: str) -> int:
    found = re.search(r"\d+", dtype)
    return int(found.group()) if found else 8  # pred
