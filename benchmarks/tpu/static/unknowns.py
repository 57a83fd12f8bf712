"""What of a program's control depends on data that the emulator doesn't have.

Vectors are not computed, and memory that a transfer fills from an unknown array holds zeros. A branch, a transfer's
size or a wait that follows from such a number would be a guess. The numbers are followed by their names through
registers and SMEM, whatever the path: so a dependence may be found that no path has, and none is missed.

One kind can be bounded: a transfer that is made or not, as a scatter's are that drops what is out of bounds. All of
them are made then, which is the most that the program can take.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .bundles import Bundle, Instruction, predicate

_VALUE = re.compile(r"%(\w+)")
_SYMBOL = re.compile(r"#(\w+)")
_POPS = ("spop",)
_WAITS = ("dma.done.wait", "vwait.ge")


class Control(NamedTuple):
    """Finds the branches and loops of a program that depend on unknown data.

    ``guesses`` has a sentence for each kind, and is empty where nothing is guessed. ``predicates`` are those of
    transfers that are made or not by unknown data.
    """

    guesses: list[str]
    predicates: frozenset[str]


def unknown_control(bundles: Sequence[Bundle]) -> Control:
    """The branches, transfers and waits that depend on unknown data, of a program without known operands."""
    instructions = [i for bundle in bundles for i in bundle.instructions]
    flow = _Flow(instructions)
    kinds = [kind for instruction in instructions for kind in _decided(instruction, flow)]
    conditions = (predicate(i.text).register for i in instructions if i.starts_transfer)
    predicates = frozenset(name for name in conditions if name is not None and name in flow.values)
    return Control(list(dict.fromkeys(kinds)), predicates)


class _Flow:
    """The names of values that follow from unknown data, and the places in SMEM that hold such."""

    def __init__(self, instructions: Sequence[Instruction]):
        self.values: set[str] = set()
        self._symbols: set[str] = set()
        self._pointers: dict[str, set[str]] = {}  # the symbols that a value may point to
        self._stored: dict[str, set[str]] = {}  # the same of what a symbol holds
        self._vectors = {i.result for i in instructions if i.opcode == "vpush"}
        size = -1
        while size != self._size():
            size = self._size()
            for instruction in instructions:
                self._follow(instruction)

    def is_unknown(self, text: str) -> bool:
        """Whether operands name an unknown value."""
        return any(name in self.values for name in _VALUE.findall(text))

    def _size(self) -> int:
        sets = [self.values, self._symbols, *self._pointers.values(), *self._stored.values()]
        return sum(map(len, sets))

    def _follow(self, instruction: Instruction) -> None:
        opcode, text, result = instruction.opcode, instruction.text, instruction.result
        places = self._places(text)
        if opcode.startswith("dma.") and opcode.endswith("to_smem"):
            self._symbols |= self._places(instruction.named.get("smem", text))
        elif opcode == "sst":
            address, _, value = text.rpartition("%" if "%" in text.rpartition("]")[2] else "]")
            held = value.strip() if "%" in text.rpartition("]")[2] else ""
            for symbol in self._places(address):
                self._stored.setdefault(symbol, set()).update(self._pointers.get(held, set()))
            if held in self.values:
                self._symbols |= self._places(address)
        elif result and result[0] in "sp":
            pointed = set(places)
            if opcode == "sld":
                pointed = {other for symbol in places for other in self._stored.get(symbol, ())}
            if self._is_made_unknown(instruction, places):
                self.values.add(result)
            self._pointers.setdefault(result, set()).update(pointed)

    def _is_made_unknown(self, instruction: Instruction, places: set[str]) -> bool:
        opcode, text = instruction.opcode, instruction.text
        if opcode.startswith("inlined_call_operand"):
            return "<no" in opcode  # a scalar itself
        if opcode.startswith("int_to_ptr"):
            return False  # an address: what compares two only checks bounds, or where a result lies
        if opcode.startswith(_POPS) and any(name in self._vectors for name in _VALUE.findall(text)):
            return True
        return self.is_unknown(text) or (opcode == "sld" and bool(places & self._symbols))

    def _places(self, text: str) -> set[str]:
        """The symbols that operands name, or that their values may point to."""
        found = set(_SYMBOL.findall(text))
        for name in _VALUE.findall(text):
            found |= self._pointers.get(name, set())
        return found


def _decided(instruction: Instruction, flow: _Flow) -> Iterator[str]:
    if instruction.opcode == "sbr.rel" and flow.is_unknown(instruction.text):
        yield "a branch depends on data"
    elif instruction.starts_transfer:
        if flow.is_unknown(instruction.named.get("size_in_granules", "")):
            yield "a transfer's size depends on data"
    elif instruction.opcode.startswith(_WAITS) and flow.is_unknown(predicate(instruction.text).rest):
        yield "a wait depends on data"
