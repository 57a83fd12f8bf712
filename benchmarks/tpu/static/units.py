"""The units of a core: how often a bundle uses each, by libtpu's own count, and the classes of vector instructions."""

import collections
import re
from collections.abc import Sequence

from .bundles import Bundle
from .chips import Chip

UNITS = (
    "MATMUL",
    "MATPUSH",
    "XLU",
    "VALU",
    "VPOP",
    "EUP",
    "VLOAD",
    "VLOAD:FILL",
    "VSTORE",
    "VSTORE:SPILL",
    "SALU",
)
_SYNCHRONISATION = ("vsync", "vphi", "vdelay", "vtrace", "vstv", "vwait")  # vector opcodes by name only
_MXU = re.compile(r"mxu(\d)")
# The first class one of whose prefixes an opcode has. Products, reductions and transcendentals come before these.
_CLASSES = (
    ("pack", ("vpack", "vunpack")),
    ("mask", ("vsel", "vcmp", "vmand", "vmor", "vmpack", "vnez", "vmxor", "vmneg", "vmslo")),
    ("bits", ("vshrl", "vshll", "vshra", "vand", "vor", "vxor")),
    ("arithmetic", ("vadd", "vsub", "vmul", "vmax", "vmin", "vmac", "vcvt")),
    ("load", ("vld",)),
    ("store", ("vst",)),
    ("pop", ("vpop",)),
    ("move", ("vmov", "vmmov")),
    ("combine", ("vcombine", "vslane")),
)
_TRANSCENDENTAL = ("vexp2", "vpow2", "vrcp", "vtanh", "vrsqrt", "vlog2", "verf")
_ACROSS_LANES = ("vrot", "vxpose", "vperm", "vbcast", "vsetperm", "vtranspose", "vbxpose", "vcxpose")


def parse_utilization(text: str) -> tuple[dict[str, int], list[list[int]]]:
    """``({unit: slots per bundle}, [uses of each of UNITS, for each bundle])`` of libtpu's per-bundle table."""
    names: Sequence[str] = UNITS
    capacity: dict[str, int] = {}
    rows: list[list[int]] = []
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("MATMUL"):
            names = [name.strip() for name in line.split(",")]
            capacity = dict(zip(names, map(int, lines[i + 1].split()), strict=True))
        elif line.startswith("== UTIL"):
            cells = [row.split() for row in lines[i + 1 :]]
            rows = [list(map(int, row)) for row in cells if row and all(cell.isdigit() for cell in row)]
            break
    known = {name: i for i, name in enumerate(names)}
    return capacity, [[row[known[unit]] if unit in known else 0 for unit in UNITS] for row in rows]


def total(rows: Sequence[Sequence[int]], counts: Sequence[int]) -> dict[str, int]:
    """Uses of each unit when each bundle issues as often as ``counts`` says."""
    used = [0] * len(UNITS)
    for row, count in zip(rows, counts, strict=False):
        if count:
            used = [a + b * count for a, b in zip(used, row, strict=True)]
    return dict(zip(UNITS, used, strict=True))


def bundle_kind(bundle: Bundle) -> str:
    """The work of a bundle: vector work, bounds checks, scalar work alone, or nothing (latency)."""
    instructions = bundle.instructions
    if not instructions:
        return "empty"
    if any(i.opcode[0] == "v" and not i.opcode.startswith(_SYNCHRONISATION) for i in instructions):
        return "vector"
    is_check = any(i.opcode.startswith("shalt") or "BoundsCheck" in i.comment for i in instructions)
    return "bounds check" if is_check else "scalar"


def opcode_class(opcode: str) -> str | None:
    """A coarse class of a vector instruction; ``None`` for other instructions."""
    width = "32" if ".f32" in opcode else "16"
    short = opcode.split(".")[0][1:]
    if opcode.startswith(("vmatmul", "vmatpush")):
        return f"{short.rstrip('0123456789')}_{width}"
    if opcode.startswith("vmatprep"):
        return "matprep"
    if opcode.startswith(_TRANSCENDENTAL):
        return f"transcendental:{short}"
    if ".xlane" in opcode and not opcode.startswith("vpop"):
        return "across lanes:reduce"
    if opcode.startswith(_ACROSS_LANES):
        return f"across lanes:{short}"
    if opcode.startswith("vstv"):
        return None
    return next((name for name, prefixes in _CLASSES if opcode.startswith(prefixes)), None)


def matrix_cycles(bundles: Sequence[Bundle], counts: Sequence[int], chip: Chip) -> float:
    """Cycles of the busiest matrix unit: its pushes or its products at the chip's intervals, whichever take longer.

    A schedule may place products closer together than the unit accepts them, so this can exceed the bundles issued.
    """
    used: collections.Counter[tuple[str, str | None]] = collections.Counter()
    for bundle, count in zip(bundles, counts, strict=True):
        for instruction in bundle.instructions if count else ():
            if instruction.opcode.startswith(("vmatmul", "vmatpush")):
                unit = _MXU.search(instruction.opcode + instruction.text)
                used[unit.group(1) if unit else "0", opcode_class(instruction.opcode)] += count
    busiest = 0.0
    for unit in {unit for unit, _ in used}:
        products = used[unit, "matmul_16"] * chip.matmul_interval + used[unit, "matmul_32"] * chip.matmul_f32_interval
        pushes = (used[unit, "matpush_16"] + used[unit, "matpush_32"] / 2) * chip.push_interval
        busiest = max(busiest, products, pushes)
    return busiest
