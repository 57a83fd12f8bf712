"""Promises about steps: parts that merge, chunks, one trace, and an update that writes its own places alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paged.spec import AttentionState, Pages, add_sinks, merge, sinks_per_head

from ..arrays import Built
from ..cases import PAST_THE_TABLE, Corner, Phase
from ..writes import require_written
from .subject import LeftOut, Subject, in_words, leaves, owned

_NO_SINK = -1e30  # a sink that adds nothing to a sum which holds any key


def check_split_and_merge(subject: Subject, phase: Phase) -> None:
    """The states over two halves of the pages merge to the state over all; sinks enter once, at the end.

    Each half sees the other's pages as holes.
    """
    for corner in ("first page masked", "mixed"):
        built, states = subject.build(phase, corner), []
        table = built.batch.block_tables
        for half in range(2):
            is_own = jnp.arange(table.shape[1])[None] % 2 == half
            part = built.with_batch(block_tables=jnp.where(is_own, table, -1))
            sinks = None if built.sinks is None else jnp.full_like(built.sinks, _NO_SINK)
            states.append(subject.run(part, sinks=sinks))
        merged = merge(*states)
        if built.sinks is not None:
            is_owned = owned(built)[:, None]
            with_sinks = add_sinks(merged, sinks_per_head(subject.spec, built.sinks))
            merged = AttentionState(with_sinks.out, jnp.where(is_owned, with_sinks.lse, merged.lse))
        subject.assert_close(merged, built)


# Ways to cut the rows of sequences into steps, from how many rows each sequence has.
def _steps(rows: np.ndarray) -> list[list[np.ndarray]]:
    first = np.minimum(rows, 1)
    half = rows // 2
    last = np.minimum(rows - half, 1)
    one_by_one = [np.where(np.arange(len(rows)) == s, rows, 0) for s in range(len(rows)) if rows[s]]
    return [[first, rows - first], [half, rows - half - last, last], one_by_one]


def check_chunks(subject: Subject, phase: Phase) -> None:
    """The rows of all sequences in one step, or in several that cut them elsewhere: the same rows, the same pages."""
    for corner in ("no rows in the middle", *subject.own_corners):
        built = subject.build(phase, corner, hold_new=not subject.can_update)
        if built.batch.positions is not None or built.batch.ancestors is not None:
            raise LeftOut("positions and ancestors are of a step's own tokens")
        if _sees_ahead(built):
            raise LeftOut("rows see tokens that a later step writes")
        held = subject.build(phase, corner)
        rows = np.diff(np.asarray(built.batch.query_starts)[: built.batch.num_slots + 1])
        for steps in _steps(rows):
            out, pages = _in_steps(subject, built, steps)
            got = np.where(owned(held)[:, None, None], out, 0)
            subject.assert_close(jnp.asarray(got, built.q.dtype), held)
            if subject.can_update:
                require_written(pages, built.k, built.v, built.pages, built.batch, in_words(built))


def _in_steps(subject: Subject, built: Built, steps: list[np.ndarray]) -> tuple[np.ndarray, Pages]:
    """The output of all rows, and the pages, after one step for each array of row counts."""
    starts, total = np.asarray(built.batch.query_starts), sum(steps)
    before, done = np.asarray(built.batch.lengths) - total, np.zeros_like(total)
    out, pages = np.zeros((*built.q.shape[:2], built.case.layout.value_dim), np.float32), built.pages
    for counts in steps:
        rows = np.concatenate([starts[s] + done[s] + np.arange(n) for s, n in enumerate(counts)]).astype(int)
        done = done + counts
        q, k, v = (_first_rows(x, rows) for x in (built.q, built.k, built.v))
        step = dataclasses.replace(built, q=q, k=k, v=v, pages=pages).with_batch(
            lengths=jnp.asarray(before + done, jnp.int32),
            query_starts=jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32),
        )
        got, pages = subject.update(step) if subject.can_update else (subject.run(step), pages)
        got = leaves(got)[0]
        out[rows] = got[: len(rows)]
        assert not got[len(rows) :].any(), "rows of no sequence are not 0"
    return out, pages


def _first_rows(x: jax.Array, rows: np.ndarray) -> jax.Array:
    """The named rows of ``x`` first, and rows of NaN after them."""
    return jnp.full(x.shape, jnp.nan, x.dtype).at[: len(rows)].set(x[rows])


def _sees_ahead(built: Built) -> bool:
    """Whether a row sees later tokens. Then the rows of a chunk miss tokens that are not written yet."""
    rows = zip(built.visible, built.row_of, strict=True)
    return any(len(seen) and seen[-1] > owner[1] for seen, owner in rows if seen is not None and owner is not None)


def check_one_trace(subject: Subject, phase: Phase) -> None:
    """Lengths, tables, row counts and live sequences are data: a new value never traces again."""
    traces: list[Any] = []
    run = getattr(subject.attention, "state", subject.attention)

    def step(*args: Any) -> Any:
        traces.append(args)
        return run(*args)

    jitted = jax.jit(step)
    for corner in subject.corners:
        built = subject.build(phase, corner)
        jitted.trace(built.q, built.pages, built.batch, *(() if built.sinks is None else (built.sinks,)))
    assert len(traces) == 1, f"{len(traces)} traces for batches of one shape: a value decided what is traced"


def check_update(subject: Subject, phase: Phase) -> None:
    """`update` puts every row into its place, changes no other bit, and then attends over the pages."""
    corners = (*subject.corners, PAST_THE_TABLE, *([] if phase == "prefill" else [_NEIGHBOURS]))
    for corner in corners:
        built, held = (subject.build(phase, corner, hold_new=hold) for hold in (False, True))
        if corner == _NEIGHBOURS:
            built, held = _share_a_page(built), _share_a_page(held)
        out, pages = _updated(subject, built)
        subject.assert_close(out, dataclasses.replace(held, pages=pages))
    _check_stale_entries(subject, subject.build(phase, "one past a page", hold_new=False))


# The first two sequences write next to each other in one page: see `_share_a_page`.
_NEIGHBOURS = Corner(((0, 3), (0, 4), (1, 1), (0, 2), (2, 0)), (1, 1, 1, 1, 1))


def _share_a_page(built: Built) -> Built:
    """The first two sequences in one page. What it holds is the second one's; the first one's new token is its own."""
    tables = built.batch.block_tables
    return built.with_batch(block_tables=tables.at[0, 0].set(tables[1, 0]))


def _check_stale_entries(subject: Subject, built: Built) -> None:
    """Every table entry that no token needs names a page that this step writes: the write is kept."""
    table, lengths = np.array(built.batch.block_tables), np.asarray(built.batch.lengths)
    written = table[0, (int(lengths[0]) - 1) // subject.layout.page_size]
    is_unused = np.arange(table.shape[1])[None] >= -(-lengths // subject.layout.page_size)[:, None]
    _updated(subject, built.with_batch(block_tables=jnp.asarray(np.where(is_unused, written, table))))


def _updated(subject: Subject, built: Built) -> tuple[jax.Array, Pages]:
    """The output and the pages after an update, whose writes are checked."""
    out, pages = subject.update(built)
    require_written(pages, built.k, built.v, built.pages, built.batch, in_words(built))
    return out, pages


def check_in_place(subject: Subject, phase: Phase) -> None:
    """`update` copies no pages that are donated to it."""
    built = subject.build(phase, hold_new=False)
    sinks = () if built.sinks is None else (built.sinks,)
    pages = jax.tree.map(lambda x: x.copy(), built.pages)
    before = [x.unsafe_buffer_pointer() for x in pages.arrays]
    _, after = subject.donating(built.q, built.k, built.v, pages, built.batch, *sinks)
    moved = [i for i, x in enumerate(after.arrays) if x.unsafe_buffer_pointer() != before[i]]
    assert not moved, f"arrays {moved} of the donated pages were copied"
