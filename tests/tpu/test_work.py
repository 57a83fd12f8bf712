"""How a batch becomes a work list: every page in one item, every item on one core, every list in scalar memory."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from paged.lower import Program, Sequences
from paged.lower.tpu import CHIPS
from paged.lower.tpu.pages import kernel_slices
from paged.lower.tpu.pages.work import TileVisits, _bounds
from paged.spec import Prefix
from tests.support import Case, build
from tests.support.specs import PLAIN

SPEC = PLAIN.replace(window=20, mask=~Prefix(10))


def _visited(corner="mixed", **facts):
    case = Case(spec=SPEC, page_size=8, phase="decode", corner=corner, pages_per_seq=9, **facts)
    built = build(case)
    seqs = Sequences.of(built.batch, built.q.shape[0], 8)
    return TileVisits.of(Program.from_spec(case.spec), seqs, 8, built.pages.num_pages)


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize("pages_per_block", [1, 2, 4])
def test_every_page_is_in_one_item(splits, pages_per_block):
    """A sequence's items have its pages in their order. All splits but the last are whole blocks."""
    visited = _visited("first page masked")
    work = visited.work_list(slice(0, 5), slice(0, 9), splits=splits, pages_per_block=pages_per_block, cores=1)
    assert work.begin.shape == (5 * splits,)
    for s in range(5):
        items = range(s * splits, (s + 1) * splits)
        taken = [(int(work.begin[i]) + at, at < int(work.num_full[i])) for i in items for at in range(work.count[i])]
        full, count = int(visited.visits.num_full[s]), int(visited.visits.count[s])
        assert taken == [(9 * s + at, at < full) for at in range(count)]
        parts = [int(work.count[i]) for i in items if work.count[i]]
        assert all(part % pages_per_block == 0 for part in parts[:-1])
    ends = jnp.where(work.count > 0, work.begin - (-work.count // pages_per_block) * pages_per_block, 0)
    assert int(jnp.max(ends)) <= work.index.shape[0], "a kernel looks up whole blocks, past the last list's end"
    busy = [next((k for k in range(i, 5 * splits) if work.count[k]), 5 * splits) for i in range(5 * splits + 1)]
    assert work.busy.tolist() == busy


def test_entries_taken_in_pieces_are_the_whole():
    visited = _visited("first page masked")
    cut = {"splits": 1, "pages_per_block": 2, "cores": 1}
    whole, *pieces = (visited.work_list(slice(0, 5), piece, **cut) for piece in (slice(0, 9), slice(0, 2), slice(2, 9)))
    for name in ("count", "num_full"):
        np.testing.assert_array_equal(getattr(whole, name), sum(getattr(piece, name) for piece in pieces))


@pytest.mark.parametrize("cores", [1, 2, 4])
@pytest.mark.parametrize("items", [1, 2, 5, 64])
def test_cores_share_the_items_evenly(cores, items):
    """A core's load exceeds its share by at most the blocks of one item."""
    rng = np.random.default_rng(items)
    for most in (0, 1, 40):
        blocks = rng.integers(0, most + 1, items)
        bounds = np.asarray(_bounds(jnp.asarray(blocks, jnp.int32), cores))
        assert bounds[0] == 0 and bounds[-1] == items and (np.diff(bounds) >= 0).all() and len(bounds) == cores + 1
        loads = [int((blocks[a:b] + 1).sum()) for a, b in itertools.pairwise(bounds)]
        assert max(loads) <= (blocks + 1).sum() / cores + (blocks + 1).max()


@pytest.mark.parametrize("tables", [(1, 1), (64, 256), (1, 10**6), (256, 4096), (5000, 3), (7, 70000)])
@pytest.mark.parametrize("kv_splits", [1, 8])
def test_kernels_cover_the_tables_once_and_fit(tables, kv_splits):
    """The slices cover the tables without overlap, and leave scalar memory for the compiler."""
    chip = CHIPS["v5e"]
    pieces = list(kernel_slices(tables, chip, kv_splits))
    rows = sorted({(a.start, a.stop) for a, _ in pieces})
    entries = sorted({(b.start, b.stop) for _, b in pieces})
    assert len(pieces) == len(rows) * len(entries)
    for spans, size in ((rows, tables[0]), (entries, tables[1])):
        assert [0, *(stop for _, stop in spans)] == [*(start for start, _ in spans), size]
    for a, b in pieces:
        seqs, width = a.stop - a.start, b.stop - b.start
        integers = 2 * seqs * width + 8 * seqs * kv_splits
        assert 4 * integers <= 0.7 * chip.smem_bytes
