"""Promises about faults of the caller that are known only at run time: never a crash, and never another's data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ..arrays import Built, build
from ..cases import PAST_THE_TABLE, Phase
from ..tolerances import exact_state
from ..writes import require_written
from .numbers import require_equal
from .subject import Subject, assert_nothing, assert_same, in_words, leaves, owned

# Sequence, page, entry; None is the first entry past the pool.
_HOLES = ((0, 0, -1), (1, 1, None), (3, 0, 2**31 - 1), (4, 1, -(2**31)))


def check_holes(subject: Subject, phase: Phase) -> None:
    """A needed table entry outside the pool hides its tokens: of a first, a middle, a last and an only page."""
    built = subject.build(phase, "exact pages")
    table = built.batch.block_tables
    for s, page, hole in _HOLES:
        if s < built.batch.num_slots:
            table = table.at[s, page].set(built.pages.num_pages if hole is None else hole)
    holed = built.with_batch(block_tables=table)
    assert not np.array_equal(exact_state(holed).out, exact_state(built).out), "no row of this spec needs the entries"
    got = subject.run(holed)
    subject.assert_close(got, holed)
    if built.batch.num_slots > 2:
        assert_same(got, subject.run(built), owned(built, 2), "a hole of another sequence changed a result")


def check_past_the_table(subject: Subject, phase: Phase) -> None:
    """Positions follow the true length, keys past the table do not exist, and rows there are not written.

    Negative lengths are 0.
    """
    require_equal(subject, subject.build(phase, PAST_THE_TABLE))
    built = _with_all_keys(subject, phase, "first page masked")
    capacity = built.batch.pages_per_seq * subject.layout.page_size
    # Biases of positions that far are rounded by more than other terms are.
    far = capacity + 5 if subject.spec.scores else 2**31 - 1
    wild = (capacity + 1, -1, -(2**31), far, capacity + 2)
    assert [n for n, w in zip(built.batch.lengths.tolist(), wild, strict=False) if w > 0 and n != capacity] == []
    faulty = built.with_batch(lengths=jnp.array(wild[: built.batch.num_slots], jnp.int32))
    got = subject.run(faulty)
    subject.assert_close(got, faulty)
    if built.sinks is None:
        assert_nothing(got, owned(built, 1, 2))
    if subject.can_update:
        out, pages = subject.update(faulty)
        require_written(pages, faulty.k, faulty.v, faulty.pages, faulty.batch, in_words(faulty))
        subject.assert_close(out, dataclasses.replace(faulty, pages=pages))


def check_num_seqs_is_clamped(subject: Subject, phase: Phase) -> None:
    """A traced ``num_seqs`` above the number of slots means all of them, and one below 0 means none."""
    built = subject.build(phase)
    many = subject.run(built.with_batch(num_seqs=jnp.int32(10**6)))
    assert_same(many, subject.run(built), owned(built), "more sequences than slots are not all of them")
    for none in (0, -3):
        assert_nothing(subject.run(built.with_batch(num_seqs=jnp.int32(none))))


def _lying_starts(rows: int, tokens: int) -> list[list[int]]:
    """Starts that decrease, overlap, lie outside the rows, or leave first rows to nobody."""
    least = [[0, 1, rows + 1, rows + 1, 2 * rows + 1, 2 * rows + 2], [0, rows, 2 * rows, rows + 1, 3 * rows, 4 * rows]]
    return [
        *([starts for starts in least if max(starts) <= tokens]),
        [0, 3, 2, 3, 4, tokens],
        [-9, 1, 2, 4, 10**6, -(2**31)],
        [1, 1, 1, 2, tokens - 1, tokens],
        [tokens, 0, 0, 0, 0, tokens],
        [0, rows + 2, rows + 3, rows + 4, tokens, tokens],
    ]


def check_starts_that_lie(subject: Subject, phase: Phase) -> None:
    """Starts that decrease give a sequence no rows, and no row has two owners: the running maximum of them counts.

    A sequence with more rows than ``query_rows`` says may leave rows empty. No row shows another sequence's result.
    """
    built = _with_all_keys(subject, phase, "first page masked")
    tokens = built.q.shape[0]
    for starts in _lying_starts(built.batch.query_rows or 1, tokens):
        meant = np.maximum.accumulate(np.clip(starts, 0, tokens))
        want = built.with_batch(query_starts=jnp.asarray(meant, jnp.int32))
        got = subject.run(built.with_batch(query_starts=jnp.asarray(starts, jnp.int32)))
        counts = np.diff(meant)
        is_long = counts > (built.batch.query_rows or tokens)
        may_be_empty = np.zeros(tokens, bool)
        for s in np.flatnonzero(is_long):
            may_be_empty[meant[s] : meant[s + 1]] = True
        kept = ~may_be_empty | leaves(got)[0].any(axis=(1, 2))
        try:
            assert_nothing(got, ~kept)
            subject.assert_close(jax.tree.map(lambda x, kept=kept: x[kept], got), want, kept)
        except AssertionError as error:
            raise AssertionError(f"query_starts {starts}: {error}") from error


def _with_all_keys(subject: Subject, phase: Phase, corner: str) -> Built:
    """Arrays of a case whose pages hold every key before each sequence's length, seen or not."""
    spec = subject.spec.replace(causal=False, window=None, mask=None)
    case = subject.case(phase, corner=corner)
    own, built = build(case), build(case.replace(spec=spec))
    brought = {name: getattr(own.batch, name) for name in ("values", "positions", "ancestors")}
    return dataclasses.replace(built.with_batch(**brought), case=case)
