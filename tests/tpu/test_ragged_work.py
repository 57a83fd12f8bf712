"""How query rows are cut into tiles, and which pages each tile fetches, compared with the mask pair by pair."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from paged.lower import Program, Sequences
from paged.lower.tpu.pages.work import TileVisits
from paged.lower.tpu.prefill.shape import _MOST_ROWS, TileShape
from paged.lower.tpu.prefill.tiles import cut, most_tiles
from paged.spec import AttentionSpec, Causal, Chunk, Prefix
from tests.support import CORNERS, Case, Corner, build
from tests.support.specs import PLAIN

TOKENS = 64
ROWS = ((0, 0, 0, 0, 0), (1, 1, 1, 1, 1), (17, 0, 1, 16, 30), (64, 0, 0, 0, 0), (0, 0, 0, 0, 64), (15, 16, 17, 1, 15))


def _sequences(counts, before=0, lengths=(300, 40, 64, 16, 64)):
    counts, lengths, tables = np.array(counts), np.array(lengths), np.arange(20).reshape(5, 4)
    starts = before + np.cumsum(counts) - counts
    values = (starts, counts, lengths - counts, lengths, tables)
    return Sequences(*(jnp.asarray(x, jnp.int32) for x in values))


@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize("counts", ROWS)
def test_tiles_are_the_rows_of_each_sequence_in_turn_and_then_those_of_none(counts, rows, least):
    """Sequences of fewer than ``least`` rows have no tile. The first row belongs to no sequence where there is room."""
    before = min(1, TOKENS - sum(counts))
    seqs = _sequences(counts, before)
    tiles = cut(seqs, seqs.counts >= least, TOKENS, rows, most_tiles(TOKENS, 5, rows))
    want = [
        (int(seqs.starts[s]) + first, min(rows, n - first), int(seqs.lengths[s]) - n + first, int(seqs.lengths[s]), s)
        for s, n in enumerate(counts)
        for first in range(0, n if n >= least else 0, rows)
    ]
    columns = (tiles.starts, tiles.counts, tiles.positions, tiles.lengths, tiles.tables[:, 0] // 4)
    got = list(zip(*(x.tolist() for x in columns), strict=True))
    assert got[: len(want)] == want
    of_none = [tile for tile in got[len(want) :] if tile[1]]
    assert all(length == 0 and count <= rows for _, count, _, length, _ in of_none), "they see no key"
    owned = np.arange(before, before + sum(counts))
    ranges = [np.arange(start, start + count) for start, count, *_ in of_none]
    np.testing.assert_array_equal(np.concatenate([*ranges, []]), np.setdiff1d(np.arange(TOKENS), owned))
    last = len(want) + len(of_none)
    assert all(count == 0 for _, count, *_ in got[last:]), "other tiles have no rows"
    np.testing.assert_array_equal(tiles.tables, np.asarray(seqs.tables)[np.asarray(tiles.tables[:, 0]) // 4])


@pytest.mark.parametrize("rows", [16, 64])
def test_there_are_never_more_tiles_than_the_most(rows):
    """For random numbers of rows. A sequence whose tiles are more than the most would lose its last rows."""
    rng = np.random.default_rng(rows)
    for tokens in (0, 1, rows - 1, rows, 5 * rows, 200):
        for _ in range(20):
            # Five sequences between rows of none.
            cuts = np.sort(rng.integers(0, tokens + 1, 6))
            counts = np.diff(np.concatenate([[0], cuts, [tokens]]))
            assert np.sum(-(-counts // rows)) <= most_tiles(tokens, 5, rows)
    assert most_tiles(5 * rows + 7, 5, rows) == 5 * rows // rows + 7, "each of seven ranges has a row more than a tile"


SPECS = {
    "causal": PLAIN,
    "window": PLAIN.replace(window=20),
    "window, not the prefix": PLAIN.replace(window=20, mask=~Prefix(10)),
    "chunk": PLAIN.replace(mask=Chunk(24)),
    "not causal": PLAIN.replace(causal=False),
    "prefix or causal": PLAIN.replace(causal=False, mask=Causal() | Prefix(21)),
}
LONG = Corner(((9, 0), (8, 1), (0, 3), (4, -1), (1, 0)), (17, 1, 5, 33, 8))


def _visited(spec, corner, rows, hole=False):
    case = Case(spec=spec, page_size=8, tokens=64, corner=corner, pages_per_seq=9)
    built = build(case)
    seqs = Sequences.of(built.batch, TOKENS, 8)
    if hole:
        seqs = seqs._replace(tables=seqs.tables.at[0, 7].set(-1).at[3, 3].set(built.pages.num_pages))
    tiles = cut(seqs, seqs.counts > 0, TOKENS, rows, most_tiles(TOKENS, 5, rows))
    return case, tiles, TileVisits.of(Program.from_spec(spec), tiles, 8, built.pages.num_pages)


def _pairs(spec, tiles, t):
    """Which keys each row of a tile sees, ``[rows, keys]``."""
    p = int(tiles.positions[t]) + np.arange(int(tiles.counts[t]))
    j = np.arange(9 * 8)
    seen = np.broadcast_to(np.asarray(spec.visibility(p[:, None], j[None])), (len(p), len(j)))
    return seen & (j < int(tiles.lengths[t]))


def _coverage(spec, tiles, t):
    """The program's coverage of each page by a tile's rows."""
    p0, first = int(tiles.positions[t]), np.arange(9) * 8
    return Program.from_spec(spec).coverage(p0, p0 + int(tiles.counts[t]), first, first + 8, int(tiles.lengths[t]))


# In these masks each term sees some of a page, and all terms together see none of it. The program cannot know, so its
# coverage is "in part".
ROUGH = ("window, not the prefix",)


# Holes and many rows are met in turn; all four together are for later.
FOUR = [pytest.param(16, True), pytest.param(64, False)]
FOUR += [pytest.param(rows, hole, marks=pytest.mark.kernels) for rows, hole in ((16, False), (64, True))]


@pytest.mark.parametrize(("rows", "hole"), FOUR)
@pytest.mark.parametrize("name", SPECS)
def test_a_tile_lists_exactly_the_pages_that_it_sees(name, rows, hole):
    """Pages that it sees in full come first. What it sees is the mask's value at every pair of a row and a key."""
    for corner in (LONG, *CORNERS):
        case, tiles, visited = _visited(SPECS[name], corner, rows, hole)
        for t in range(tiles.counts.shape[0]):
            pages, table = _pairs(case.spec, tiles, t).reshape(-1, 9, 8), np.asarray(tiles.tables[t])
            is_there = (table >= 0) & (table < case.num_pages) & (len(pages) > 0)
            some, full = pages.any(axis=(0, 2)) & is_there, pages.all(axis=(0, 2)) & is_there
            count, num_full = int(visited.visits.count[t]), int(visited.visits.num_full[t])
            listed = visited.visits.index[t, :count].tolist()
            if name in ROUGH:
                coverage = _coverage(case.spec, tiles, t)
                assert set(np.flatnonzero(some)) <= set(listed) and set(listed[:num_full]) <= set(np.flatnonzero(full))
                some, full = coverage.some & is_there, coverage.full & is_there
            assert listed == [*np.flatnonzero(full), *np.flatnonzero(some & ~full)], (corner, t)
            assert num_full == full.sum() and visited.visits.page[t, :count].tolist() == table[listed].tolist(), (
                corner,
                t,
            )


