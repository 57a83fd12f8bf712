"""Promises that nothing leaks: from other pages, other sequences, other places in the batch, or an earlier call."""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from paged.spec import Pages

from ..arrays import Built
from ..cases import Phase
from .subject import LeftOut, Subject, assert_nothing, assert_same, leaves, owned


def check_reruns(subject: Subject, phase: Phase) -> None:
    """The same call again gives the same bits."""
    built = subject.build(phase)
    assert_same(subject.run(built), subject.run(built), owned(built), "a second call changed a result")


def check_page_order(subject: Subject, phase: Phase) -> None:
    """Pages move in the pool, and everything that no live token owns is drawn anew: no bit of the result changes."""
    for corner in ("mixed", "few live", *subject.own_corners):
        builts = [subject.build(phase, corner, physical_seed=i, padding_seed=i) for i in range(3)]
        first, *others = (subject.run(built) for built in builts)
        for other in others:
            what = "the order of pages, or what unused places hold, changed a result"
            assert_same(first, other, owned(builts[0]), what)


def check_other_sequences(subject: Subject, phase: Phase) -> None:
    """Other sequences' lengths and contents change: no bit of a sequence's own rows does."""
    built, changed = (subject.build(phase, "one past a page", changed=seqs) for seqs in ((), (0, 2, 4)))
    before, after = subject.run(built), subject.run(changed)
    assert_same(before, after, owned(built, 1, 3), "another sequence changed a result")
    rows = owned(built, 0, 2, 4)
    assert (leaves(before)[0][rows] != leaves(after)[0][rows]).any(), "new keys and values changed no result"


def check_sequences_alone(subject: Subject, phase: Phase) -> None:
    """A sequence whose neighbours have no rows has the same bits. It keeps its slot, and its rows are the first."""
    for built in (subject.build(phase, corner) for corner in ("mixed", *subject.own_corners)):
        together = subject.run(built)
        for s in range(built.batch.num_slots):
            rows = np.flatnonzero(owned(built, s))
            starts = np.where(np.arange(built.batch.num_slots + 1) > s, len(rows), 0)
            q = jnp.full_like(built.q, jnp.nan).at[: len(rows)].set(built.q[rows])
            own = {"query_starts": jnp.asarray(starts, jnp.int32), **built.rows_first(rows)}
            alone = subject.run(built.with_batch(**own), q=q)
            first = [x[: len(rows)] for x in leaves(alone)]
            want = [x[rows] for x in leaves(together)]
            assert_same(first, want, np.arange(len(rows)), f"sequence {s} alone differs")
            assert_nothing(alone, slice(len(rows), None))


def check_order_of_sequences(subject: Subject, phase: Phase) -> None:
    """Sequences change places in the batch: no bit of their rows changes."""
    for built in (subject.build(phase, corner) for corner in ("mixed", *subject.own_corners)):
        for order in ((4, 3, 2, 1, 0), (2, 0, 3, 1, 4)):
            _assert_order_is_invisible(subject, built, order)


def _assert_order_is_invisible(subject: Subject, built: Built, order: tuple[int, ...]) -> None:
    batch = built.batch
    rows = np.concatenate([np.flatnonzero(owned(built, s)) for s in order])
    at = jnp.array(order)
    moved: dict[str, Any] = {"lengths": batch.lengths[at], "block_tables": batch.block_tables[at]}
    moved |= {"values": {name: x[at] for name, x in batch.values.items()}, **built.rows_first(rows)}
    if built.case.phase == "ragged":
        counts = np.diff(np.asarray(batch.query_starts))[list(order)]
        moved["query_starts"] = jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32)
    q = jnp.full_like(built.q, jnp.nan).at[: len(rows)].set(built.q[rows])
    got = [x[: len(rows)] for x in leaves(subject.run(built.with_batch(**moved), q=q))]
    want = [x[rows] for x in leaves(subject.run(built))]
    assert_same(got, want, np.arange(len(rows)), "the order of sequences shows")


def check_padding(subject: Subject, phase: Phase) -> None:
    """Rows of no sequence give 0 and ``-inf``, whatever their queries are."""
    for corner in ("few live", "all dead"):
        built = subject.build(phase, corner)
        assert_nothing(subject.run(built), ~owned(built))


def check_bad_values_stay(subject: Subject, phase: Phase) -> None:
    """NaN or infinity in all keys and values of one sequence changes no bit of another: its results and its pages."""
    if subject.layout.is_quantised:
        raise LeftOut("quantised pages hold neither NaN nor infinity")
    for corner in subject.own_corners or ("mixed",):
        built = subject.build(phase, corner)
        clean = subject.run(built)
        for bad, seq in itertools.product((np.nan, np.inf), _that_see(built)):
            found = subject.run(dataclasses.replace(built, pages=_with_bad(built, seq, bad)))
            assert_same(clean, found, ~owned(built, seq), f"{bad} in sequence {seq} changed another's result")
            own = np.flatnonzero(owned(built, seq))
            assert (leaves(clean)[0][own] != leaves(found)[0][own]).any(), f"{bad} in sequence {seq} changed nothing"
    if subject.can_update:
        _check_bad_tokens_stay(subject, subject.build(phase, hold_new=False))


def _check_bad_tokens_stay(subject: Subject, built: Built) -> None:
    clean, clean_pages = subject.update(built)
    for seq in _that_see(built):
        is_own = owned(built, seq)
        k, v = (jnp.where(is_own[:, None, None], jnp.nan, x) for x in (built.k, built.v))
        bad = dataclasses.replace(built, k=k, v=v, pages=_with_bad(built, seq, np.nan))
        found, pages = subject.update(bad)
        assert_same([clean], [found], ~is_own, f"NaN in new tokens of sequence {seq} changed another's result")
        others = np.setdiff1d(np.arange(pages.num_pages), np.asarray(built.batch.block_tables[seq]))
        for a, b in ((pages.keys(), clean_pages.keys()), (pages.values(), clean_pages.values())):
            np.testing.assert_array_equal(np.asarray(a)[others], np.asarray(b)[others], f"pages beside {seq}'s")


def _that_see(built: Built) -> list[int]:
    """The sequences of which a row sees a key."""
    rows = zip(built.row_of, built.visible, strict=True)
    return sorted({owner[0] for owner, seen in rows if owner is not None and seen is not None and len(seen)})


def _with_bad(built: Built, seq: int, bad: float) -> Pages:
    """The case's pages, with ``bad`` in all keys and values of a sequence that lie in pages which a row of it sees.

    Its other table entries hold garbage, and may name another sequence's pages.
    """
    layout, tables = built.pages.layout, np.asarray(built.batch.block_tables)
    rows = zip(built.row_of, built.visible, strict=True)
    seen = [keys for owner, keys in rows if owner is not None and owner[0] == seq and keys is not None]
    pages = tables[seq, np.unique(np.concatenate(seen) // layout.page_size)]
    is_bad = np.zeros_like(built.is_held)
    is_bad[pages] = built.is_held[pages]
    arrays = []
    for x in built.pages.arrays:
        rows = np.moveaxis(np.array(x), (layout.page_axis, layout.offset_axis), (0, 1))
        rows[is_bad] = bad
        arrays.append(jnp.asarray(np.moveaxis(rows, (0, 1), (layout.page_axis, layout.offset_axis))))
    return layout.wrap(*arrays, k_scale=built.pages.k_scale, v_scale=built.pages.v_scale)
