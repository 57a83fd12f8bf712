"""`mask`: which keys each query sees, beside what lowerings know of each tile of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from paged.lower import Program, QueryRows, is_ancestor, page_coverage, tree
from paged.spec import AttentionSpec, Given, PerHead, terms_in

from ._ascii import table
from ._canvas import Canvas, Number
from ._picture import Picture

_WIDTH, _PANEL, _LEFT = 704, 300, 44
_MOST_PAIRS = 2**24
_MOST_CELLS, _MOST_LETTERS = 100, 40  # on a side of a panel, and of a text


def mask(
    spec: AttentionSpec | Program,
    rows: Any,
    length: int,
    *,
    page_size: int | None = None,
    rows_per_tile: int | None = None,
    values: Mapping[str, Any] | None = None,
    head: int | None = None,
    drafts: tree.Drafts | None = None,
) -> Picture:
    """Draw a mask: what each query sees, beside what a lowering knows of each tile before it looks.

    The left half evaluates the mask for every pair of a query and a key. The right half asks its coverage for each tile
    of ``rows_per_tile`` queries and ``page_size`` keys: the same question, by the same function, that lowerings ask to
    skip pages. A tile whose coverage denies what the pairs show is drawn as wrong.

    **Arguments:**

    - `spec`: the attention, or its `Program`.
    - `rows`: the query positions: a range such as ``range(8, 16)``, or how many there are, the last ones of ``length``.
    - `length`: how many keys the sequence has.
    - `page_size`, `rows_per_tile`: keys and queries of a tile. None for about 12 tiles on a side.
    - `values`: the numbers that the spec names by `Value`, by name; a tuple of numbers for a value with a size.
    - `head`: the query head, for a mask that differs by head. None for all heads together: then a pair is partly
      visible where some heads see it.
    - `drafts`: for a mask with a `Tree` the tree whose rows ``rows`` are, such as ``paged.tree.from_topk`` makes. A row
      then is at the position of its depth, and nothing is known of tiles with the step's own tokens. None: every row
      descends from all rows before it, as in a batch that brings no ancestors.

    **Returns:** the picture. Raises ``ValueError`` for rows or a length below 1, for more than 2**24 pairs, for a head
    that there is not, for a value that is missing, and for drafts of another number of rows or of a mask without a
    `Tree`.

    >>> spec = AttentionSpec(num_q_heads=1, num_kv_heads=1, head_dim=8, window=4)
    >>> print(paged.pictures.mask(spec, 8, 8, page_size=2, rows_per_tile=2).text)
    pairs           tiles
    #.......        +...
    ##......        #+..
    ###.....        +#+.
    ####....        .+#+
    .####...
    ..####..
    ...####.
    ....####
    # visible  . hidden        # full: no mask needed  + partial: masked  . empty: skipped
    """
    program = spec if isinstance(spec, Program) else Program.from_spec(spec)
    queries = rows if isinstance(rows, range) else range(length - rows, length)
    _require(program, queries, length, head, values or {})
    _require_drafts(program, queries, length, drafts)
    size = page_size or _tile_size(length)
    given = {name: values[name] for name in (value.name for value in program.values)} if values else {}
    asked = _Asked.of(program, queries, length, given, drafts)
    p = asked.p
    any_seen, all_seen = _seen(asked, head)
    tiles = _Tiles.of(asked, rows_per_tile or _tile_size(len(p)), size)
    states = tiles.states(any_seen, all_seen)
    title = f"What a query sees, where {program.visibility}"
    counts = {name: int(np.sum(states == letter)) for letter, name in _WORDS.items()}
    wrong = f" {counts['wrong']} of them are wrong: the pairs say otherwise." if counts["wrong"] else ""
    first = f"{'position' if drafts is None else 'place'} {queries.start}"
    description = (
        f"{len(p)} queries from {first} on, over {length} keys. Of {states.size} tiles of {tiles.rows} queries and "
        f"{size} keys, {counts['full']} are full, {counts['partial']} partial and {counts['empty']} empty.{wrong}"
    )
    pairs = np.where(all_seen, "F", np.where(any_seen, "P", ""))
    return _drawn(title, description, (pairs, any_seen, all_seen), states, (queries, length, tiles.rows, size))


_WORDS = {"F": "full", "P": "partial", "S": "empty", "W": "wrong"}


class _Asked(NamedTuple):
    """Rows and keys that a mask is drawn for: their positions, and which keys are a row's ancestors or before the step.

    ``own`` is the place of the step's first token, where rows are a tree's; else None.
    """

    program: Program
    p: np.ndarray
    j: np.ndarray
    length: int
    numbers: Mapping[str, Any]
    is_ancestor: Any = True
    own: int | None = None

    @classmethod
    def of(cls, program: Program, queries: range, length: int, numbers: Any, drafts: Any) -> "_Asked":
        p, j = np.arange(queries.start, queries.stop, dtype=np.int32), np.arange(length, dtype=np.int32)
        if drafts is None:
            return cls(program, p, j, length, numbers)
        row, words = p[:, None] - queries.start, np.asarray(drafts.ancestors)
        ancestor = is_ancestor([words[:, i : i + 1] for i in range(words.shape[1])], row, j[None] - queries.start)
        p = queries.start + np.asarray(drafts.depth, np.int32)
        return cls(program, p, np.concatenate([j[: queries.start], p]), length, numbers, ancestor, queries.start)


class _Tiles:
    """Tiles of queries and keys, and what coverage says of each."""

    def __init__(self, p: np.ndarray, j: np.ndarray, rows: int, some: np.ndarray, full: np.ndarray):
        self.p, self.j, self.rows, self.some, self.full = p, j, rows, some, full

    @classmethod
    def of(cls, asked: _Asked, rows: int, size: int) -> "_Tiles":
        program, length = asked.program, asked.length
        row, j = np.arange(0, len(asked.p), rows, dtype=np.int32), np.arange(0, length, size, dtype=np.int32)
        p0, p1 = np.minimum.reduceat(asked.p, row), np.maximum.reduceat(asked.p, row) + 1
        if asked.own is None:
            found = program.coverage(p0[:, None], p1[:, None], j[None], j[None] + size, length, asked.numbers)
        else:
            of_rows = lambda p0, p1: QueryRows(p0, p1, length, asked.numbers, asked.own)
            pages = jnp.arange(len(j), dtype=jnp.int32)
            found = jax.vmap(lambda *p: page_coverage(program, of_rows(*p), pages, size, len(pages)))(p0, p1)
        some, full = (np.broadcast_to(np.asarray(x), (len(row), len(j))) for x in found)
        return cls(row, j, rows, some, full & some)

    def states(self, any_seen: np.ndarray, all_seen: np.ndarray) -> np.ndarray:
        """The letter of each tile: wrong where coverage denies what the pairs show."""
        is_any = _over_tiles(np.logical_or, any_seen, self.p, self.j)
        is_all = _over_tiles(np.logical_and, all_seen, self.p, self.j)
        is_wrong = (is_any & ~self.some) | (self.full & ~is_all)
        states = np.where(self.full, "F", np.where(self.some, "P", "S"))
        return np.where(is_wrong, "W", states)


def _over_tiles(operation: Any, flags: np.ndarray, p: np.ndarray, j: np.ndarray) -> np.ndarray:
    return operation.reduceat(operation.reduceat(flags, p, axis=0), j, axis=1)


def _require(program: Program, queries: range, length: int, head: int | None, values: Mapping[str, Any]) -> None:
    if length < 1 or len(queries) < 1 or queries.start < 0 or queries.step != 1:
        raise ValueError(
            f"mask draws at least one row, from position 0 on, and at least one key; got rows={queries} and "
            f"length={length}."
        )
    if len(queries) * length > _MOST_PAIRS:
        raise ValueError(f"mask draws at most 2**24 pairs; got {len(queries)} rows of {length} keys. Draw fewer rows.")
    if head is not None and not 0 <= head < program.num_q_heads:
        raise ValueError(f"head must be in [0, {program.num_q_heads}); got {head}.")
    missing = [value.name for value in program.values if value.name not in values]
    if missing:
        raise ValueError(f"The spec names values that values= must give: {', '.join(missing)}; got {sorted(values)}.")


def _require_drafts(program: Program, queries: range, length: int, drafts: Any) -> None:
    if drafts is None:
        return
    if not program.has_ancestors:
        raise ValueError(f"drafts= is for a mask with a Tree; got {program.visibility}.")
    rows = np.shape(drafts.parents)
    if rows != (len(queries),) or queries.stop != length:
        raise ValueError(
            f"With drafts= the rows are the tree's own, the last ones of the length: a tree of {list(rows)} rows; got "
            f"rows {queries.start} to {queries.stop - 1} of {length}."
        )


def _seen(asked: _Asked, head: int | None) -> tuple[np.ndarray, ...]:
    """Whether any head and whether every head sees each pair."""
    program, heads = asked.program, cast(Any, [head])
    if program.has_heads and head is None:
        heads = range(0, program.num_q_heads, program.heads_alike)
    evaluate = jax.jit(lambda h: _visible(asked, h))
    shape = len(asked.p), len(asked.j)
    seen = [np.broadcast_to(np.asarray(evaluate(h if program.has_heads else 0)), shape) for h in heads]
    return np.any(seen, axis=0), np.all(seen, axis=0)


def _visible(asked: _Asked, head: Any) -> Any:
    given = Given(asked.numbers, head=head, is_ancestor=asked.is_ancestor)
    return asked.program.visible(jnp.asarray(asked.p)[:, None], jnp.asarray(asked.j)[None], asked.length, given)


def _tile_size(count: int) -> int:
    """A power of two, of which about 12 cover ``count``."""
    return 2 ** max(0, round(np.log2(max(1, count / 12))))


def per_head(program: Program) -> tuple[str, ...]:
    """The masks of a `PerHead` in a program's visibility, in words; none if there is none."""
    terms = [term for term in terms_in(program.visibility) if isinstance(term, PerHead)]
    return tuple(str(inner) for inner in terms[0].masks) if terms else ()


