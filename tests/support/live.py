"""A number in a live key or value that is none: it may reach rows of its own sequence, and never another sequence."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from paged.spec import AttentionState, Pages

from .arrays import Built
from .compare import assert_bitwise

State = Callable[[Pages], AttentionState]


def assert_reaches_no_other_sequence(state: State, built: Built, bad: float = np.nan) -> None:
    """Assert that ``bad`` in all keys and values of one sequence, of each in turn, changes no bit of any other.

    ``state`` gives the state of all rows of the built case, over pages that differ from the case's own in the contents
    of live tokens alone. Each sequence that sees a key must show what is bad.
    """
    seeing = sorted({owner[0] for owner, seen in zip(built.row_of, built.visible, strict=True) if owner and len(seen)})
    clean = state(built.pages)
    for seq in seeing:
        found = state(_with_bad(built, seq, bad))
        is_own = np.array([owner is not None and owner[0] == seq for owner in built.row_of])
        assert_bitwise(found, clean, ~is_own)
        assert not np.isfinite(np.asarray(found.out)[is_own]).all(), f"sequence {seq} did not see what is bad"


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
