"""Pictures of masks, pages and heads: what is drawn is what lowerings are told, and words have room."""

import dataclasses
import time

import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged import pictures
from paged.pictures._answers import Step
from paged.pictures._pages import draw
from tests.pictures.drawn import require_sound, tiles

LAYOUT = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
SPEC = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
MASKS = {
    "causal": SPEC,
    "window": SPEC.replace(window=6),
    "prefix": SPEC.replace(causal=False, mask=(paged.Causal() & paged.Window(5)) | paged.Prefix(3)),
    "chunk": SPEC.replace(mask=paged.Chunk(8)),
    "value": SPEC.replace(window=paged.Value("window")),
    "heads": SPEC.replace(mask=paged.PerHead((paged.Window(2), paged.Chunk(8)))),
}
# Seven slots: a trimmed one, two that share pages, one without rows, an empty one, and one that no step counts.
LENGTHS, ROWS = [19, 11, 9, 14, 0, 7, 8], [2, 3, 1, 0, 0, 2, 0]
TABLES = [
    [-1, -1, 9, 4, 8],
    [1, 2, 6, -1, -1],
    [1, 2, 11, -1, -1],
    [12, 13, 14, 15, -1],
    [-1] * 5,
    [0, 99, 3, 3, 3],
    [16, 17, 18, 0, 0],
]


def _batch(has_values=False):
    values = {"window": np.array([3, 6, 9, 1, 1, 2, 1], np.int32)} if has_values else None
    return paged.RaggedBatch(LENGTHS, TABLES, np.cumsum([0, *ROWS]), num_seqs=6, values=values)


