"""What the tables of both benchmarks have in common."""

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

from .markdown import MISSING, escaped, head, line, percent
from .own import OWN, PAGED, PAGED_UPDATE, PAGED_WRITE
from .row import Row

RowT = TypeVar("RowT", bound=Row)


def details(title: str, columns: Sequence[str], rows: Sequence[RowT], figures: Callable[[RowT], list[str]]) -> str:
    """One shape's table: figures, and of a candidate that failed alike on some generations one line of why."""
    lines = [f"## {title} (*modelled*)", "", *head(columns)]
    attending = [row for row in rows if row.candidate != PAGED_WRITE]
    for (candidate, error), group in itertools.groupby(attending, lambda row: (row.candidate, row.error)):
        if error:
            generations = ", ".join(row.generation for row in group)
            lines.append(line([candidate, generations, escaped(error), *[""] * (len(columns) - 3)]))
        else:
            lines += [line(figures(row)) for row in group]
    return "\n".join(lines)


def named(row: Row) -> str:
    """A candidate, with what to know about its figures."""
    return f"{row.candidate} ({escaped(row.note)})" if row.note else row.candidate


def against_peers(rows: Sequence[Row]) -> str:
    """The best peer's whole call over that of paged which does the same, of one shape and generation's rows."""
    ratios = [peer.whole_cycles / own.whole_cycles for peer, own in _pairs(rows)]
    return f"{min(ratios):.2f}" if ratios else MISSING


_WHOLE = (
    "candidate",
    "generation",
    "whole call, thousand cycles",
    "kernels",
    "XLA before",
    "between",
    "after",
    "XLA, share",
    "operations",
    "XLA by libtpu's estimates",
)


def whole_calls(rows: Sequence[Row]) -> list[str]:
    """One shape's table of whole calls, and the peers' over paged's; empty where none was modelled."""
    known = [row for row in rows if row.candidate in OWN or row.whole_cycles]
    if not any(row.whole_cycles for row in known):
        return []
    lines = [*head(_WHOLE), *(line(_whole(row)) for row in known if not row.error)]
    ratios = [
        text for generation in dict.fromkeys(row.generation for row in known) for text in _ratios(known, generation)
    ]
    return ["", *lines, *([""] if ratios else []), *ratios]


def _whole(row: Row) -> list[str]:
    if not row.whole_cycles:
        return [row.candidate, row.generation, f"not modelled: {escaped(row.whole_note)}", *[""] * (len(_WHOLE) - 3)]
    xla = row.whole_cycles - row.cycles
    parts = (row.whole_cycles, row.cycles, row.before_cycles, row.between_cycles, row.after_cycles)
    return [
        row.candidate,
        row.generation,
        *(f"{max(0.0, cycles) / 1000:.1f}" for cycles in parts),
        percent(xla / row.whole_cycles),
        str(row.operations),
        f"{row.estimated_cycles / 1000:.1f}",
    ]


def _ratios(rows: Sequence[Row], generation: str) -> list[str]:
    pairs = _pairs([row for row in rows if row.generation == generation])
    return [
        f"- {generation}, {peer.candidate} over {own.candidate}: **{peer.whole_cycles / own.whole_cycles:.2f}**,"
        f" kernels alone {peer.cycles / own.cycles:.2f}"
        for peer, own in pairs
    ]


def _pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Each peer, and our call that does the same work: a peer that writes this step's tokens is beside our update."""
    known = [row for row in rows if row.whole_cycles]
    ours = {row.writes: row for row in known if row.candidate in (PAGED, PAGED_UPDATE)}
    return [(row, ours[row.writes]) for row in known if row.candidate not in OWN and row.writes in ours]
