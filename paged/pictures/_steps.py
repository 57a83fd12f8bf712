"""`steps`: which request had how many rows in which step: chunks of prompts, decoding, drafts, preemptions."""

from typing import Any

import numpy as np

from paged.runtime import Engine, StepReport

from ._ascii import table
from ._canvas import Canvas, text_width
from ._picture import Picture
from ._records import Source, records_of

_WIDTH, _LEFT = 704, 84
_INNER = _WIDTH - _LEFT - 12
_MOST_REQUESTS, _MOST_COLUMNS, _TEXT_COLUMNS = 64, 620, 90
_HEIGHT, _WIDEST = 18, 30
# What a cell shows where it stands for several steps: the first of these that is there.
_ORDER = ("F", "V", "D", "X", "S", "")


def steps(source: Source) -> Picture:
    """Draw which request had how many rows in which step.

    A column is a step, and a line is a request. A high bar is a chunk of a prompt, with its rows where there is room; a
    half one is a row that decodes; one of two thirds is such a row with drafts that are verified with it. Requests
    of an engine have numbers in the order in which they first had a slot. Those of `generate` have the place of their
    result.

    **Arguments:**

    - `source`: an `Engine` that records, or a list of `StepRecord`, or of the `StepReport` that `generate` gives to
      ``on_step``.

    **Returns:** the picture, of at most 64 requests. Of more steps than it is wide, a column shows several. Raises
    ``ValueError`` where there is no step, and for a report that has tokens and does not say whose they were.

    >>> from paged.runtime import StepRecord
    >>> records = [StepRecord({0: 8}, prompts=(0,)), StepRecord({0: 1, 1: 7}, prompts=(1,)), StepRecord({1: 1})]
    >>> print(paged.pictures.steps(records).text)
    request 0 #d
    request 1  #d
    # chunk of a prompt  d decoding  v with drafts  x preempted, waits  . has a slot, no row
    2 requests in 3 steps, 17 rows: 15 of prompts, 2 of decoding
    """
    records = records_of(source)
    if not isinstance(source, Engine):
        for report in source:
            if isinstance(report, StepReport) and sum(report.rows.values()) != report.tokens:
                raise ValueError(
                    f"A StepReport that is drawn says in rows= whose its tokens were: {report.tokens} in all; got "
                    f"rows={dict(report.rows)}. generate makes such reports."
                )
    states, rows = _matrices(records)
    prompts = sum(record.rows[number] for record in records for number in record.prompts)
    total = int(rows.sum())
    title = f"{len(states)} requests in {len(records)} steps"
    words = f"{title}, {total} rows: {prompts} of prompts, {total - prompts} of decoding"
    drafts = sum(sum(record.drafted.values()) for record in records)
    if drafts:
        accepted = sum(record.drawn.get(number, 1) - 1 for record in records for number in record.drafted)
        words += f"; {accepted} of {drafts} drafts accepted"
    shown = states[:_MOST_REQUESTS]
    if len(states) > len(shown):
        words += f". The first {len(shown)} requests are drawn"
    return Picture.of(_drawn(shown, rows, title, words), title, words, _text(shown, words))


def _matrices(records: Any) -> tuple[np.ndarray, np.ndarray]:
    """For each request and step its state, and its rows."""
    numbers = [number for record in records for number in (*record.rows, *record.preempted)]
    count = max(numbers, default=-1) + 1
    states, rows = np.full((count, len(records)), "", dtype="U1"), np.zeros((count, len(records)), int)
    waiting: set[int] = set()
    for i, record in enumerate(records):
        waiting = (waiting | set(record.preempted)) - record.rows.keys()
        states[sorted(waiting), i] = "X"
        for number, own in record.rows.items():
            rows[number, i] = own
            is_drafted = number in record.drafted
            states[number, i] = "F" if number in record.prompts else "S" if own == 0 else "V" if is_drafted else "D"
    return states, rows


def _in_columns(states: np.ndarray, most: int) -> np.ndarray:
    """At most so many columns: each shows what is first in `_ORDER` of its steps."""
    step = -(-states.shape[1] // most)
    if step <= 1:
        return states
    rank = np.argmax(states[..., None] == np.array(_ORDER), axis=-1)
    return np.array(_ORDER)[np.minimum.reduceat(rank, np.arange(0, states.shape[1], step), axis=1)]


def _drawn(states: np.ndarray, rows: np.ndarray, title: str, words: str) -> Canvas:
    canvas, cells = Canvas(_WIDTH), _in_columns(states, _MOST_COLUMNS)
    top = canvas.lines(12, 24, title, _WIDTH - 24, size=14, style="h") + 4
    width = min(_WIDEST, _INNER / cells.shape[1])
    for i in range(len(states)):
        canvas.text(_LEFT - 6, top + i * _HEIGHT + 13, f"request {i}", size=10, anchor="end", style="d")
    canvas.tiles(_LEFT, top, width, _HEIGHT, cells)
    if cells.shape == states.shape:
        for i, j in np.argwhere(states == "F").tolist():
            label = str(rows[i, j])
            if text_width(label, 10) <= width - 2:
                x, y = _LEFT + (j + 0.5) * width, top + i * _HEIGHT + 13
                canvas.text(x, y, label, size=10, anchor="middle", style="n")
    y = top + len(states) * _HEIGHT + 14
    last = f"step {states.shape[1] - 1}"
    canvas.text(_LEFT, y, "step 0", size=10, style="d")
    right = max(_LEFT + width * cells.shape[1], _LEFT + text_width("step 0", 10) + text_width(last, 10) + 8)
    if states.shape[1] > 1:
        canvas.text(right, y, last, size=10, anchor="end", style="d")
    entries = [("F", "a chunk of its prompt"), ("D", "decodes")]
    entries += [("V", "decodes, with drafts")] * bool(np.any(states == "V"))
    entries += [("X", "preempted: waits again")] * bool(np.any(states == "X"))
    entries += [("S", "has a slot, and no row")] * bool(np.any(states == "S"))
    y = canvas.legend(12, y + 26, entries, _WIDTH - 24)
    canvas.lines(12, y + 2, words, _WIDTH - 24, style="d")
    return canvas


def _text(states: np.ndarray, words: str) -> str:
    lines = table(_in_columns(states, _TEXT_COLUMNS))
    legend = "# chunk of a prompt  d decoding  v with drafts  x preempted, waits  . has a slot, no row"
    return "\n".join([*(f"{f'request {i}':<9} {line}".rstrip() for i, line in enumerate(lines)), legend, words])