@pytest.mark.kernels
@pytest.mark.parametrize("name", MASKS)
def test_pages_drawn_as_skipped_are_those_that_the_lowering_skips(name):
    """The XLA lowering's own lists, made for the same step, hold every other page; and `explain` counts as many."""
    attend, batch = paged.lower(MASKS[name], LAYOUT, target="xla"), _batch(name == "value")
    pages = LAYOUT.init(num_pages=24)
    q = jnp.ones((sum(ROWS), 4, 8))
    picture = pictures.pages(attend, batch, num_pages=24)
    large = [pictures.pages(attend, batch, slot, num_pages=24) for slot in range(2)]
    visited, full = set(), set()
    for phase in attend.plan(q, pages, batch).seqs.planned.phases:
        for block in range(int(phase.count)):
            count, index = int(phase.visits.count[block]), np.asarray(phase.visits.index[block])
            visited |= {(int(phase.seq[block]), int(page)) for page in index[:count]}
            full |= {(int(phase.seq[block]), int(page)) for page in index[: int(phase.visits.num_full[block])]}
    states = Step.of(attend.program, batch, 4, 24).states()
    assert {tuple(at) for at in np.argwhere(np.isin(states, ("F", "P"))).tolist()} == visited
    assert {tuple(at) for at in np.argwhere(states == "F").tolist()} == full
    held = {(slot, page) for slot, length in enumerate(LENGTHS[:6]) if ROWS[slot] for page in range(-(-length // 4))}
    freed = {(0, 0), (0, 1), (5, 1)}
    assert {tuple(at) for at in np.argwhere(states == "S").tolist()} == held - visited - freed
    assert {tuple(at) for at in np.argwhere(states == "X").tolist()} == freed
    explained = attend.explain(q, pages, batch)
    assert picture.description.startswith(f"{explained.pages_visited} pages visited")
    assert f"{explained.pages_freed} freed, 2 shared" in picture.description
    for one in (picture, *large):
        require_sound(one)


@pytest.mark.kernels
def test_tokens_that_are_seen_follow_what_a_batch_brings():
    """A tree of drafts, and positions of its rows: rows 0 and 1 are one branch, rows 0 and 2 the other."""
    spec = SPEC.replace(causal=False, mask=paged.Tree() & paged.Causal() & paged.Window(4))
    brought = {"positions": np.array([5, 6, 6], np.int32), "ancestors": np.array([0, 1, 1], np.int32)}
    batch = paged.RaggedBatch.decode([8], [[3, 1]], query_rows=3, **brought)
    step = Step.of(paged.Program.from_spec(spec), batch, 4, 6)
    any_seen, all_seen = step.tokens_seen(0)
    rows = {
        5: {2, 3, 4, 5},
        6: {3, 4, 5, 6},
        7: {3, 4, 5, 7},
    }  # by place: row 2 is at position 6, and does not see row 1
    assert set(np.flatnonzero(any_seen).tolist()) == set.union(*rows.values())
    assert set(np.flatnonzero(all_seen).tolist()) == set.intersection(*rows.values())
    require_sound(draw(step, 0))


def test_a_tree_is_drawn_as_the_step_that_scores_it():
    """Rows at places 7 to 11 and positions 7, 8, 8, 9 and 9: two branches after the first row."""
    drafts, spec = paged.tree.from_topk((2, 1)), SPEC.replace(mask=paged.Window(4) & paged.Tree())
    picture = pictures.mask(spec, 5, 12, page_size=4, rows_per_tile=5, drafts=drafts)
    require_sound(picture)
    pairs = ["....####....", ".....####...", ".....###.#..", "......###.#.", "......##.#.#"]
    assert [line.split()[0] for line in picture.text.splitlines()[1:6]] == pairs
    assert picture.text.splitlines()[1].split()[1] == ".++"
    batch = paged.tree.batch([12], [[0, 1, 2]], drafts)
    any_seen, all_seen = Step.of(paged.Program.from_spec(spec), batch, 4, 3).tokens_seen(0)
    for each, of_rows in ((any_seen, any), (all_seen, all)):
        assert each.tolist() == [of_rows(row[j] == "#" for row in pairs) for j in range(12)]
    with pytest.raises(ValueError, match=r"is for a mask with a Tree; got j <= p\."):
        pictures.mask(SPEC, 5, 12, drafts=drafts)
    with pytest.raises(ValueError, match=r"a tree of \[5\] rows; got rows 8 to 11 of 12"):
        pictures.mask(spec, 4, 12, drafts=drafts)


def _crowd(mask, page_size=16):
    """64 sequences of up to 512 pages."""
    random = np.random.default_rng(0)
    layout = paged.PageLayout(page_size=page_size, num_kv_heads=2, head_dim=8)
    lengths = random.integers(1, 512 * page_size, 64)
    tables = random.permutation(64 * 512).reshape(64, 512)
    spec = SPEC.replace(mask=mask, causal=False)
    return paged.lower(spec, layout), paged.RaggedBatch.decode(lengths, tables)


def test_a_crowd_of_sequences_is_small_quick_and_drawn_as_it_is_skipped():
    attend, batch = _crowd(paged.Causal() & (paged.Window(2000) | paged.Prefix(100)))
    picture = pictures.pages(attend, batch, num_pages=64 * 512)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        pictures.pages(attend, batch, num_pages=64 * 512)
        seconds.append(time.process_time() - start)
    assert len(picture.svg) < 300_000 and min(seconds) < 0.2
    require_sound(picture)
    states = Step.of(attend.program, batch, 16, 64 * 512).states()
    p, j = np.asarray(batch.lengths)[:, None] - 1, np.arange(512 * 16)[None]
    is_seen = ((j <= p) & ((p - j < 2000) | (j < 100))).reshape(64, 512, 16)
    assert np.array_equal(is_seen.any(axis=2), np.isin(states, ("F", "P")))
    assert np.all(is_seen.all(axis=2)[states == "F"]) and np.sum(states == "F") > 6000
    for letter in "FPS":  # the first matrix is in the order of tables, the second one is the pool
        in_order, in_pool, *_ = tiles(picture.svg, letter)
        assert in_order == {tuple(at) for at in np.argwhere(states == letter).tolist()}
        places = np.asarray(batch.block_tables)[states == letter].tolist()
        assert in_pool == {(page // 256, page % 256) for page in places}


def test_a_mask_that_sees_every_other_page_is_the_largest_picture():
    """Neighbours share no stroke there. The masks of pages are those of one token per page."""
    attend, batch = _crowd(paged.Where(lambda p, j: j % 2 == 0), page_size=1)
    seen = Step.of(attend.program, batch, 1, 64 * 512)
    every_other = seen.seen._replace(some=seen.seen.some & (np.arange(512) % 2 == 0)[None])
    picture = draw(dataclasses.replace(seen, seen=every_other))
    assert 100_000 < len(picture.svg) < 300_000


@dataclasses.dataclass(frozen=True)
class Lying(paged.Mask):
    """Every key, whose coverage denies those from 8 on."""

    def __call__(self, p, j):
        return (j >= 0) & (p >= 0)

    def coverage(self, p0, p1, j0, j1):
        return paged.Coverage(some=j0 < 8, full=j1 <= 8)


def test_a_mask_whose_coverage_is_wrong_is_drawn_so():
    picture = pictures.mask(SPEC.replace(causal=False, mask=Lying()), 4, 16, page_size=4, rows_per_tile=4)
    assert "2 of them are wrong: the pairs say otherwise" in picture.description
    assert tiles(picture.svg, "W")[0] == {(0, 2), (0, 3)}
    require_sound(picture)


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_drawn_beside_what_coverage_says(name):
    spec, values = MASKS[name], {"window": 5} if name == "value" else None
    picture = pictures.mask(spec, 13, 29, page_size=4, rows_per_tile=2, values=values)
    program = paged.Program.from_spec(spec)
    states = {"F": set(), "P": set(), "S": set()}
    for row, p in enumerate(range(16, 29, 2)):
        for column, j in enumerate(range(0, 29, 4)):
            found = str(program.coverage(p, min(p + 2, 29), j, j + 4, 29, values or {}))
            states[{"full": "F", "partial": "P", "empty": "S"}[found]].add((row, column))
    for letter, expected in states.items():  # the last row of tiles has one row of queries, and is drawn by itself
        above, last = {at for at in expected if at[0] < 6}, {(0, column) for row, column in expected if row == 6}
        assert all(part in tiles(picture.svg, letter) for part in (above, last) if part)
    p, j = np.arange(16, 29)[:, None], np.arange(29)[None]
    if name not in ("heads", "value"):
        is_seen = np.asarray(program.visible(p, j, 29))
        assert tiles(picture.svg, "F")[0] == {tuple(at) for at in np.argwhere(is_seen).tolist()}
    require_sound(picture)


def test_masks_of_each_head_are_drawn_alone_and_together():
    spec = MASKS["heads"]
    first, last, both = (pictures.mask(spec, 12, 12, page_size=2, head=head) for head in (0, 3, None))
    windows, chunks = (tiles(one.svg, "F")[0] for one in (first, last))
    assert tiles(both.svg, "F")[0] == windows & chunks and tiles(both.svg, "P")[0] == windows ^ chunks


def test_a_long_mask_is_drawn_in_squares():
    picture = pictures.mask(SPEC.replace(window=300), 1000, 1024)
    assert "11 x 11" in picture.svg and len(picture.svg) < 60_000
    require_sound(picture)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        MASKS["heads"],
        SPEC.replace(num_q_heads=128, num_kv_heads=8),
        SPEC.replace(num_q_heads=40, num_kv_heads=40, sinks=True),
    ],
    ids=["groups", "masks", "wide groups", "many"],
)
def test_heads_are_drawn_in_their_groups(spec):
    picture = pictures.heads(spec)
    require_sound(picture)
    shown = spec.num_kv_heads if spec.num_kv_heads <= 16 else 16
    assert picture.text.count("KV ") == shown and ("*" in picture.text) == spec.sinks


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(rows=0, length=4), "at least one row"),
        (dict(rows=2**13, length=2**13), "at most 2\\*\\*24 pairs"),
        (dict(rows=4, length=4, head=4), "head must be in"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        pictures.mask(SPEC, **arguments)
    with pytest.raises(ValueError, match="window"):
        pictures.mask(MASKS["value"], 4, 4)
    with pytest.raises(ValueError, match="must be a slot"):
        pictures.pages(paged.lower(SPEC, LAYOUT), _batch(), 7)
