"""What runs where, asked of the lowerings themselves: `docs/support.md`, which `make support` writes."""

import functools
import itertools
import pathlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import paged
from paged.lower import LOWERINGS, Call, Lowering, Program

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "support.md"
HEADS: dict[str, Any] = {"num_q_heads": 32, "num_kv_heads": 8}
HEAD_DIMS = (128, 64)
PAGE_SIZE = 16
ORDERS = ("packed", "joined", "split", "interleaved")
DTYPES: tuple[tuple[str, str | None], ...] = (
    *((name, None) for name in ("bfloat16", "float16", "float32")),
    *itertools.product(("int8", "float8_e4m3fn", "float8_e5m2"), ("tensor", "head", "token")),
)
PHASES = {"decode": (8, 8, 1), "drafts": (32, 8, 4), "mixed": (256, 8, None), "prefill": (256, 1, 256)}
IS_WHOLE = jax.__version_info__ >= (0, 11)
_DRAFTS = "a tree of drafts: `Tree()`"


def _terms() -> dict[str, paged.AttentionSpec]:
    """A spec for each term, by what a user writes."""
    plain = paged.AttentionSpec(**HEADS, head_dim=128)
    free = plain.replace(causal=False)
    value = paged.Value
    return {
        "`causal=True`, nothing else": plain,
        "`causal=False`": free,
        "`window=64`": plain.replace(window=64),
        "`window=Value(...)`": plain.replace(mask=paged.Window(value("w"))),
        "`Prefix(64)`": free.replace(mask=paged.Causal() | paged.Prefix(64)),
        "`Prefix(Value(...))`": free.replace(mask=paged.Causal() | paged.Prefix(value("n"))),
        "`Chunk(64)`": plain.replace(mask=paged.Chunk(64)),
        "`Segments((64, 128))`": plain.replace(mask=paged.Segments((64, 128))),
        "`Segments(Value(...))`": plain.replace(mask=paged.Segments(value("starts", 4))),
        "`Spans((16,), (64,))`": free.replace(mask=paged.Causal() | paged.Spans((16,), (64,))),
        "`Spans(Value(...), Value(...))`": free.replace(
            mask=paged.Causal() | paged.Spans(value("starts", 4), value("ends", 4))
        ),
        "`PerHead((Window(64), Everything()))`": plain.replace(
            mask=paged.PerHead((paged.Window(64), paged.Everything()))
        ),
        _DRAFTS: plain.replace(mask=paged.Tree()),
        "`Where`, arithmetic of positions": plain.replace(mask=paged.Where(lambda p, j: (p - j) % 3 == 0)),
        "`Where`, a table at positions": plain.replace(mask=paged.Where(lambda p, j: jnp.arange(9)[j % 9] > 4)),
        "`soft_cap=30.0`": plain.replace(soft_cap=30.0),
        "`ALiBi()`": plain.replace(scores=(paged.ALiBi(),)),
        "`ALiBi(Value(...))`": plain.replace(scores=(paged.ALiBi(value("slopes", 32, "float32")),)),
        "`Bias`, arithmetic of positions": plain.replace(
            scores=(paged.Bias(lambda p, j, h: 0.1 * (j - p).astype("float32")),)
        ),
        "`Bias`, a table at positions": plain.replace(scores=(paged.Bias(lambda p, j, h: jnp.arange(9.0)[j % 9]),)),
        "`sinks=True`": plain.replace(sinks=True),
    }


TERMS = _terms()
PLAIN = next(iter(TERMS))


class Way(NamedTuple):
    """A lowering on a chip; without a chip where the lowering is the same on all."""

    lowering: Lowering
    chip: str | None


def ways() -> list[Way]:
    """Every lowering, on every chip that it can be lowered for by name."""
    return [
        Way(low.on_chip(chip) if chip else low, chip)
        for low in LOWERINGS
        for chip in (low.generations if low.has_kernels else (None,))
    ]


@functools.cache
def _program(term: str, head_dim: int) -> Program:
    spec = TERMS[term]
    return Program.from_spec(spec.replace(head_dim=head_dim, scale=None) if head_dim != spec.head_dim else spec)


