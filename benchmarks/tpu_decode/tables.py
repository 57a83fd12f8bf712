"""Rows as Markdown tables: the issue's summary, then every figure, shape by shape."""

from benchmarks.tpu import PAGED_WRITE
from benchmarks.tpu.markdown import MISSING, head, line, percent, span
from benchmarks.tpu.tables import against_peers, details, named, whole_calls

from .candidates import CEILING
from .row import Row
from .shapes import SHAPES, describe

_COLUMNS = (
    "candidate",
    "generation",
    "share of HBM",
    "of the ceiling",
    "bundles per token",
    "bytes read / visible",
    "cycles / needed, a sequence",
    "compile s",
    "VMEM MiB",
    "spills per token",
    "cores",
    "transfers",
)


def tables(rows: list[Row]) -> str:
    """The summary, and a table a shape."""
    shapes = list(dict.fromkeys(row.shape for row in rows))
    return "\n\n".join([_summary(rows, shapes), *(_details([r for r in rows if r.shape == name]) for name in shapes)])


def _summary(rows: list[Row], shapes: list[str]) -> str:
    generations = list(dict.fromkeys(row.generation for row in rows))
    lines = [
        "## Summary (*modelled*)",
        "",
        "Share of HBM bandwidth, and in brackets of the ceiling; bundles issued a KV token over all heads.",
        "",
        *head(["shape", "candidate", *generations, "bundles per token"]),
    ]
    for shape in shapes:
        mine = [row for row in rows if row.shape == shape and row.candidate != PAGED_WRITE]
        for candidate in dict.fromkeys(row.candidate for row in mine):
            by_generation = {row.generation: row for row in mine if row.candidate == candidate}
            shares = [_both_shares(by_generation.get(generation), mine) for generation in generations]
            lines.append(line([shape, candidate, *shares, span([_bundles(r) for r in by_generation.values()])]))
        against = [_against_peers(mine, generation) for generation in generations]
        if any(text != MISSING for text in against):
            lines.append(line([shape, "best peer's whole call over paged's", *against, ""]))
    return "\n".join(lines)


def _details(rows: list[Row]) -> str:
    shape = SHAPES[rows[0].shape]
    title = f"{shape.name}: {describe(shape)}"
    kernels = details(title, _COLUMNS, rows, lambda row: _figures(row, rows, shape.num_seqs))
    return "\n".join([kernels, *whole_calls([row for row in rows if row.candidate != CEILING])])


def _figures(row: Row, rows: list[Row], num_seqs: int) -> list[str]:
    cycles, needed = row.cycles / num_seqs, row.needed_cycles / num_seqs
    return [
        named(row),
        row.generation,
        percent(_share(row)),
        percent(_share_of_ceiling(row, rows)),
        f"{_bundles(row):.2f}",
        f"{row.read_bytes / row.visible_bytes:.2f}",
        f"{cycles:.0f} / {needed:.0f} = {row.cycles / row.needed_cycles:.2f}x",
        f"{row.compile_seconds:.1f}",
        f"{row.vmem_bytes / 2**20:.1f}",
        f"{row.spills / row.tokens:.2f}",
        str(row.cores),
        str(row.transfers),
    ]


def _share(row: Row | None) -> float | None:
    return None if row is None or row.error else row.needed_cycles / row.cycles


def _share_of_ceiling(row: Row | None, rows: list[Row]) -> float | None:
    if row is None or row.error:
        return None
    found = [r for r in rows if r.candidate == CEILING and r.generation == row.generation and not r.error]
    return found[0].cycles / row.cycles if found else None


def _both_shares(row: Row | None, rows: list[Row]) -> str:
    if row is None:
        return MISSING
    if row.error:
        return "error"
    share, of_ceiling = _share(row), _share_of_ceiling(row, rows)
    return percent(share) if row.candidate == CEILING or of_ceiling is None else f"{percent(share)} ({of_ceiling:.2f})"


def _against_peers(rows: list[Row], generation: str) -> str:
    mine = [row for row in rows if row.generation == generation and not row.error]
    return against_peers([row for row in mine if row.candidate != CEILING])


def _bundles(row: Row) -> float | None:
    return None if row.error else row.bundles / row.tokens
