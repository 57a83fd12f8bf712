"""`python -m paged explain`: what an attention will run, and its pictures, as text or as a page of HTML."""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paged.lower import LOWERINGS, TARGETS, Explanation, lower
from paged.spec import PageLayout, Pages, RaggedBatch

from .attention import add_attention, layout_of, q_dtype_of, spec_of

# The target of each chip that a lowering knows by name.
_CHIPS = {name: lowering.target for lowering in LOWERINGS for name in lowering.generations}

_EXAMPLE = """\
examples:
  python -m paged explain --heads 32/8 --window 4096 --lengths 9000,300
  python -m paged explain --heads 32/8 --window 4096 --lengths 9000,300 --rows 1,300 --chip v5e --html out.html

Nothing is run and nothing is timed: the answers are those that lowerings are told. Pages are given to sequences in a
shuffled order, as in a pool that has been used for a while.
"""


def add_parser(commands: Any) -> None:
    """Add the command ``explain``."""
    parser = commands.add_parser(
        "explain",
        help="say and draw what an attention will run",
        description="Say and draw what an attention will run: heads, mask, pages, schedule.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add_attention(parser.add_argument_group("the attention"))
    batch = parser.add_argument_group("the step")
    batch.add_argument(
        "--lengths", type=_numbers, default=(4096,), metavar="N,N,...", help="tokens of each sequence (default: 4096)"
    )
    batch.add_argument(
        "--rows", type=_numbers, default=(1,), metavar="N,N,...", help="query rows of each, or one number (default: 1)"
    )
    batch.add_argument("--pages", type=int, metavar="N", help="pages of the pool (default: those that are needed)")
    where = parser.add_argument_group("where")
    where.add_argument("--target", default="auto", choices=TARGETS, help='default: "auto"')
    where.add_argument("--chip", choices=sorted(_CHIPS), help="as on this chip, whatever this machine has")
    parser.add_argument("--html", metavar="PATH", help="write the pictures to this file, one page that stands alone")


def run(options: argparse.Namespace) -> int:
    """Explain. Returns the exit status."""
    explanation = _explanation(options)
    if options.html is None:
        print(explanation.show())
        return 0
    explanation.show(options.html)
    print(f"{explanation}\n\nwritten to {options.html}")
    return 0


def _explanation(options: argparse.Namespace) -> Explanation:
    spec, layout = spec_of(options), layout_of(options)
    target = options.target if options.chip is None else _CHIPS[options.chip]
    if options.target not in ("auto", target):
        raise ValueError(f"--chip {options.chip} is for --target {target}; got --target {options.target}.")
    attend = lower(spec, layout, target)
    attend = attend if options.chip is None else attend.on_chip(options.chip)
    batch, num_pages = _batch(options)
    dtype = q_dtype_of(options) or (jnp.bfloat16 if layout.is_quantised else layout.dtype)
    q = jax.ShapeDtypeStruct((int(batch.query_starts[-1]), spec.num_q_heads, spec.head_dim), dtype)
    return attend.explain(q, _pages(layout, num_pages), batch)


def _batch(options: argparse.Namespace) -> tuple[RaggedBatch, int]:
    """The step, with pages in a shuffled order; and how many pages the pool has."""
    lengths, rows = np.asarray(options.lengths), np.asarray(options.rows)
    rows = np.repeat(rows, len(lengths)) if len(rows) == 1 else rows
    if len(rows) != len(lengths) or np.any(lengths < 1) or np.any(rows > lengths):
        raise ValueError(
            f"--lengths are at least 1, and --rows has one number for each, at most the length, or one for all; got "
            f"--lengths {_text(options.lengths)} and --rows {_text(options.rows)}."
        )
    held = -(-lengths // options.page_size)
    num_pages = int(held.sum()) if options.pages is None else options.pages
    if num_pages < held.sum():
        raise ValueError(f"--pages must be at least {held.sum()}, which the sequences need; got {num_pages}.")
    order = np.random.default_rng(0).permutation(num_pages)
    tables = np.full((len(lengths), int(held.max())), -1)
    for slot, end in enumerate(np.cumsum(held).tolist()):
        tables[slot, : held[slot]] = order[end - held[slot] : end]
    if len(set(rows.tolist())) == 1:
        return RaggedBatch.decode(lengths, tables, query_rows=int(rows[0])), num_pages
    return RaggedBatch(lengths, tables, np.concatenate([[0], np.cumsum(rows)])), num_pages


def _pages(layout: PageLayout, num_pages: int) -> Pages:
    """The shapes of a pool: no page is made."""
    scales = {} if layout.scales in (None, "token") else {"k_scale": 1.0, "v_scale": 1.0}
    return jax.eval_shape(lambda: layout.init(num_pages, **scales))


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"whole numbers with commas between them are needed; got {text!r}")
    return tuple(map(int, parts))


def _text(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