def _drawn(title: str, description: str, pairs: Any, tiles: np.ndarray, sizes: Any) -> Picture:
    (letters, any_seen, all_seen), (queries, length, rows, size) = pairs, sizes
    canvas = Canvas(_WIDTH)
    y = canvas.lines(12, 24, title, _WIDTH - 24, size=14, style="h") + 8
    step = max(1, -(-max(letters.shape) // _MOST_CELLS))
    shown = _squares(any_seen, all_seen, step)
    cell = min(14.0, _PANEL / max(shown.shape))
    per_pair = cell / step
    head = "pairs" if step == 1 else f"pairs, {step} x {step} in one cell"
    canvas.text(_LEFT, y, f"{head}: what the mask says", size=12, style="d")
    right = _LEFT + _PANEL + 48
    canvas.text(right, y, f"tiles of {rows} x {size}: what coverage says", size=12, style="d")
    top = y + 30
    extent = per_pair * letters.shape[1], per_pair * letters.shape[0]
    for x in (_LEFT, right):
        canvas.rect(x, top, *extent, "o")
        _axes(canvas, x, top, extent, queries, length)
    canvas.tiles(_LEFT, top, cell, cell, shown)
    canvas.tiles_within(right, top, extent, (per_pair * size, per_pair * rows), tiles)
    y = top + extent[1] + 30
    half = (
        [("F", "visible" if step == 1 else "all visible"), ("P", "some")]
        if np.any(shown == "P")
        else [("F", "visible")]
    )
    y = canvas.legend(12, y, half, _WIDTH - 24)
    entries = [("F", "full: no mask needed"), ("P", "partial: read and masked"), ("S", "empty: skipped")]
    entries += [("W", "wrong: the pairs say otherwise")] * bool(np.any(tiles == "W"))
    y = canvas.legend(12, y + 2, entries, _WIDTH - 24)
    canvas.lines(12, y + 2, description, _WIDTH - 24, size=12, style="d")
    lines = max(1, -(-max(letters.shape) // _MOST_LETTERS))
    return Picture.of(canvas, title, description, _text(_squares(any_seen, all_seen, lines), lines, tiles))


def _squares(any_seen: np.ndarray, all_seen: np.ndarray, step: int) -> np.ndarray:
    """The state of each square of ``step`` queries and ``step`` keys."""
    at = [np.arange(0, n, step) for n in any_seen.shape]
    is_any, is_all = _over_tiles(np.logical_or, any_seen, *at), _over_tiles(np.logical_and, all_seen, *at)
    return np.where(is_all, "F", np.where(is_any, "P", ""))


def _axes(canvas: Canvas, x: Number, y: Number, extent: tuple[Number, Number], queries: range, length: int) -> None:
    canvas.text(x, y - 6, "key 0", size=10, style="d")
    canvas.text(x + max(extent[0], 74), y - 6, str(length - 1), size=10, anchor="end", style="d")
    canvas.text(x - 4, y + 9, f"q {queries.start}", size=10, anchor="end", style="d")
    if extent[1] >= 30:
        canvas.text(x - 4, y + extent[1], str(queries.stop - 1), size=10, anchor="end", style="d")


def _text(shown: np.ndarray, step: int, tiles: np.ndarray) -> str:
    left, right = table(np.where(shown == "", "S", shown)), table(tiles)
    space = max(len(left[0]) + 8, 16)
    heads = ["pairs" if step == 1 else f"{step} x {step} pairs", *left], ["tiles", *right]
    count = max(map(len, heads))
    columns = [side + [""] * (count - len(side)) for side in heads]
    lines = [f"{a:<{space}}{b}".rstrip() for a, b in zip(*columns, strict=True)]
    some = "  + some" if np.any(shown == "P") else ""
    wrong = "  ! wrong" if np.any(tiles == "W") else ""
    legend = f"# visible{some}  . hidden        # full: no mask needed  + partial: masked  . empty: skipped{wrong}"
    return "\n".join([*lines, legend])
