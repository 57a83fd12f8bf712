"""`pool`: which pages were held over time: by sequences, by several of them, by the prefix cache alone, by nobody."""

import numpy as np

from ._canvas import Canvas, Number
from ._picture import Picture
from ._records import Source, records_of

_WIDTH, _LEFT, _HEIGHT = 704, 56, 180
_INNER = _WIDTH - _LEFT - 12
_TEXT = 64, 10  # columns and lines
_MARKS = 14  # pixels for the triangles of preemptions
_BANDS = (("used", "F", "#"), ("shared", "stripes", "s"), ("cached", "dots", "c"))


def pool(source: Source, *, group: int = 0) -> Picture:
    """Draw a pool of pages over the steps of serving: used, shared, cached and free pages, and preemptions.

    **Arguments:**

    - `source`: an `Engine` that records, or a list of `StepRecord`, or of the `StepReport` that `generate` gives to
      ``on_step``. Of a pool in several groups, a report does not say what is shared and cached.
    - `group`: which group of layers, of a pool in groups.

    **Returns:** the picture. Of more steps than it is wide, a column shows the most of some steps. Raises
    ``ValueError`` where there is no step, and for a group that there is not.

    >>> from paged.runtime import StepRecord
    >>> records = [StepRecord({0: 4}, pages=(8,), used=(used,), cached=(1,)) for used in (2, 4, 7)]
    >>> print(paged.pictures.pool(records).text)
         8 |  c
           |  #
           |  #
           | c#
           | ##
           |c##
           |###
         0 |###
    # used  s shared  c cached  3 steps
    at most 7 of 8 pages used, 0 shared, 1 cached; 0 preemptions in 3 steps
    """
    records = records_of(source)
    if not all(0 <= group < len(record.pages) for record in records):
        raise ValueError(f"group must be in [0, {len(records[0].pages)}); got {group}.")
    total = max(record.pages[group] for record in records)
    held = np.array([[record.used[group], record.shared[group], record.cached[group]] for record in records])
    preempted = np.array([len(record.preempted) for record in records])
    most, count = held.max(axis=0), int(preempted.sum())
    title = f"A pool of {total} pages over {len(records)} steps"
    words = (
        f"at most {most[0]} of {total} pages used, {most[1]} shared, {most[2]} cached; "
        f"{count} preemption{'s' * (count != 1)} in {len(records)} steps"
    )
    step = -(-len(records) // _INNER)
    return Picture.of(_drawn(held, preempted, total, step, title, words), title, words, _text(held, total, words))


def _drawn(held: np.ndarray, preempted: np.ndarray, total: int, step: int, title: str, words: str) -> Canvas:
    canvas, at = Canvas(_WIDTH), np.arange(0, len(held), step)
    columns, marks = np.maximum.reduceat(held, at, axis=0), np.add.reduceat(preempted, at)
    top = canvas.lines(12, 24, title, _WIDTH - 24, size=14, style="h") + 4
    bottom = top + _HEIGHT
    width, scale = _INNER / len(columns), _HEIGHT / max(total, 1)
    used, shared, cached = columns.T
    canvas.rect(_LEFT, top, _INNER, _HEIGHT, "o")
    canvas.path(_area(used - shared, 0 * used, width, scale, bottom), "fF")
    canvas.path(_area(used, used - shared, width, scale, bottom), "l", pattern="stripes")
    canvas.path(_area(used + cached, used, width, scale, bottom), "l", pattern="dots")
    canvas.path(_line(used, width, scale, bottom), "k")
    canvas.text(_LEFT - 6, top + 9, str(total), size=10, anchor="end", style="d")
    canvas.text(_LEFT - 6, bottom, "0", size=10, anchor="end", style="d")
    for i in np.flatnonzero(marks).tolist():
        x = _LEFT + (i + 0.5) * width
        canvas.path(f"M{x:.1f} {bottom + 3:.1f}l4 8h-8z", "fW")
    y = bottom + _MARKS + 14
    canvas.text(_LEFT, y, "step 0", size=10, style="d")
    canvas.text(_LEFT + _INNER, y, f"step {len(held) - 1}", size=10, anchor="end", style="d")
    entries = [("F", "used by one"), ("stripes", "shared by several"), ("dots", "only the prefix cache"), ("", "free")]
    y = canvas.legend(12, y + 26, entries, _WIDTH - 24)
    if marks.any():
        canvas.path(f"M19 {y - 11:.1f}l6 12h-12z", "fW")
        canvas.text(32, y, "a sequence gave up its pages, and waited again")
        y += 20
    canvas.lines(12, y + 2, words, _WIDTH - 24, style="d")
    return canvas


def _area(upper: np.ndarray, lower: np.ndarray, width: Number, scale: Number, bottom: Number) -> str:
    """The area between two numbers of pages for each column, as a path."""
    if not np.any(upper > lower):
        return "M0 0"
    there = _edge(upper, width, scale, bottom)
    back = _edge(lower, width, scale, bottom)[::-1]
    return "M" + "L".join(f"{x:.4g} {y:.4g}" for x, y in [*there, *back]) + "z"


def _line(upper: np.ndarray, width: Number, scale: Number, bottom: Number) -> str:
    return "M" + "L".join(f"{x:.4g} {y:.4g}" for x, y in _edge(upper, width, scale, bottom))


def _edge(pages: np.ndarray, width: Number, scale: Number, bottom: Number) -> list[tuple[float, float]]:
    """The corners of a line of steps; those between equal columns are left out."""
    changes = np.concatenate([[0], np.flatnonzero(np.diff(pages)) + 1, [len(pages)]])
    found = []
    for first, last in zip(changes[:-1].tolist(), changes[1:].tolist(), strict=True):
        y = bottom - float(pages[first]) * scale
        found += [(_LEFT + first * width, y), (_LEFT + last * width, y)]
    return found


def _text(held: np.ndarray, total: int, words: str) -> str:
    columns, lines = _TEXT
    step = -(-len(held) // columns)
    used, shared, cached = np.maximum.reduceat(held, np.arange(0, len(held), step), axis=0).T
    found = []
    height = min(lines, max(total, 1))
    for i in range(height):
        least = total * (height - i - 1) / height  # a letter stands where its pages reach above this
        row = ["#" if u - s > least else "s" if u > least else "c" if u + c > least else " "
               for u, s, c in zip(used.tolist(), shared.tolist(), cached.tolist(), strict=True)]  # fmt: skip
        label = str(total) if i == 0 else "0" if i == height - 1 else ""
        found.append(f"{label:>6} |{''.join(row)}".rstrip())
    each = f"{step} steps in a column" if step > 1 else f"{len(held)} steps"
    return "\n".join([*found, f"# used  s shared  c cached  {each}", words])
