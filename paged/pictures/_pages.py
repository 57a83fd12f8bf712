"""`pages`: the mask on the pages of a step, in the order of tables and in the pool."""

from typing import Any

import numpy as np

from paged.lower import Attend, ShardedAttend
from paged.spec import GroupedBatch, RaggedBatch, batch_for

from ._answers import Step
from ._ascii import table
from ._canvas import Canvas, Number, shortened
from ._picture import Picture

_WIDTH = 704
_INNER = _WIDTH - 24
_TILE, _TILE_GAP = (80, 38), 5
_LARGE_PAGES, _LARGE_POOL = 48, 64  # at most so many are drawn with their numbers and tokens
_TOKENS = 16  # cells for the tokens of a page, at most
_POOL_CELLS = 2**15
_TEXT_WIDTH = 64


def pages(
    attend: Attend | ShardedAttend,
    batch: RaggedBatch | GroupedBatch,
    sequence: int | None = None,
    *,
    num_pages: int | None = None,
) -> Picture:
    """Draw a mask on the physical pages of one step: which pages are visited, skipped, shared and freed.

    The pages stand twice: in the order of the block tables, and where they lie in the pool. Few pages are drawn with
    their numbers and their tokens. Which pages are visited is what `explain` counts, by the same function.

    **Arguments:**

    - `attend`: a lowered attention. One over a mesh is drawn as if one device held all pages.
    - `batch`: the step, with concrete arrays. Of a `GroupedBatch` the table of this spec's group is used.
    - `sequence`: the slot of the sequence that is drawn. None for all sequences.
    - `num_pages`: pages of the pool. None: up to the last page that a live sequence has.

    **Returns:** the picture. A slot without tokens has no pages. Raises ``ValueError`` for a slot that there is not,
    and for a batch with a leading axis of shards.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, window=4)
    >>> attend = paged.lower(spec, PageLayout(page_size=2, num_kv_heads=2, head_dim=8))
    >>> batch = RaggedBatch.decode(lengths=[7, 3], block_tables=[[5, 1, 0, 2], [3, 4, -1, -1]])
    >>> print(paged.pictures.pages(attend, batch, num_pages=8).text)
    in table order
      seq 0 .+#+  7 tokens
      seq 1 #+    3 tokens
    in the pool
          0 #++#+.--
    # visited, in full  + visited, masked  . skipped  x freed  o no row in this step  - free
    5 pages visited, 1 skipped, 0 freed, 0 shared, 2 of 8 free
    """
    own: Any = batch_for(attend.spec, batch)
    if own.lengths.ndim != 1:
        raise ValueError(
            f"pages draws one batch; got lengths {own.lengths.shape}, of several shards. Draw one of them."
        )
    if sequence is not None and not 0 <= sequence < own.num_slots:
        raise ValueError(f"sequence must be a slot in [0, {own.num_slots}), or None for all; got {sequence}.")
    return draw(Step.of(attend.program, own, attend.layout.page_size, num_pages), sequence)


def draw(step: Step, sequence: int | None = None) -> Picture:
    """`pages`, of a step that has been asked for."""
    states, holders = step.states(), step.holders()
    slots = [sequence] if sequence is not None else [s for s in range(len(states)) if np.any(states[s] != "")]
    shown = (
        states if sequence is None else np.where(np.arange(len(states))[:, None] == sequence, states, _others(states))
    )
    whose = "all sequences" if sequence is None else f"sequence {sequence}"
    title = f"The pages of {whose}, where {step.program.visibility}"
    counts = _counts(states[slots], step, slots)
    canvas = Canvas(_WIDTH)
    y = canvas.lines(12, 24, title, _INNER, size=14, style="h") + 4
    canvas.text(12, y, "in table order", style="h")
    marks = {slot: step.tokens_seen(slot) for slot in slots} if _is_large(states, slots) else {}
    y = _in_order(canvas, y + 8, step, states, slots, marks)
    canvas.text(12, y + 18, f"in the pool of {step.num_pages} pages", style="h")
    y = _in_pool(canvas, y + 26, step, shown, holders, slots, marks)
    y = canvas.legend(12, y + 26, _legend(states[slots], shown, bool(np.any(holders > 1)), bool(marks)), _INNER)
    canvas.lines(12, y + 2, counts, _INNER, style="d")
    return Picture.of(canvas, title, counts, _text(step, states, shown, slots, counts))


def _others(states: np.ndarray) -> np.ndarray:
    return np.where(np.isin(states, ("F", "P", "S", "O")), "O", "")


def _counts(states: np.ndarray, step: Step, slots: list[int]) -> str:
    visited = int(np.sum(np.isin(states, ("F", "P"))))
    skipped, freed = (int(np.sum(states == letter)) for letter in "SX")
    holders = step.holders()
    ids = np.unique(step.seen.tables[slots][np.isin(states, ("F", "P", "S", "O"))]) if slots else np.zeros(0, int)
    shared, free = int(np.sum(holders[ids] > 1)), int(np.sum(holders == 0))
    return (
        f"{visited} pages visited, {skipped} skipped, {freed} freed, {shared} shared, {free} of {step.num_pages} free"
    )