@functools.cache
def refusal(way: Way, phase: str, term: str, order: str, dtype: str, scales: str | None, head_dim: int) -> str | None:
    """The reason for which a lowering refuses such a call, or None if it accepts it."""
    layout = paged.PageLayout(
        page_size=PAGE_SIZE,
        num_kv_heads=HEADS["num_kv_heads"],
        head_dim=head_dim,
        order=order,  # pyright: ignore
        dtype=dtype,
        scales=scales,  # pyright: ignore
    )
    tokens, slots, rows = PHASES[phase]
    call = Call(tokens, slots, 128, 4096, rows, _queries(dtype), has_own_rows=term == _DRAFTS)
    return way.lowering.refuses(_program(term, head_dim), layout, call)


def _queries(dtype: str) -> jnp.dtype:
    """Queries are bfloat16, except over float16 pages: a kernel may multiply both as they lie."""
    return jnp.dtype("float16" if dtype == "float16" else "bfloat16")


class _Notes:
    """Reasons, numbered in the order in which they are met."""

    def __init__(self):
        self.numbers: dict[str, int] = {}

    def __call__(self, reasons: Iterable[str | None]) -> str:
        """A cell: whether all of these calls run, none or some, and the numbers of the reasons."""
        reasons = list(reasons)
        whys = dict.fromkeys(reason for reason in reasons if reason is not None)
        if not whys:
            return "yes"
        numbers = sorted(self.numbers.setdefault(why, len(self.numbers) + 1) for why in whys)
        return f"{'some' if None in reasons else 'no'} ({', '.join(map(str, numbers))})"

    def lines(self) -> list[str]:
        return [f"{number}. {reason}." for reason, number in self.numbers.items()]


def _columns(all_ways: list[Way], answers: dict[Way, list[str]]) -> list[tuple[str, Way]]:
    """Chips on which a lowering answers alike are one column."""
    columns: dict[tuple[str, tuple[str, ...]], list[Way]] = {}
    for way in all_ways:
        columns.setdefault((way.lowering.name, tuple(answers[way])), []).append(way)
    return [
        (f"{name}: {', '.join(way.chip for way in group if way.chip)}" if group[0].chip else name, group[0])
        for (name, _), group in columns.items()
    ]


def term_rows(terms: Iterable[str], layouts: list[tuple[str, str, str | None]], notes: _Notes) -> list[str]:
    """A table with a row for each term: does it run over each of these pages that the plain spec runs over?"""
    cells, every = {}, ways()
    taken = {way: accepted(way, layouts) for way in every}
    for way, term, phase in itertools.product(every, terms, PHASES):
        # Where no pages are accepted in any phase, the reasons of all pages say why.
        asked = taken[way] or layouts
        cells[way, term, phase] = notes(refusal(way, phase, term, *one, HEAD_DIMS[0]) for one in asked)
    return _table(every, {(term,): term for term in terms}, ("the spec says",), cells)


def accepted(way: Way, layouts: Iterable[tuple[str, str, str | None]]) -> list[tuple[str, str, str | None]]:
    """The page orders and dtypes that a lowering accepts for the plain spec, in some phase."""
    return [one for one in layouts if any(refusal(way, phase, PLAIN, *one, HEAD_DIMS[0]) is None for phase in PHASES)]


def page_rows(head_dim: int, notes: _Notes) -> list[str]:
    """A table with a row for the dtypes of each page order that are answered alike, for the plain spec."""
    every, cells, alike = ways(), {}, {}
    for order, (dtype, scales) in itertools.product(ORDERS, DTYPES):
        key = (order, dtype, scales)
        for way, phase in itertools.product(every, PHASES):
            cells[way, key, phase] = notes([refusal(way, phase, PLAIN, *key, head_dim)])
        answers = tuple(cells[way, key, phase] for way in every for phase in PHASES)
        alike.setdefault((order, answers), []).append(key)
    rows = {(order, _dtypes(keys)): keys[0] for (order, _), keys in alike.items()}
    return _table(every, rows, ("order", "dtypes, and scales"), cells)


def _dtypes(keys: list[tuple[str, str, str | None]]) -> str:
    """Such as ``bfloat16; int8: tensor, head``."""
    scales: dict[str, list[str]] = {}
    for _, dtype, scale in keys:
        scales.setdefault(dtype, []).extend([scale] if scale else [])
    return "; ".join(f"{dtype}: {', '.join(kinds)}" if kinds else dtype for dtype, kinds in scales.items())


