"""The compiler's dumps of one compilation: which operations there are, and what the dumps say of each."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from .bundles import OWN
from .compiling import PROGRAM, SCALARS

_BUNDLES = re.compile(r"^(\d+)-(.+)-\d+-final_bundles\.txt$")
_TOP_LEVEL = "TLP"  # the program that calls the operations
_NUMBERS = re.compile(r"(\.\d+)*$")  # that XLA appends to a name
_VMEM = re.compile(r"const DATA =(\{.*?\n\});", re.S)
_ESTIMATE = re.compile(r'hlo_op_name: "([^"]*)"\s+estimated_cycles: (\d+)')
_PROFILE_HEAD = re.compile(r"HLO: %?([^\s=]+)")
_PROFILE_COUNT = re.compile(r"\s*- ([\w :]+?): \((\d+)/\d+\)")


@dataclasses.dataclass
class Operation:
    """One operation with code of its own. ``is_kernel`` says whether it is a Pallas kernel.

    Its code is called from that of ``is_top_level``, which is no operation, nor are those of ``is_own``: the compiler's
    own code that begins and ends a program.
    """

    name: str
    is_kernel: bool
    bundles: str  # the dump's text
    utilization: str

    @property
    def is_top_level(self) -> bool:
        """Whether it is the program that calls the operations."""
        return self.name == _TOP_LEVEL

    @property
    def is_own(self) -> bool:
        """Whether it is the compiler's own code around a program."""
        return self.name.startswith(OWN)


class Dumps:
    """A folder of dumps, with the memory, spills and estimates by an operation's name."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        assemblies = sorted(folder.glob("*-assembly.txt"))
        self.assembly = assemblies[-1].read_text(errors="replace") if assemblies else None
        text = folder / PROGRAM
        self.hlo = text.read_text() if text.exists() else ""  # the optimised program
        self.vmem = _vmem(folder)  # (bytes, bytes of spills)
        self.smem_spills = _smem_spills(folder)
        self.estimates: dict[str, int] = {}  # libtpu's own cycles
        for path in folder.glob("*static_llo_profile.textproto"):
            self.estimates |= {name: int(cycles) for name, cycles in _ESTIMATE.findall(path.read_text())}

    def operations(self) -> Iterator[Operation]:
        """Every operation, in the order in which they were compiled. Two that are alike have one dump."""
        return (made for made in self.programs() if not made.is_top_level and not made.is_own)

    def programs(self) -> Iterator[Operation]:
        """The operations, the program that calls them, and the compiler's own code."""
        for path in sorted(self.folder.glob("*-final_bundles.txt")):
            found = _BUNDLES.match(path.name)
            if found is None or "schedule-analysis" in path.name:
                continue
            stamp, name = found.groups()
            analysis = self._beside(stamp, name, "schedule-analysis_final_bundles.txt")
            utilization = self._beside(stamp, name, "final_hlo-static-per-bundle-utilization.txt")
            yield Operation(name, "tpu_custom_call" in analysis, path.read_text(errors="replace"), utilization)

    def scalars(self) -> list[tuple[str, dict[int, Any]]]:
        """Integer operands of each kernel by its name in the program, in the order of the calls."""
        path = self.folder / SCALARS
        if not path.exists():
            return []
        kept: dict[tuple[int, str], dict[int, Any]] = {}
        with np.load(path) as arrays:
            for key in arrays.files:
                call, _, index = key.rpartition("|")
                number, _, name = call.partition(":")
                kept.setdefault((int(number), name), {})[int(index)] = arrays[key]
        return [(name.replace("-", "_"), values) for (_, name), values in sorted(kept.items())]

    def has_equal_scalars(self, kernel: str) -> bool:
        """Whether every call of a kernel of this name has the same scalars, so that one run stands for all."""
        calls = [values for name, values in self.scalars() if name == kernel_name(kernel)]
        first = calls[0] if calls else {}
        return all(
            values.keys() == first.keys() and all(np.array_equal(values[i], first[i]) for i in first)
            for values in calls
        )

    def _beside(self, stamp: str, name: str, kind: str) -> str:
        """Another dump of an operation; empty where there is none."""
        ends = re.compile(rf"{stamp}-{re.escape(name)}-\d+-{re.escape(kind)}$")
        return next((p.read_text(errors="replace") for p in self.folder.iterdir() if ends.match(p.name)), "")


def kernel_name(operation: str) -> str:
    """A kernel's name in the program, of an operation's: XLA appends numbers, and may write hyphens."""
    return _NUMBERS.sub("", operation).replace("-", "_")


def _vmem(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """``{operation: (bytes, bytes of spills)}`` from the data in libtpu's report, which is a page of HTML."""
    found: dict[str, tuple[int, int]] = {}
    for path in folder.glob("*vmem_report.html"):
        data = _VMEM.search(path.read_text(errors="replace"))
        for name, entry in (json.loads(data.group(1)) if data else {}).get("hlo_breakdowns", {}).items():
            allocations = [a for block in entry["blocks"] for a in block.get("allocations", [])]
            spills = sum(a["size"] for a in allocations if "spill" in a.get("tag", "").lower())
            found[name] = (entry.get("total_size", 0), spills)
    return found


def _smem_spills(folder: pathlib.Path) -> dict[str, int]:
    """``{operation: scalar registers spilled}`` from libtpu's profile."""
    found: dict[str, int] = {}
    for path in folder.glob("*hlo-static-bundle-profile.txt"):
        name = ""
        for line in path.read_text(errors="replace").splitlines():
            head, count = _PROFILE_HEAD.match(line), _PROFILE_COUNT.match(line)
            if head:
                name = head.group(1)
            elif count and count.group(1) == "SMEM_SPILL_COUNT":
                found[name] = found.get(name, 0) + int(count.group(2))
    return found
