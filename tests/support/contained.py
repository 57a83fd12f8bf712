"""A property of every runner: NaN or infinity in a live key or value reaches no other sequence."""

import dataclasses
import itertools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

import paged
from paged.spec import AttentionState, Pages, RaggedBatch

from .arrays import Built
from .compare import assert_bitwise

# One call: the state of every query row of a case's arrays, and the pages after the call if it writes.
Runner = Callable[[Built], tuple[AttentionState, Pages | None]]
POISONS = (np.nan, np.inf, -np.inf)
_HEAD = 0


def assert_live_poison_stays(run: Runner, built: Built, poisons: tuple[float, ...] = POISONS) -> None:
    """Put each poison into one live key and into one live value, in turn, and compare the rows of other sequences.

    The poisoned tokens are those of one row, of the first sequence that sees a key and then of the last: the first
    token that the row sees, in the pages; and the row's own, for calls that write. NaN must reach the row, or the
    property says nothing.
    """
    owner = np.array([-1 if row is None else row[0] for row in built.row_of])
    seeing = [i for i, seen in enumerate(built.visible) if seen is not None and len(seen)]
    assert len(set(owner[seeing])) > 1, "no other sequence sees anything"
    clean, clean_pages = run(built)
    for row in (seeing[0], seeing[-1]):
        seq = int(owner[row])
        table = np.asarray(built.batch.block_tables[seq])
        for kind, poison in itertools.product("kv", poisons):
            bad = _with_old(built, seq, int(built.visible[row][0]), kind, poison)  # pyright: ignore
            bad = _with_new(bad, row, kind, poison)  # which is not read unless the call writes
            state, pages = run(bad)
            assert_bitwise(state, clean, rows=np.flatnonzero(owner != seq))
            if np.isnan(poison):
                assert np.isnan(np.asarray(state.out)[row]).any(), "the poison was not live"
            if pages is not None and clean_pages is not None:
                kept = np.setdiff1d(np.arange(pages.num_pages), table)
                for a, b in ((pages.keys(), clean_pages.keys()), (pages.values(), clean_pages.values())):
                    np.testing.assert_array_equal(np.asarray(a)[kept], np.asarray(b)[kept])


def _with_old(built: Built, seq: int, j: int, kind: str, poison: float) -> Built:
    """The case with one number of token ``j`` of a sequence poisoned in its pages, in whatever order these are."""
    size = built.case.page_size
    page, offset = int(built.batch.block_tables[seq, j // size]), j % size
    k, v = (x[page, :, offset][None] for x in (built.pages.keys(), built.pages.values()))
    if kind == "k":
        k = k.at[0, _HEAD, 0].set(poison)
    else:
        v = v.at[0, _HEAD, 0].set(poison)
    one = RaggedBatch.prefill(j + 1, built.batch.block_tables[seq], 1)
    return dataclasses.replace(built, pages=paged.write(k, v, built.pages, one, "xla"))


def _with_new(built: Built, row: int, kind: str, poison: float) -> Built:
    """The case with one number of a row's own new token poisoned."""
    x = jnp.asarray(getattr(built, kind)).at[row, _HEAD, 0].set(poison)
    return dataclasses.replace(built, **{kind: x})
