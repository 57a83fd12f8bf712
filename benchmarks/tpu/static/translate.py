"""The scalar program as Python: each straight piece of code, up to a branch and its delay slots, is one function.

The functions take ``(machine, values, registers, memory)``: values by the name that the dump gives them, registers by
theirs, and SMEM by address. Vector instructions are left out: control flow and transfers depend on scalars only.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from . import words
from .bundles import Bundle, Instruction, called_name, operands, predicate
from .expressions import of_predicates, of_words
from .flow import Program

_NAMES = {
    name: getattr(words, name)
    for name in (
        "wrap",
        "unsigned",
        "shift_left",
        "shift_left_ones",
        "shift_right",
        "shift_right_sign",
        "both",
        "quotient_and_remainder",
    )
}
_ALLOCATION = 1000  # symbols below are the kernel's operands
_VALUE = re.compile(r"%(\w+)")
_SPACE = re.compile(r"^\[(smem|vmem|sflag|hbm):")
_STORE = re.compile(r"(\[smem:.*?\])\s*(\(.*?\))?\s*,?\s*(%\S+|-?\d+)$")
_LOAD = re.compile(r"(\[smem:\[[^\]]*\]\])\s*(.*)$")
_OPERAND_INDEX = re.compile(r"index: (\d+)")
_FLOAT = re.compile(r"-?[\d.]+(e[+-]?\d+)?|-?inf|nan")


@dataclasses.dataclass(frozen=True)
class Block:
    """A straight piece of code. ``run`` returns whether the branch at its end is taken, to bundle ``target``."""

    run: Callable[..., bool]
    start: int
    end: int  # the last bundle, delay slots included
    delay: int  # cycles that instructions ask to wait for
    slots: int  # delay slots of the branch
    target: int | None


class Translator:
    """Translates a program's blocks as they are met. ``inputs`` are the values of the kernel's integer operands.

    Transfers and waits under one of the predicates ``assumed`` are made whatever it says.
    """

    def __init__(self, program: Program, inputs: Mapping[int, Any], assumed: Collection[str] = ()):
        self.program = program
        self.inputs = inputs
        self._assumed = assumed
        self.notes: collections.Counter[str] = collections.Counter()  # on what was met and is not modelled
        self.spaces: dict[int, str] = {}  # an operand's memory space
        self._blocks: dict[int, Block] = {}
        self._symbols: dict[str, int] = {}
        self._from_vectors = _from_vectors(program.bundles)

    def block(self, start: int) -> Block:
        """The block that begins at a bundle."""
        if start not in self._blocks:
            self._blocks[start] = self._translate(start)
        return self._blocks[start]

    def _translate(self, start: int) -> Block:
        program, last = self.program, len(self.program.bundles) - 1
        index = next((i for i in range(start, last + 1) if i in program.branches), None)
        slots = 0 if index is None else program.slots[index]
        end = last if index is None else min(last, index + slots)
        if index is not None and any(i in program.branches for i in range(index + 1, end + 1)):
            raise ValueError(f"a branch stands in the delay slots of the branch in bundle {index:#x}")
        lines, delay, taken = [], 0, "False"
        for i in range(start, end + 1):
            for instruction in _in_order(program.bundles[i]):
                if instruction.opcode == "sbr.rel":
                    # Read the condition here: a delay slot may set its register anew before the branch is taken.
                    branch, taken = program.branches[i], "taken"
                    lines.append(f"taken = {_condition(branch.predicate, branch.is_negated)}")
                elif instruction.opcode == "vdelay":
                    cycles = re.search(r"\d+", instruction.text)
                    delay += int(cycles.group()) if cycles else 0
                else:
                    lines += self._statements(instruction, i - start, i)
        lines.append(f"return {taken}")
        source = "\n ".join(["def block(machine, values, registers, memory):", *lines])
        made: dict[str, Any] = dict(_NAMES)
        exec(compile(source, f"block {start:#x}", "exec"), made)
        target = None if index is None else program.branches[index].target
        return Block(made["block"], start, end, delay, slots, target)

    def _statements(self, instruction: Instruction, cycle: int, index: int) -> list[str]:
        """One instruction, ``cycle`` bundles after the block's first one."""
        opcode, result = instruction.opcode, instruction.result
        if result and result[0] == "v" and opcode != "vsyncmov":
            return []
        if opcode.endswith("phi"):
            register = f"registers.get({_register(result)!r}, 0)"
            return [f"values[{result!r}] = {register}"] if result and result[0] in "sp" else []
        if opcode.startswith("inlined_call_operand"):
            return self._operand(instruction)
        condition, otherwise, is_negated, text = predicate(instruction.text)
        when = None if condition is None else _condition(condition, is_negated)
        effect = self._effect(instruction, text, cycle, instruction.place or f"bundle {index:#x}")
        if effect is not None:
            return [effect if when is None or condition in self._assumed else f"if {when}: {effect}"]
        if opcode == "vsyncmov":  # popped by an `spop` that names it
            flag = self._value(operands(text)[0])
            return [f"machine.popped[{result!r}] = machine.transfers.flag({flag}, machine.time + {cycle})"]
        if opcode.startswith("sdivrem"):
            a, b = map(self._value, operands(text))
            return [f"machine.popped[{result!r}] = quotient_and_remainder({a}, {b})"]
        if opcode == "sst":
            return [self._store(text, when)]
        if opcode == "sld":
            return self._load(instruction, text, when, otherwise)
        if result is None or result[0] not in "sp":
            return []
        return _assign(result, self._expression(opcode, text), when, otherwise)

    def _effect(self, instruction: Instruction, text: str, cycle: int, place: str) -> str | None:
        """A transfer, a wait, a semaphore's change or a call; ``None`` for other instructions."""
        opcode = instruction.opcode
        if instruction.starts_transfer:
            given = operands(text)
            size = instruction.named.get("size_in_granules", given[1] if len(given) > 1 else "0")
            flag = instruction.named.get("dst_syncflagno", given[3] if len(given) > 3 else "0")
            what = ", ".join(self._value(token) for token in (given[0], size, given[2], flag))
            return f"machine.start({opcode[4:]!r}, {what}, {cycle})"
        if opcode == "dma.done.wait" or opcode.startswith("vwait.ge"):
            flag, amount = map(self._value, operands(text)[:2])
            return f"machine.wait({flag}, {amount}, {cycle}, {place!r})"
        if opcode == "inlined_call":
            return f"machine.call({called_name(instruction)!r}, {cycle})"
        if opcode in ("vsyncpa", "vsyncadd"):
            flag, amount = map(self._value, operands(text)[:2])
            return f"machine.transfers.flags[{flag}] {'+' if opcode == 'vsyncadd' else ''}= {amount}"
        return None

    def _operand(self, instruction: Instruction) -> list[str]:
        """The kernel's operand: a pointer to it, or a scalar itself where it has no memory space."""
        found = _OPERAND_INDEX.search(instruction.text + instruction.comment)
        index = int(found.group(1)) if found else 0
        known = self.inputs.get(index)
        if "<no" in instruction.opcode:
            if known is None:
                self.notes[f"scalar operand {index} has no value (zero)"] += 1
            value = 0 if known is None else int(np.asarray(known).reshape(-1)[0])
            return _assign(instruction.result, str(value), None, None)
        self.spaces[index] = instruction.opcode.rpartition(".")[2]
        pointer = words.pointer(index + 1)
        fill = [f"machine.fill({index})"] if "smem" in instruction.opcode and known is not None else []
        return [*fill, *_assign(instruction.result, str(pointer), None, None)]

    def _store(self, text: str, when: str | None) -> str:
        found = _STORE.match(text) or _LOAD.match(text)
        if found is None:
            raise ValueError(f"a store to SMEM of an unknown form: {text}")
        condition, _, is_negated, value = predicate(text[found.end(1) :].strip())
        when = when if condition is None else _condition(condition, is_negated)
        store = f"memory[{self._address(found.group(1))}] = {self._value(value.strip().lstrip(','))}"
        return store if when is None else f"if {when}: {store}"

    def _load(self, instruction: Instruction, text: str, when: str | None, otherwise: str | None) -> list[str]:
        found = _LOAD.match(text)
        if found is None:
            raise ValueError(f"a load from SMEM of an unknown form: {text}")
        condition, other, is_negated, _ = predicate(found.group(2))
        when = when if condition is None else _condition(condition, is_negated)
        is_core = "core id" in instruction.comment
        value = "machine.core" if is_core else f"memory.get({self._address(found.group(1))}, 0)"
        return _assign(instruction.result, value, when, other or otherwise)

    def _expression(self, opcode: str, text: str) -> str:
        """The Python expression of a scalar instruction."""
        if opcode in ("spop", "spop.sfrf"):
            name = text.strip().lstrip("%")
            if name in self._from_vectors:
                self.notes["scalar taken from a vector (zero)"] += 1
            return f"machine.popped.get({name!r}, 0)"
        if opcode.startswith("spop.drf"):
            part = 1 if "rem" in opcode else 0
            return f"machine.popped.get({text.strip().lstrip('%')!r}, (0, 0))[{part}]"
        given = operands(text)
        made = of_predicates(opcode, [_truth(token) for token in given])
        if made is not None:
            return made
        if opcode.startswith("int_to_ptr"):
            return self._value(given[-1].split()[-1])
        if opcode.startswith("scalar_lea"):
            return " + ".join(self._value(token if token[0] == "[" else token.split(" [#")[0]) for token in given)
        if opcode.startswith("scalar_select"):
            yes, no = map(self._value, given[1:3])
            return f"({yes} if {_condition(given[0].lstrip('%'), False)} else {no})"
        made = of_words(opcode, [self._value(token) for token in given])
        if made is None:
            self.notes[f"instruction {opcode}"] += 1
        return made or "0"

    def _value(self, token: str) -> str:
        """The Python expression of an operand."""
        token = token.strip()
        if token.startswith("%"):
            return f"values.get({token[1:]!r}, 0)"
        if token.startswith("["):
            return self._address(token)
        if re.fullmatch(r"-?(\d+|0x[0-9a-f]+)", token):
            return str(words.wrap(int(token, 16 if "x" in token else 10)))
        if _FLOAT.fullmatch(token):
            return f"float({token!r})"
        if token in ("true", "false"):
            return token.capitalize()
        self.notes[f"operand {token[:40]}"] += 1
        return "0"

    def _address(self, token: str) -> str:
        """The Python expression of an address such as ``[smem:[#allocation8 + %s4]]`` or ``[#allocation12 + $0x1]``."""
        parts = []
        for part in _SPACE.sub("", token.strip()).replace("[", "").replace("]", "").split("+"):
            part = part.strip()
            if part.startswith("#"):
                symbol = self._symbols.setdefault(part[1:], _ALLOCATION + len(self._symbols))
                parts.append(str(words.pointer(symbol)))
            elif part:
                parts.append(str(int(part[1:], 0)) if part[0] == "$" else self._value(part))
        return f"({' + '.join(parts or ['0'])})"