def _table(every: list[Way], rows: dict, heads: tuple[str, ...], cells: dict) -> list[str]:
    answers = {way: [cells[way, key, phase] for key in rows.values() for phase in PHASES] for way in every}
    columns = _columns(every, answers)
    head = [*heads, *(name for name, _ in columns)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for words, key in rows.items():
        shown = [_cell({phase: cells[way, key, phase] for phase in PHASES}) for _, way in columns]
        lines.append(f"| {' | '.join((*words, *shown))} |")
    return lines


def _cell(by_phase: dict[str, str]) -> str:
    groups: dict[str, list[str]] = {}
    for phase, answer in by_phase.items():
        groups.setdefault(answer, []).append(phase)
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{', '.join(phases)}: {answer}" for answer, phases in groups.items())


def page() -> str:
    """The text of `docs/support.md`."""
    notes = _Notes()
    layouts = [(order, dtype, scales) for order in ORDERS for dtype, scales in DTYPES]
    terms = term_rows(TERMS, layouts, notes)
    pages = {head_dim: page_rows(head_dim, notes) for head_dim in HEAD_DIMS}
    lines = [_HEAD, *terms, ""]
    for head_dim, table in pages.items():
        lines += [f"## Pages, head_dim {head_dim}", "", *table, ""]
    lines += ["## Why not", "", "In the words of the lowerings. Sizes in them are those of the first call refused.", ""]
    return "\n".join([*lines, *notes.lines(), ""])


_HEAD = f"""# What runs where

For who wants to know before trying whether a spec, a page order and a dtype run on a chip. This page is generated:
`make support` asks every lowering for its refusal of every call below, and a test fails when the page is stale.

- **yes**: the lowering accepts the call. **no**: it refuses, for the reasons with these numbers. **some**: it accepts
  some of the pages.
- The calls have {HEADS["num_q_heads"]} query heads over {HEADS["num_kv_heads"]} KV heads, pages of {PAGE_SIZE} tokens,
  and bfloat16 queries, or float16 ones over float16 pages. Other sizes may be
  refused: `paged.lower(spec, layout).explain(q, pages, batch)` answers for yours.
- *decode* has one row per sequence, *drafts* four, *mixed* any number, and *prefill* all of one sequence.
- `target="xla"` is `xla-blocks`, on CPUs, GPUs and TPUs. `target="tpu"` is `tpu-decode` and `tpu-ragged`: a call runs
  when one of them accepts it. `target="gpu"` is `gpu-decode`.
- On a TPU, `target="auto"` runs on XLA what no kernel accepts. A named target raises `ValueError` with the reason.
- Accepted does not mean timed: no TPU or GPU was measured.

## Terms of a spec

Each term over every page order and dtype below that the lowering accepts for the plain spec, head_dim {HEAD_DIMS[0]}.
"""


class Shown(NamedTuple):
    """What the page says of one cell: whether a call runs, and the reasons that it gives."""

    answer: str
    reasons: tuple[str, ...]


def read(text: str) -> dict[tuple[str, str, str], dict[str, Shown]]:
    """The cells of a page by section, row and column, each by its phase."""
    whys = dict(re.findall(r"^(\d+)\. (.*)\.$", text, re.MULTILINE))
    cells: dict[tuple[str, str, str], dict[str, Shown]] = {}
    for section in text.split("\n## ")[1:]:
        title, *lines = section.splitlines()
        head, *rows = [line[2:-2].split(" | ") for line in lines if line.startswith("| ")] or [[]]
        named = 2 if head[:1] == ["order"] else 1
        for row in rows:
            for column, cell in zip(head[named:], row[named:], strict=True):
                cells[title, " | ".join(row[:named]), column] = _read_cell(cell, whys)
    return cells


def _read_cell(cell: str, whys: dict[str, str]) -> dict[str, Shown]:
    shown = {}
    for part in cell.split("; "):
        phases, _, answer = part.rpartition(": ")
        word, _, numbers = answer.partition(" ")
        reasons = tuple(whys[number] for number in re.findall(r"\d+", numbers))
        shown |= dict.fromkeys(phases.split(", ") if phases else PHASES, Shown(word, reasons))
    return shown


def main() -> None:
    """Write the page. The GPU kernel needs JAX 0.11: an older JAX would say that nothing runs on it."""
    if not IS_WHOLE:
        raise SystemExit("docs/support.md is written with JAX 0.11 or later, which the GPU kernel needs.")
    text = page()
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE}: {len(text)} characters")


if __name__ == "__main__":
    main()