@pytest.mark.parametrize("window", [1, 8, 20, 72])
@pytest.mark.parametrize("rows", [16, 64])
def test_pages_fetched_under_a_window_are_the_windows_alone(window, rows):
    """A tile fetches the pages from its first row's first visible key to its last row, whatever the length. The work
    list has each of them once."""
    case, tiles, visited = _visited(PLAIN.replace(window=window), Corner(((9, 0),) * 5, (17, 1, 5, 33, 8)), rows)
    first, last = np.asarray(tiles.positions), np.asarray(tiles.positions + tiles.counts - 1)
    want = np.where(tiles.counts > 0, last // 8 - np.maximum(first - window + 1, 0) // 8 + 1, 0)
    np.testing.assert_array_equal(visited.visits.count, want)
    n = want.shape[0]
    work = visited.work_list(slice(0, n), slice(0, 9), splits=1, pages_per_block=2, cores=1)
    np.testing.assert_array_equal(work.count, want)
    fetched = sum(int(c) for c in work.count) * case.layout.bytes_per_page
    assert fetched == want.sum() * 2 * 8 * case.spec.num_kv_heads * case.spec.head_dim * 4
    if window < 72:
        assert want.max() <= -(-(window + rows - 1) // 8) + 1


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (3, 1), (10, 2), (8, 8), (64, 8), (40, 8), (16, 1)])
@pytest.mark.parametrize("positions", [16, 32, 128, 256, 512, 1024])
def test_strip_groups_hold_every_row_of_a_tile_once(heads, positions):
    """Strips are in the order of heads and positions. No strip group has rows of two KV heads, or too many rows."""
    q_heads, kv_heads = heads
    spec = AttentionSpec(num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=8)
    shape = TileShape(positions, q_heads, spec.group)
    assert shape.strip_groups * shape.strip_group_rows == positions * q_heads
    assert shape.strip_groups == kv_heads * shape.strip_groups_per_kv_head
    assert shape.strip_rows <= shape.strip_group_rows <= max(shape.strip_rows, _MOST_ROWS)
    strips = [shape.strips_of(strip_group) for strip_group in range(shape.strip_groups)]
    assert list(itertools.chain(*strips)) == list(range(shape.strips))
    places = [(shape.q_head_of(strip), shape.first_position_of(strip)) for strip in range(shape.strips)]
    firsts = range(0, positions, shape.strip_rows)
    assert places == [(head, first) for head in range(q_heads) for first in firsts]
    for strip_group, of_group in enumerate(strips):
        assert {shape.q_head_of(strip) // spec.group for strip in of_group} == {shape.kv_head_of(strip_group)}