def _from_vectors(bundles: Sequence[Bundle]) -> set[str | None]:
    """Names of the values that vectors push for scalars to pop.

    A value that another core sent is none of them: kernels compare it with a barrier's cookie, and do no more with it.
    """
    instructions = [instruction for bundle in bundles for instruction in bundle.instructions]
    sent = {f"%{i.result}" for i in instructions if i.opcode == "vpop.ccrf"}
    return {i.result for i in instructions if i.opcode == "vpush" and predicate(i.text).rest.strip() not in sent}


def _in_order(bundle: Bundle) -> list[Instruction]:
    """A bundle's instructions, each after those whose results it uses.

    Phis come first: they read registers that the bundle's other instructions may set.
    """
    first = [i for i in bundle.instructions if i.opcode.endswith("phi")]
    rest = [i for i in bundle.instructions if not i.opcode.endswith("phi")]
    rest.sort(key=lambda i: (i.opcode.startswith("int_to_ptr"), i.opcode == "sst"))
    made_by = {i.result: i for i in rest if i.result}
    ordered: dict[int, Instruction] = {}
    visited: set[int] = set()

    def visit(instruction: Instruction) -> None:
        if id(instruction) not in visited:
            visited.add(id(instruction))
            for name in _VALUE.findall(instruction.text):
                if name in made_by:
                    visit(made_by[name])
            ordered[id(instruction)] = instruction

    for instruction in rest:
        visit(instruction)
    return [*first, *ordered.values()]


def _assign(result: str | None, expression: str, when: str | None, otherwise: str | None) -> list[str]:
    """Set a value and its register, or leave them as they are where the condition doesn't hold."""
    if result is None:
        return []
    targets = f"values[{result!r}] = registers[{_register(result)!r}]"
    if when is None:
        return [f"{targets} = {expression}"]
    kept = f"values.get({otherwise!r}, 0)" if otherwise else f"registers.get({_register(result)!r}, 0)"
    return [f"{targets} = ({expression}) if {when} else {kept}"]


def _register(result: str | None) -> str:
    return (result or "").rpartition("_")[2]


def _condition(register: str | None, is_negated: bool) -> str:
    if register is None:
        return "True"
    return f"{'not ' if is_negated else ''}values.get({register!r}, False)"


def _truth(token: str) -> str:
    """The Python expression of a predicate operand."""
    token = token.strip()
    if token.lstrip("!").startswith("%"):
        value = f"values.get({token.lstrip('!%')!r}, False)"
        return f"(not {value})" if token[0] == "!" else value
    return str(token in ("true", "1"))
