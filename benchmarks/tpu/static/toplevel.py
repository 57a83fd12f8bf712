"""`TopLevel`: runs the program that calls the operations: loops, copies under way, scalars read back from memory."""

import dataclasses
from collections.abc import Mapping, Sequence

from .bundles import OWN, Bundle, Instruction, called_name
from .chips import Chip
from .emulator import LIMIT, Emulator
from .flow import Branch, Program
from .transfers import TransferModel
from .translate import Translator

_NEVER = "never"  # a predicate that no instruction sets


@dataclasses.dataclass
class Call:
    """One operation that ran, from cycle ``start`` on."""

    name: str
    start: float
    cycles: float


class TopLevel(Emulator):
    """A run of the top-level program. An operation takes the cycles that it took by itself.

    ``calls`` are the operations in the order in which they ran. ``missing`` are those whose cycles are not known.
    """

    def __init__(self, program: Program, costs: Mapping[str, float], chip: Chip, model: TransferModel):
        super().__init__(Translator(program, {}), chip, model, 0, LIMIT)
        self.costs = costs
        self.calls: list[Call] = []
        self.missing: dict[str, None] = {}

    def call(self, name: str, cycle: int) -> None:
        """Let an operation's cycles pass."""
        cycles = self.costs.get(name)
        if cycles is None:
            self.missing[name] = None
            cycles = 0.0
        self.calls.append(Call(name, self.time + cycle, cycles))
        self.time += cycles


def top_level_program(bundles: Sequence[Bundle], slots: Mapping[int, int]) -> Program:
    """The top-level program as it runs where it is meant to: past the check of what it was compiled for.

    The program begins by checking that, and where the check fails goes on behind the last operation. Where its
    arguments are, it reads from memory that holds 0 here; so a donated array lies where its result does.
    """
    program = Program(bundles, slots)
    at = [bundle.index for bundle in bundles for i in bundle.instructions if _is_operation(i)]
    for index, branch in program.branches.items():
        if at and index < at[0] and branch.target > at[-1]:
            program.branches[index] = Branch(_NEVER, False, branch.target)
    return program


def calls_of(bundles: Sequence[Bundle]) -> list[str]:
    """The operations that a program calls, each once, in the order of the code."""
    return list(dict.fromkeys(called_name(i) for bundle in bundles for i in bundle.instructions if _is_operation(i)))


def _is_operation(instruction: Instruction) -> bool:
    return instruction.opcode == "inlined_call" and not called_name(instruction).startswith(OWN)
