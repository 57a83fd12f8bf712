"""Cells and lines of Markdown tables."""

from collections.abc import Iterable, Sequence

MISSING = "-"


def line(cells: Iterable[str]) -> str:
    """One line of a table."""
    return " | ".join(cells).join(("| ", " |"))


def head(names: Sequence[str]) -> list[str]:
    """A table's first two lines."""
    return [line(names), "|---" * len(names) + "|"]


def escaped(text: str) -> str:
    """Text that doesn't end its cell."""
    return text.replace("|", "\\|")


def percent(share: float | None) -> str:
    """A share, to two digits where it is small."""
    return MISSING if share is None else f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def span(values: Iterable[float | None]) -> str:
    """The least and the most of what is known."""
    known = [f"{value:.1f}" for value in sorted(v for v in values if v is not None)]
    return MISSING if not known else known[0] if known[0] == known[-1] else f"{known[0]} to {known[-1]}"
