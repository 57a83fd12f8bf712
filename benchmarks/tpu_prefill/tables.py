"""Rows as Markdown tables: cycles over the floor, mixed batches over their parts, then every figure by shape."""

from benchmarks.tpu import PAGED_WRITE
from benchmarks.tpu.markdown import MISSING, head, line
from benchmarks.tpu.tables import against_peers, details, named, whole_calls

from .row import Row
from .shapes import SHAPES, Shape, describe

_COLUMNS = (
    "candidate",
    "generation",
    "cycles / floor",
    "cycles, thousands",
    "bundles",
    "of the transfers' model",
    "of the matrix unit",
    "bytes read / needed",
    "HBM cycles / cycles",
    "spills per bundle",
    "VMEM MiB",
    "compile s",
    "kernels",
    "cores",
    "transfers",
)
_REFUSALS = ("ValueError", "NotImplementedError", "ModuleNotFoundError")  # what was decided before compiling


def tables(rows: list[Row]) -> str:
    """The summary, the mixed batches, and a table a shape."""
    shapes = list(dict.fromkeys(row.shape for row in rows))
    made = [_summary(rows, shapes), *_mixed(rows, [SHAPES[name] for name in shapes if SHAPES[name].parts])]
    return "\n\n".join([*made, *(_details([r for r in rows if r.shape == name]) for name in shapes)])


def floor_ratio(row: Row | None) -> float | None:
    """Modelled cycles over the matrix unit's floor."""
    return None if row is None or row.error or not row.is_emulated else row.cycles / row.floor_cycles


def _summary(rows: list[Row], shapes: list[str]) -> str:
    generations = list(dict.fromkeys(row.generation for row in rows))
    lines = [
        "## Summary (*modelled*)",
        "",
        "Cycles over the matrix unit's for the visible pairs, on one core.",
        "",
        *head(["shape", "candidate", *generations]),
    ]
    for shape in (name for name in shapes if not SHAPES[name].is_decode):
        mine = [row for row in rows if row.shape == shape and row.candidate != PAGED_WRITE]
        for candidate in dict.fromkeys(row.candidate for row in mine):
            by_generation = {row.generation: row for row in mine if row.candidate == candidate}
            lines.append(line([shape, candidate, *(_ratio_cell(by_generation.get(g)) for g in generations)]))
        against = [_against_peers(mine, generation) for generation in generations]
        if any(text != MISSING for text in against):
            lines.append(line([shape, "best peer's whole call over paged's", *against]))
    return "\n".join(lines)


def _mixed(rows: list[Row], shapes: list[Shape]) -> list[str]:
    """How much more a mixed batch takes than its parts, each run alone."""
    if not shapes:
        return []
    generations = list(dict.fromkeys(row.generation for row in rows))
    lines = [
        "## Mixed batches over the sum of their parts (*modelled*)",
        "",
        *head(["shape", "candidate", *generations]),
    ]
    for shape in shapes:
        for candidate in dict.fromkeys(row.candidate for row in rows if row.shape == shape.name):
            cells = [_part_ratio(rows, shape, candidate, generation) for generation in generations]
            lines.append(line([shape.name, candidate, *cells]))
    return ["\n".join(lines)]


def _part_ratio(rows: list[Row], shape: Shape, candidate: str, generation: str) -> str:
    found = {row.shape: row for row in rows if (row.candidate, row.generation) == (candidate, generation)}
    whole, parts = found.get(shape.name), [found.get(name) for name in shape.parts]
    if whole is not None and whole.error:
        return _failure(whole)
    if floor_ratio(whole) is None or any(floor_ratio(part) is None for part in parts):
        return MISSING
    cycles = [row.cycles for row in (whole, *parts) if row is not None]
    return f"{cycles[0] / sum(cycles[1:]):.2f}"


def _details(rows: list[Row]) -> str:
    kernels = details(f"{rows[0].shape}: {describe(SHAPES[rows[0].shape])}", _COLUMNS, rows, _figures)
    return "\n".join([kernels, *whole_calls(rows)])


def _figures(row: Row) -> list[str]:
    compiled = [f"{row.vmem_bytes / 2**20:.1f}", f"{row.compile_seconds:.1f}", str(len(row.kernels))]
    if floor_ratio(row) is None:
        return [named(row), row.generation, "compiled only", *[MISSING] * 7, *compiled, MISSING, MISSING]
    return [
        named(row),
        row.generation,
        f"{row.cycles / row.floor_cycles:.2f}",
        *(f"{cycles / 1000:.1f}" for cycles in (row.cycles, row.bundles, row.model_cycles, row.mxu_cycles)),
        f"{row.read_bytes / row.visible_bytes:.2f}",
        f"{row.needed_cycles / row.cycles:.2f}",
        f"{row.spills / row.all_bundles:.2f}",
        *compiled,
        str(row.cores),
        str(row.transfers),
    ]


def _ratio_cell(row: Row | None) -> str:
    if row is None:
        return MISSING
    ratio = floor_ratio(row)
    return _failure(row) if row.error else "compiled" if ratio is None else f"{ratio:.2f}"


def _failure(row: Row) -> str:
    """In a word; the shape's own table has the text."""
    return "refused" if row.error.startswith(_REFUSALS) else "error"


def _against_peers(rows: list[Row], generation: str) -> str:
    return against_peers([row for row in rows if row.generation == generation and floor_ratio(row) is not None])
