"""Invariants of the TPU lowering for mixed batches: how prompts are cut, other sequences, and the order of sequences.

The kernels are those of `test_ragged_edges`: with a window, tiles of 16 rows and blocks of two pages.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from paged.spec import AttentionState, RaggedBatch
from tests.support import assert_bitwise, assert_state_close, build, exact_state

from .edges import with_batch
from .interpreter import interpreted, state_of, watched
from .test_ragged_edges import CASE, LONG, SCHEDULE, _rows_of

TOKENS, SLOTS = CASE.tokens, len(LONG.rows)
# The distance of two float32 results for inputs of this spread: see `TOLERANCES`.
CLOSE = {"rtol": 0, "atol": 4e-5}


def _attend():
    return interpreted(CASE, SCHEDULE)


def _rows(counts, skip):
    """The rows of a step: of every sequence ``s`` its next ``counts[s]`` rows, after the first ``skip[s]``."""
    starts = np.concatenate([[0], np.cumsum(LONG.rows)])
    return np.concatenate([starts[s] + skip[s] + np.arange(counts[s]) for s in range(SLOTS)]).astype(int)


def _padded(x, rows):
    """The named rows of ``x``, followed by rows of NaN."""
    return jnp.full(x.shape, jnp.nan, x.dtype).at[: len(rows)].set(x[rows])


def _in_steps(built, steps):
    """The output of all rows, and the pages, after one update per step. A step is a number of rows per sequence."""
    pages, out, done = built.pages, np.full(built.q.shape, np.nan, np.float32), np.zeros(SLOTS, int)
    before = np.asarray(built.batch.lengths) - np.array(LONG.rows)
    for counts in steps:
        rows = _rows(counts, done)
        done = done + counts
        starts = np.concatenate([[0], np.cumsum(counts)])
        batch = RaggedBatch(before + done, built.batch.block_tables, starts, SLOTS)
        q, k, v = (_padded(x, rows) for x in (built.q, built.k, built.v))
        got, pages = watched(_attend().update, q, k, v, pages, batch)
        out[rows] = np.asarray(got)[: len(rows)]
        assert not np.asarray(got)[len(rows) :].any()
    assert done.tolist() == list(LONG.rows)
    return out, pages


# Ways to cut the sequences' rows, 17, 1, 33, 1 and 4, into steps.
STEPS = {
    "tile by tile": [(16, 1, 16, 0, 0), (1, 0, 16, 1, 4), (0, 0, 1, 0, 0)],
    "row by row at last": [(14, 0, 30, 0, 1)] + [(1, 0, 1, 0, 1)] * 3 + [(0, 1, 0, 1, 0)],
    "one sequence at a time": [tuple(n * (s == t) for t in range(5)) for s, n in enumerate(LONG.rows)],
    "a row, and the rest": [(1, 1, 1, 1, 1), (16, 0, 32, 0, 3)],
}


SLOW_STEPS = ("one sequence at a time", "a row, and the rest")


@functools.cache
def _in_one_step():
    """The same in a single step, which is compared with the reference."""
    built, held = (build(CASE.replace(corner=LONG), hold_new=hold) for hold in (False, True))
    out, pages = _in_steps(built, [LONG.rows])
    assert_state_close(AttentionState(jnp.asarray(np.nan_to_num(out)), jnp.asarray(exact_state(held).lse)), held)
    return built, out, pages


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.kernels] * (n in SLOW_STEPS)) for n in STEPS])
def test_chunks_of_prompts_give_what_one_chunk_gives(name):
    """Some steps have single rows, which the decode kernel computes, at the beginning or at the end of a sequence."""
    built, whole, written = _in_one_step()
    out, pages = _in_steps(built, STEPS[name])
    np.testing.assert_allclose(out[: sum(LONG.rows)], whole[: sum(LONG.rows)], **CLOSE)
    assert_bitwise(pages.arrays, written.arrays)


@pytest.mark.parametrize("s", range(SLOTS))
def test_a_sequence_alone_is_the_same_bitwise(s):
    """The sequence keeps its slot, and its rows are the first of the batch. The other sequences have no rows."""
    built = build(CASE.replace(corner=LONG))
    rows, together = _rows_of(built, s), state_of(_attend(), built)
    starts = np.where(np.arange(SLOTS + 1) > s, len(rows), 0)
    alone = with_batch(built, query_starts=jnp.asarray(starts, jnp.int32))
    q = _padded(built.q, rows)
    got = watched(_attend().state, q, built.pages, alone.batch)
    assert_bitwise((x[: len(rows)] for x in got), (x[rows] for x in together))
    assert not np.asarray(got.out)[len(rows) :].any()


@pytest.mark.parametrize("order", [(4, 3, 2, 1, 0), (2, 0, 3, 1, 4)])
def test_the_order_of_sequences_is_invisible_bitwise(order):
    built = build(CASE.replace(corner=LONG))
    want, rows = state_of(_attend(), built), np.concatenate([_rows_of(built, s) for s in order])
    counts, batch = np.array(LONG.rows)[list(order)], built.batch
    moved = RaggedBatch(
        batch.lengths[jnp.array(order)],
        batch.block_tables[jnp.array(order)],
        np.concatenate([[0], np.cumsum(counts)]),
        batch.num_seqs,
    )
    got = watched(_attend().state, _padded(built.q, rows), built.pages, moved)
    assert_bitwise((x[: len(rows)] for x in got), (x[rows] for x in want))