def _legend(states: np.ndarray, shown: np.ndarray, has_shared: bool, has_marks: bool) -> list[tuple[str, str]]:
    entries = [("F", "visited: every row sees all of it"), ("P", "visited: masked"), ("S", "skipped")]
    entries += [("X", "freed: the table has no page")] * bool(np.any(states == "X"))
    entries += [("O", "of other sequences" if not np.any(states == "O") else "no row in this step")] * bool(
        np.any(shown == "O")
    )
    entries += [("2", "line on top: shared")] * has_shared
    return entries


def _is_large(states: np.ndarray, slots: list[int]) -> bool:
    """Whether each page has a tile of its own, with its number and its tokens."""
    return int(np.sum(states[slots] != "")) <= _LARGE_PAGES


def _in_order(canvas: Canvas, y: Number, step: Step, states: np.ndarray, slots: list[int], marks: dict) -> Number:
    """The pages in the order of tables. Gives where they end."""
    if not marks:
        return _rows(canvas, y, step, states, slots)
    holders, tables = step.holders(), step.seen.tables
    for slot in slots:
        count, length = int(step.seen.counts[slot]), int(np.asarray(step.batch.lengths)[slot])
        rows = f", {count} row{'s' * (count != 1)} from position {int(step.seen.positions[slot])} on" if count else ""
        canvas.text(12, y + 14, shortened(f"sequence {slot}: {length} tokens{rows}", _INNER, 12))
        y += 22
        columns = np.nonzero(states[slot] != "")[0]
        per_line = int((_INNER + _TILE_GAP) // (_TILE[0] + _TILE_GAP))
        for i, column in enumerate(columns.tolist()):
            state, page = str(states[slot, column]), int(tables[slot, column])
            at = 12 + i % per_line * (_TILE[0] + _TILE_GAP), y + i // per_line * (_TILE[1] + _TILE_GAP)
            is_shared = state != "X" and holders[page] > 1
            label = "freed" if state == "X" else f"page {page}" if page < 1000 else str(page)
            cells = None if state == "X" else _of_page(marks[slot], column, step.page_size)
            _large(canvas, at, _TILE, (state, label, is_shared), cells)
        y += -(-len(columns) // per_line) * (_TILE[1] + _TILE_GAP) + 4
    return y


def _of_page(marks: tuple | None, column: int, size: int) -> np.ndarray | None:
    """The states of the tokens of one page of a sequence, in at most `_TOKENS` cells; those of no token are ""."""
    if marks is None:
        return None
    any_seen, all_seen = (x[column * size : (column + 1) * size] for x in marks)
    step = -(-size // _TOKENS)
    at = np.arange(0, len(any_seen), step)
    is_any, is_all = np.logical_or.reduceat(any_seen, at), np.logical_and.reduceat(all_seen, at)
    cells = np.where(is_all, "F", np.where(is_any, "P", "S"))
    return np.concatenate([cells, np.full(-(-size // step) - len(cells), "")])


def _large(canvas: Canvas, at: tuple, extent: tuple, page: tuple, cells: np.ndarray | None, below: str = "") -> None:
    """One page: its state, its number, and a cell for each token."""
    (x, y), (width, height), (state, label, is_shared) = at, extent, page
    canvas.rect(x, y, width, height, "q" if state in ("X", "") else "o", corner=4)
    if state:
        canvas.tiles(x + 5, y + 5, 12, 12, [[state]])
    if is_shared:
        canvas.tiles(x, y, width, 14, [["2"]])
    canvas.text(x + (22 if state else 8), y + 15, shortened(label, width - (24 if state else 10), 11), size=11)
    if cells is not None:
        cell = (width - 10) / len(cells)
        canvas.tiles(x + 5, y + 21, cell, 12, cells[None])
    if below:
        canvas.text(x + 5, y + height - 5, shortened(below, width - 8, 10), size=10, style="d")


def _rows(canvas: Canvas, y: Number, step: Step, states: np.ndarray, slots: list[int]) -> Number:
    """A row of small tiles for each sequence."""
    used = int(np.max(np.nonzero(np.any(states[slots] != "", axis=0))[0], initial=0)) + 1
    left, height = 66.0, 12.0
    if len(slots) == 1:  # one long sequence has lines of 64 pages
        line = states[slots[0], :used]
        lines = np.concatenate([line, np.full(-used % 64, "")]).reshape(-1, 64)
        labels = [f"#{64 * i}" for i in range(len(lines))]
    else:
        lines, labels = states[slots, :used], [f"seq {slot}" for slot in slots]
    width = min(12.0, (_WIDTH - 12 - left) / lines.shape[1])
    for i, label in enumerate(labels):
        canvas.text(left - 6, y + height * i + 10, label, size=10, anchor="end", style="d")
    canvas.tiles(left, y, width, height, lines)
    is_shared = step.holders()[np.clip(step.seen.tables, 0, step.num_pages - 1)] > 1
    if len(slots) > 1 and np.any(is_shared):
        on_top = is_shared[slots, :used] & np.isin(lines, ("F", "P", "S", "O"))
        canvas.tiles(left, y, width, height, np.where(on_top, "2", ""))
    return y + height * len(lines) + 4


def _in_pool(
    canvas: Canvas, y: Number, step: Step, states: np.ndarray, holders: np.ndarray, slots: list[int], marks: dict
) -> Number:
    """The pages in the order of the pool. Gives where they end."""
    pool = _pool_states(step, states)
    if marks and step.num_pages <= _LARGE_POOL:
        return _large_pool(canvas, y, step, pool, states, marks)
    group = -(-step.num_pages // _POOL_CELLS)  # one cell may stand for several pages: for that which is seen most
    columns = 64 if step.num_pages <= 4096 else 256
    cells = _strongest(pool, group)
    shared = np.where(np.add.reduceat(holders > 1, np.arange(0, len(holders), group)) > 0, "2", "")
    grid, top = (np.concatenate([x, np.full(-len(x) % columns, "")]).reshape(-1, columns) for x in (cells, shared))
    left, height = 66.0, 12.0 if len(grid) <= 64 else 6.0
    width = (_WIDTH - 12 - left) / columns
    every = 1 if height >= 12 else 2
    for i in range(0, len(grid), every):
        canvas.text(left - 6, y + height * i + 10, str(i * columns * group), size=10, anchor="end", style="d")
    canvas.rect(left, y, _WIDTH - 12 - left, height * len(grid), "o")
    canvas.tiles(left, y, width, height, grid)
    canvas.tiles(left, y, width, height, top)
    y += height * len(grid) + 4
    if group > 1:
        canvas.text(left, y + 10, f"{group} pages in one cell", size=10, style="d")
        y += 14
    return y


def _strongest(pool: np.ndarray, group: int) -> np.ndarray:
    order = np.array(["", "O", "S", "P", "F"])
    rank = np.argmax(pool[:, None] == order[None], axis=1)
    return order[np.maximum.reduceat(rank, np.arange(0, len(pool), group))]


def _pool_states(step: Step, states: np.ndarray) -> np.ndarray:
    """For each page of the pool the state of the sequence that sees most of it."""
    pool = np.full(step.num_pages, "", dtype="U1")
    for letter in "OSPF":
        pool[step.seen.tables[states == letter]] = letter
    return pool


def _large_pool(canvas: Canvas, y: Number, step: Step, pool: np.ndarray, states: np.ndarray, marks: dict) -> Number:
    per_line = int((_INNER + _TILE_GAP) // (_TILE[0] + _TILE_GAP))
    extent = _TILE[0], _TILE[1] + 14
    is_there = np.isin(states, ("F", "P", "S", "O"))
    for page in range(step.num_pages):
        at = 12 + page % per_line * (extent[0] + _TILE_GAP), y + page // per_line * (extent[1] + _TILE_GAP)
        owners = np.argwhere(is_there & (step.seen.tables == page)).tolist()
        cells, below = None, "free"
        for slot, column in owners:
            own = _of_page(marks.get(slot), column, step.page_size)
            cells = own if cells is None else _most_of(cells, own)
        if len(owners) == 1:
            below = f"seq {owners[0][0]}, #{owners[0][1]}"
        elif owners:
            slots = [slot for slot, _ in owners]
            below = f"seq {', '.join(map(str, slots))}" if len(slots) < 4 else f"{len(slots)} sequences"
        _large(canvas, at, extent, (str(pool[page]), f"page {page}", len(owners) > 1), cells, below)
    return y + -(-step.num_pages // per_line) * (extent[1] + _TILE_GAP)


def _most_of(cells: np.ndarray, others: np.ndarray | None) -> np.ndarray:
    """For each token of a shared page the state of the sequence that sees it best."""
    return cells if others is None else np.where((cells == "F") | ((cells == "P") & (others != "F")), cells, others)


def _text(step: Step, states: np.ndarray, shown: np.ndarray, slots: list[int], counts: str) -> str:
    lines = ["in table order"]
    for slot in slots:
        row = table(states[slot][None])[0].rstrip()
        parts = [row[i : i + _TEXT_WIDTH] for i in range(0, len(row), _TEXT_WIDTH)] or [""]
        length = int(np.asarray(step.batch.lengths)[slot])
        width = min(_TEXT_WIDTH, max(np.max(np.nonzero(states[s] != "")[0], initial=0) + 1 for s in slots))
        lines += [f"{f'seq {slot}':>7} {parts[0]:<{width}}  {length} tokens", *(f"{'':8}{part}" for part in parts[1:])]
    lines.append("in the pool")
    pool = table(_pool_states(step, shown)[None])[0].replace(" ", "-")
    lines += [f"{i:>7} {pool[i : i + _TEXT_WIDTH]}".rstrip() for i in range(0, len(pool), _TEXT_WIDTH)]
    other = "o no row in this step" if len(slots) != 1 else "o of other sequences"
    return "\n".join([*lines, f"# visited, in full  + visited, masked  . skipped  x freed  {other}  - free", counts])
