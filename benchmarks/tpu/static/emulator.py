"""`Emulator`: runs a kernel's scalar program with real operands. Vectors are not computed."""

import collections
from typing import Any

import numpy as np

from .chips import Chip
from .transfers import TransferModel, Transfers
from .translate import Translator
from .words import located, pointer

LIMIT = 60_000_000  # bundles issued
_LANES, _SUBLANES = 128, 8


class Emulator:
    """One run of a program on one core.

    ``time`` and ``issued`` are cycles, with and without waits for transfers. ``counts`` has how often the block at each
    bundle ran. A branch that is taken and has fewer delay slots than the kernel's longest costs the difference: the
    compiler fills slots up to there although most are empty, so fewer slots are assumed not to be free.
    """

    def __init__(self, translator: Translator, chip: Chip, model: TransferModel | None, core: int, limit: int = LIMIT):
        self.translator = translator
        self.core = core
        self.transfers = Transfers(chip.granule_bytes, model)
        self.time = 0.0
        self.issued = 0
        self.stalled = 0.0
        self.counts: collections.Counter[int] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()  # cycles by source line
        self.notes: collections.Counter[str] = collections.Counter()
        self.popped: dict[str | None, Any] = {}  # results that another instruction pops
        self._memory: dict[int, int] = {}  # SMEM
        self._limit = limit
        self._granule_words = chip.granule_bytes // 4

    def run(self) -> "Emulator":
        """Run from the first bundle until the last one has issued."""
        translator, bundles = self.translator, self.translator.program.bundles
        longest = max(translator.program.slots.values(), default=0)
        values: dict[str, Any] = {}
        registers: dict[str, Any] = {}
        index = 0
        while index < len(bundles):
            block = translator.block(index)
            self.counts[index] += 1
            is_taken = block.run(self, values, registers, self._memory)
            cycles = block.end + 1 - block.start + block.delay + (longest - block.slots if is_taken else 0)
            self.time += cycles
            self.issued += cycles
            index = block.target if is_taken and block.target is not None else block.end + 1
            if self.issued > self._limit:
                self.notes["stopped at the emulation limit (endless loop?)"] += 1
                break
        return self

    def bundle_counts(self) -> list[int]:
        """The number of times that each bundle issued."""
        counts = [0] * len(self.translator.program.bundles)
        for start, count in self.counts.items():
            for index in range(start, self.translator.block(start).end + 1):
                counts[index] += count
        return counts

    def start(self, kind: str, source: int, granules: int, destination: int, flag: int, cycle: int) -> None:
        """A block's transfer, ``cycle`` bundles after the block's first one."""
        if kind == "general":  # strides of several levels: the direction is in the pointers
            spaces = self.translator.spaces
            kind = "_to_".join(spaces.get(located(end).symbol - 1, "vmem") for end in (source, destination))
        if kind.endswith("to_smem"):  # filled at once: the program reads it only after a wait
            self._copy_to_smem(source, destination, granules)
        self.transfers.start(kind, granules, flag, self.time + cycle)

    def wait(self, flag: int, amount: int, cycle: int, place: str) -> None:
        """A block's wait for a semaphore."""
        now = self.time + cycle
        then = self.transfers.reached(flag, amount, now)
        if then is None:
            self.notes[f"wait never satisfied at {place} (would hang)"] += 1
        elif then > now:
            self.time += then - now
            self.stalled += then - now
            self.waits[place] += then - now  # type: ignore[assignment]

    def call(self, name: str, cycle: int) -> None:
        """A block's call of an operation, ``cycle`` bundles after the block's first one: only `TopLevel` has any."""
        self.notes[f"the call of {name}"] += 1

    def fill(self, index: int) -> None:
        """Put an operand that lives in SMEM there."""
        flat = np.asarray(self.translator.inputs[index]).reshape(-1)
        self._memory.update((pointer(index + 1, i), word) for i, word in enumerate(flat.tolist()))

    def _copy_to_smem(self, source: int, destination: int, granules: int) -> None:
        operand, offset, _ = located(source)
        known = self.translator.inputs.get(operand - 1)
        if known is None:
            self.notes[f"smem operand {operand - 1} has no value (zeros)"] += 1
            return
        symbol, start, shift = located(destination)
        first = offset * self._granule_words
        words = _tiled(np.asarray(known))[first : first + granules * self._granule_words]
        place = pointer(symbol, start >> shift)
        self._memory.update((place + i, word) for i, word in enumerate(words.tolist()))


def _tiled(array: np.ndarray) -> np.ndarray:
    """An array's words in the order of memory: tiles of 8 rows of 128, or of fewer rows where the array has fewer.

    The number of rows of a tile is a power of two.
    """
    if array.ndim < 2:
        return array.reshape(-1)
    flat = array.reshape(-1, array.shape[-1])
    rows = min(_SUBLANES, 1 << max(0, (array.shape[-2] - 1).bit_length()))
    height, width = -(-flat.shape[0] // rows) * rows, -(-flat.shape[1] // _LANES) * _LANES
    padded = np.zeros((height, width), np.int64)
    padded[: flat.shape[0], : flat.shape[1]] = flat
    return padded.reshape(height // rows, rows, width // _LANES, _LANES).transpose(0, 2, 1, 3).reshape(-1)
