"""Exactly which pages are read: counts from `explain` and `visits_by_scatter` for windows, chunks, gaps, no rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower import Program, QueryRows, page_coverage, visits_by_scatter
from paged.spec import (
    AttentionSpec,
    Chunk,
    PerHead,
    Prefix,
    RaggedBatch,
    Segments,
    Spans,
    Tree,
    Value,
    Where,
    Window,
)

SPEC = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=4)


def _visited(spec, lengths, *, page_size=16, rows=1, pages_per_seq=None, num_seqs=None, tables=None, **brought):
    """``(pages_visited, pages_held)`` of a decode step, from shapes alone: the pool is never touched."""
    layout = paged.PageLayout(page_size=page_size, num_kv_heads=1, head_dim=4, dtype=jnp.float32)
    width = pages_per_seq or max(1, -(-max(lengths) // page_size))
    tables = np.arange(len(lengths) * width).reshape(-1, width) if tables is None else tables
    batch = RaggedBatch.decode(lengths, tables, num_seqs, query_rows=rows, **brought)
    q = jnp.zeros((rows * len(lengths), 2, 4))
    pages = jax.eval_shape(lambda: layout.init(len(lengths) * width))
    explanation = paged.lower(spec, layout).explain(q, pages, batch)
    assert explanation.bytes_visited == explanation.pages_visited * layout.bytes_per_page
    return explanation.pages_visited, explanation.pages_held


N = Value("n")
COUNTS = {
    # A window of 128 tokens on a context of 16384: 8 pages when aligned, 9 when it straddles; never 1024.
    "window, aligned": (SPEC.replace(window=128), [16384], {}, (8, 1024)),
    "window, one past": (SPEC.replace(window=128), [16369], {}, (9, 1024)),
    "window, one page": (SPEC.replace(window=16), [16384], {}, (1, 1024)),
    "window, one page and a token": (SPEC.replace(window=17), [16384], {}, (2, 1024)),
    "window longer than all": (SPEC.replace(window=10**6), [16384], {}, (1024, 1024)),
    "window, pages of 128": (SPEC.replace(window=128), [16384], {"page_size": 128}, (1, 128)),
    "window, four drafted rows": (SPEC.replace(window=128), [16384], {"rows": 4}, (9, 1024)),
    "chunk": (SPEC.replace(mask=Chunk(64)), [16384 - 60], {"pages_per_seq": 1024}, (1, 1021)),
    "chunk, full": (SPEC.replace(mask=Chunk(64)), [16384], {}, (4, 1024)),
    "prefix or window": (SPEC.replace(mask=Prefix(20) | Window(32)), [16384], {}, (2 + 2, 1024)),
    "outside a window": (SPEC.replace(mask=~Window(128)), [16384], {}, (1016, 1024)),
    "opaque": (SPEC.replace(mask=Where(lambda p, j: j >= 0)), [16384], {}, (1024, 1024)),
    "opaque and window": (SPEC.replace(window=128, mask=Where(lambda p, j: j >= 0)), [16384], {}, (8, 1024)),
    # Numbers of each sequence: as many pages as the static number has, in the rows above.
    "window of each": (SPEC.replace(window=N), [16384] * 3, {"values": {"n": [128, 17, 10**6]}}, (8 + 2 + 1024, 3072)),
    "a window of 0 is 1": (SPEC.replace(window=N), [16384], {"values": {"n": [0]}}, (1, 1024)),
    "chunk of each": (
        SPEC.replace(mask=Chunk(N)), [16384 - 60, 16384], {"values": {"n": [64, 64]}}, (1 + 4, 1021 + 1024),
    ),
    "prefix of each, or window": (
        SPEC.replace(mask=Prefix(N) | Window(32)), [16384] * 3, {"values": {"n": [20, 0, -5]}}, (4 + 2 + 2, 3072),
    ),
    "outside a window of each": (SPEC.replace(mask=~Window(N)), [16384], {"values": {"n": [128]}}, (1016, 1024)),
    "spans of each": (
        SPEC.replace(causal=False, mask=Spans(Value("a", 2), Value("b", 2)) | Window(16)), [64, 64],
        {"values": {"a": [[0, 60], [0, 99]], "b": [[16, 99], [40, 0]]}}, (1 + 1, 8),
    ),
    "segments of each": (
        SPEC.replace(mask=Segments(Value("a", 2))), [64, 64], {"values": {"a": [[48, 16], [999, 70]]}}, (1 + 4, 8),
    ),
    "by head": (SPEC.replace(mask=PerHead((Window(16), Window(128)))), [16384], {}, (8, 1024)),
    "a tree in a window": (
        SPEC.replace(window=128, mask=Tree()), [16384], {"rows": 4, "ancestors": [1, 3, 5, 9]}, (9, 1024),
    ),
    # The table's width costs nothing: short sequences among long ones, empty slots, dead slots.
    "short among long": (SPEC, [16384, 1, 17, 16], {}, (1024 + 1 + 2 + 1, 1028)),
    "empty": (SPEC, [0, 0, 33], {}, (3, 3)),
    "dead": (SPEC, [33, 16384], {"num_seqs": 1}, (3, 3)),
    "all dead": (SPEC, [33, 16384], {"num_seqs": 0}, (0, 0)),
    "nothing": (SPEC.replace(mask=Window(4) & ~Window(9)), [16384], {}, (0, 1024)),
    "causal, a later prefix": (SPEC.replace(mask=~Prefix(10**6)), [16384], {}, (0, 1024)),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_visits_exactly_the_pages_that_hold_a_visible_key(name):
    spec, lengths, facts, expected = COUNTS[name]
    assert _visited(spec, lengths, **facts) == expected


def test_holes_are_not_visited():
    tables = np.array([[-1, 1, 99, 3]])
    assert _visited(SPEC, [64], tables=tables) == (2, 4)


@pytest.mark.parametrize("window", [1, 3, 4, 5, *(pytest.param(n, marks=pytest.mark.kernels) for n in (8, 9)), None])
@pytest.mark.parametrize("mask", [None, Chunk(3), Chunk(8), Chunk(3) | Prefix(2)], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_visible_pages_are_those_of_brute_force(window, mask, rows):
    """Every length up to 20, pages of 4: first those visible in full, then the others, none missing, none in excess.

    Two terms may each see something of a page and together nothing; only such pages may be visited for nothing.
    """
    spec = SPEC.replace(window=window, mask=mask)
    program, table = Program.from_spec(spec), jnp.arange(5) + 7

    @jax.jit
    def visited(length):
        own = QueryRows(length - rows, length, length), table, 4, 100
        return visits_by_scatter(program, *own), page_coverage(program, *own)

    p, j = np.arange(-3, 20)[:, None], np.arange(20)[None, :]
    values = np.asarray(spec.visibility(jnp.asarray(p), jnp.asarray(j)))
    for length in range(21):
        seen = values[length - rows + 3 : length + 3] & (np.arange(20) < length)
        by_page = seen.reshape(rows, 5, 4)
        some, full = by_page.any(axis=(0, 2)), by_page.all(axis=(0, 2))
        visits, cover = visited(length)
        count, num_full = int(visits.count), int(visits.num_full)
        index, page = np.asarray(visits.index), np.asarray(visits.page)
        assert index[:num_full].tolist() == np.flatnonzero(full).tolist()
        rest = index[num_full:count].tolist()
        assert rest == sorted(rest) and set(np.flatnonzero(some & ~full)) <= set(rest)
        if mask is None or (rows == 1 and mask == Chunk(8)):
            assert len(rest) == (some & ~full).sum()
        np.testing.assert_array_equal(page[:count], index[:count] + 7)
        assert not page[count:].any()
        assert set(np.flatnonzero(cover.some)) == set(index[:count])


def test_pages_that_are_not_visited_are_not_read():
    """4096 tokens, a window of 32: 2 real pages, and NaN with ids of nothing everywhere else."""
    spec = SPEC.replace(window=32)
    layout = paged.PageLayout(page_size=16, num_kv_heads=1, head_dim=4, dtype=jnp.float32)
    pool = np.full((4, 2, 1, 16, 4), np.nan, np.float32)
    rng = np.random.default_rng(0)
    pool[[3, 1]] = rng.normal(0, 3, (2, 2, 1, 16, 4))
    tables = rng.choice([-1, 0, 2, 10**6, -(2**31)], (1, 256))
    tables[0, -2:] = [3, 1]
    q = jnp.asarray(rng.normal(0, 3, (1, 2, 4)), jnp.float32)
    attend = paged.lower(spec, layout)
    batch = RaggedBatch.decode([4096], tables)
    got = attend(q, layout.wrap(jnp.asarray(pool)), batch)
    short = attend(q, layout.wrap(jnp.nan_to_num(jnp.asarray(pool))), RaggedBatch.decode([32], [[3, 1]]))
    np.testing.assert_allclose(got, short, rtol=0, atol=2e-6 * np.nanmax(np.abs(pool)))
    assert attend.explain(q, layout.wrap(jnp.asarray(pool)), batch).pages_visited == 2


def test_work_follows_what_is_visible_and_not_the_table():
    """Counted, not timed: a wide table of holes visits what a narrow table visits."""
    wide = np.full((2, 512), -1)
    wide[:, :2] = [[0, 1], [2, 3]]
    assert _visited(SPEC, [20, 30], tables=wide) == _visited(SPEC, [20, 30]) == (4, 4)
