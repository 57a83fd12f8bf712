"""A number in a live key or value that is none: it may reach rows of its own sequence, and never another sequence."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from paged.spec import AttentionState, Pages
from paged.testing import Built
from paged.testing.tolerances import assert_bitwise

# One call with the arrays of a case: the state of every row; and the pages after it, if it writes.
Runner = Callable[[Built], tuple[AttentionState, Pages | None]]


def assert_reaches_no_other_sequence(run: Runner, built: Built, bad: float = np.nan) -> None:
    """Assert that ``bad`` in all keys and values of one sequence, of each in turn, changes no bit of any other.

    They are those in the pages, and this step's own for a call that writes. Each sequence that sees a key must show
    what is bad.
    """
    seeing = sorted({owner[0] for owner, seen in zip(built.row_of, built.visible, strict=True) if owner and len(seen)})
    assert len(seeing) > 1, "there is no other sequence"
    clean, clean_pages = run(built)
    for seq in seeing:
        is_own = np.array([owner is not None and owner[0] == seq for owner in built.row_of])
        k, v = (jnp.where(is_own[:, None, None], bad, x) for x in (built.k, built.v))
        found, pages = run(dataclasses.replace(built, k=k, v=v, pages=_with_bad(built, seq, bad)))
        assert_bitwise(found, clean, ~is_own)
        assert not np.isfinite(np.asarray(found.out)[is_own]).all(), f"sequence {seq} did not see what is bad"
        if pages is not None and clean_pages is not None:
            others = np.setdiff1d(np.arange(pages.num_pages), np.asarray(built.batch.block_tables[seq]))
            for a, b in ((pages.keys(), clean_pages.keys()), (pages.values(), clean_pages.values())):
                np.testing.assert_array_equal(np.asarray(a)[others], np.asarray(b)[others])


def _with_bad(built: Built, seq: int, bad: float) -> Pages:
    """The case's pages, with ``bad`` in all keys and values of a sequence's live tokens."""
    layout, tables = built.pages.layout, np.asarray(built.batch.block_tables)
    length = min(int(built.batch.lengths[seq]), tables.shape[1] * layout.page_size)
    pages = tables[seq, : -(-length // layout.page_size)]
    pages = pages[(pages >= 0) & (pages < built.pages.num_pages)]
    is_bad = np.zeros_like(built.is_held)
    is_bad[pages] = built.is_held[pages]
    arrays = []
    for x in built.pages.arrays:
        rows = np.moveaxis(np.array(x), (layout.page_axis, layout.offset_axis), (0, 1))
        rows[is_bad] = bad
        arrays.append(jnp.asarray(np.moveaxis(rows, (0, 1), (layout.page_axis, layout.offset_axis))))
    return layout.wrap(*arrays, k_scale=built.pages.k_scale, v_scale=built.pages.v_scale)
