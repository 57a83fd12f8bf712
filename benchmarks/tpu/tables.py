"""What the tables of both benchmarks have in common."""

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

from .markdown import MISSING, escaped, head, line
from .own import PAGED
from .row import Row

RowT = TypeVar("RowT", bound=Row)


def details(title: str, columns: Sequence[str], rows: Sequence[RowT], figures: Callable[[RowT], list[str]]) -> str:
    """One shape's table: figures, and of a candidate that failed alike on some generations one line of why."""
    lines = [f"## {title} (*modelled*)", "", *head(columns)]
    for (candidate, error), group in itertools.groupby(rows, lambda row: (row.candidate, row.error)):
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
    """The best peer's cycles over paged's, of one shape and generation's rows that have cycles."""
    ours = [row.cycles for row in rows if row.candidate == PAGED]
    peers = [row.cycles for row in rows if row.candidate != PAGED]
    return f"{min(peers) / ours[0]:.2f}" if ours and peers else MISSING
