"""`PagePool` against the same book-keeping in plain Python, over random operations, and at its edges."""

import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import paged
from paged.runtime import GroupedPool, PagePool
from paged.spec import Given
from paged.testing import PoolMachine, check_pool

PAGES, SLOTS, WIDTH, SIZE = 7, 3, 4, 2
CAPACITY = WIDTH * SIZE

# Around every edge: nothing, one, an exact page, a full table, one too many, far too many, negative, near overflow.
TOKENS = st.sampled_from([0, 0, 1, 2, 3, 4, 5, CAPACITY - 1, CAPACITY, CAPACITY + 1, 2**31 - 1, -1])
PER_SLOT = st.lists(TOKENS, min_size=SLOTS, max_size=SLOTS)
OPERATIONS = st.one_of(
    st.tuples(st.just("reserve"), PER_SLOT),
    st.tuples(st.just("extend"), PER_SLOT),
    st.tuples(st.just("release"), st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS)),
)


class PoolRef:
    """The book-keeping of `PagePool` with lists and a loop."""

    def __init__(self):
        self.tables = [[] for _ in range(SLOTS)]
        self.lengths = [0] * SLOTS

    def free(self):
        held = {page for table in self.tables for page in table}
        return [page for page in range(PAGES) if page not in held]

    def reserve(self, tokens):
        ok = []
        for table, count in zip(self.tables, tokens, strict=True):
            more = max(0, -(-count // SIZE) - len(table))
            ok.append(0 <= count <= CAPACITY and more <= len(self.free()))
            if ok[-1]:
                table += self.free()[:more]
        return ok

    def extend(self, tokens):
        is_count = [count >= 0 for count in tokens]
        ok = self.reserve([n + m if c else -1 for n, m, c in zip(self.lengths, tokens, is_count, strict=True)])
        self.lengths = [n + m if o else n for n, m, o in zip(self.lengths, tokens, ok, strict=True)]
        return ok

    def release(self, is_released):
        for slot in np.flatnonzero(is_released):
            self.tables[slot], self.lengths[slot] = [], 0


@jax.jit
@chex.assert_max_traces(n=1)
def reserve(pool, tokens):
    return pool.reserve(tokens)


@jax.jit
@chex.assert_max_traces(n=1)
def extend(pool, tokens):
    return pool.extend(tokens)


@jax.jit
@chex.assert_max_traces(n=1)
def release(pool, is_released):
    return pool.release(is_released), None


RUN = {"reserve": reserve, "extend": extend, "release": release}


def assert_invariants(pool: PagePool):
    tables, counts = np.asarray(pool.block_tables), np.asarray(pool.ref_counts)
    held = tables[tables >= 0]
    assert len(set(held.tolist())) == len(held), "a page is in two tables"
    assert (np.bincount(held, minlength=PAGES) == counts).all(), "counts and tables disagree"
    assert int(pool.num_free) + int(pool.pages_in_use) == PAGES
    for table, length in zip(tables, pool.lengths.tolist(), strict=True):
        live = -(-length // SIZE)
        assert ((table[:live] >= 0) & (table[:live] < PAGES)).all(), "a live token without a page"
        assert (np.diff((table >= 0).astype(int)) <= 0).all(), "a hole in a table"


@given(st.lists(OPERATIONS, min_size=1, max_size=12))
def test_any_program_equals_the_model(program):
    pool, model = PagePool.init(PAGES, SLOTS, WIDTH, SIZE), PoolRef()
    for name, argument in program:
        before = pool
        dtype = bool if name == "release" else jnp.int32
        pool, ok = RUN[name](pool, jnp.asarray(argument, dtype))
        expected = getattr(model, name)(argument)
        if ok is not None:
            assert ok.tolist() == expected
            for slot in np.flatnonzero(~np.asarray(ok)):
                chex.assert_trees_all_equal(
                    (pool.block_tables[slot], pool.lengths[slot]), (before.block_tables[slot], before.lengths[slot])
                )
        assert pool.lengths.tolist() == model.lengths
        assert [[page for page in table if page >= 0] for table in pool.block_tables.tolist()] == model.tables
        assert_invariants(pool)


def test_running_out_of_pages_is_a_result_that_touches_no_slot():
    pool = PagePool.init(num_pages=3, num_slots=3, pages_per_seq=3, page_size=4)
    pool, ok = pool.extend(jnp.array([8, 5, 4]))
    assert ok.tolist() == [True, False, True] and int(pool.num_free) == 0
    unchanged, ok = pool.extend(jnp.array([1, 1, 1]))
    assert ok.tolist() == [False, False, False]
    chex.assert_trees_all_equal(unchanged, pool)
    pool, ok = pool.release(jnp.array([True, False, False])).extend(jnp.array([0, 8, 0]))
    assert ok.tolist() == [True, True, True]
    assert pool.block_tables.tolist() == [[-1, -1, -1], [0, 1, -1], [2, -1, -1]]


def test_releasing_twice_frees_once():
    pool, _ = PagePool.init(4, 2, 2, 2).extend(jnp.array([3, 1]))
    only_first = jnp.array([True, False])
    once = pool.release(only_first)
    chex.assert_trees_all_equal(once.release(only_first), once)
    assert once.ref_counts.min() == 0 and int(once.num_free) == 3


def test_a_page_that_a_table_points_at_is_not_freed_and_a_shared_one_counts_once():
    pool, _ = PagePool.init(4, 2, 2, 2).extend(jnp.array([4, 0]))
    shared = pool.attach(jnp.array([False, True]), pool.block_tables[::-1].at[1, 1].set(-1), jnp.array([0, 2]))
    assert int(shared.pages_in_use) == 2
    assert shared.release(jnp.array([True, False])).ref_counts.tolist() == [1, 0, 0, 0]
    assert shared.release(jnp.array([True, True])).ref_counts.tolist() == [0, 0, 0, 0]


def test_eight_samples_of_one_prompt_copy_a_page_each_at_most():
    """1000 tokens in pages of 16: 62 pages are never copied, and the 63rd once for each sample, in its first step."""
    pool = PagePool.init(num_pages=128, num_slots=8, pages_per_seq=80, page_size=16)
    pool, _ = pool.extend(jnp.array([1000] + [0] * 7))
    pool, ok = pool.fork(jnp.array([-1] + [0] * 7))
    assert ok.all() and int(pool.pages_in_use) == 63
    copies = 0
    for _ in range(20):
        pool, ok = pool.extend(jnp.ones(8, jnp.int32))
        assert ok.all()
        copies += int((pool.decode_batch().copy_from >= 0).sum())
        pool = pool.settle()
    assert copies <= 8 and int(pool.pages_in_use) == 62 + 8 * 2
    assert pool.lengths.tolist() == [1020] * 8


def test_a_copy_is_for_the_step_that_begins_where_it_waits():
    """Extended twice before its step, prefilled or decoded: the copy is in that step, and in none after it."""
    pool, _ = PagePool.init(8, 2, 4, 4).extend(jnp.array([6, 0]))
    pool, _ = pool.fork(jnp.array([-1, 0]))
    assert pool.decode_batch().copy_from.tolist() == [-1, -1]
    once, _ = pool.extend(jnp.array([0, 1]))
    twice, _ = once.extend(jnp.array([0, 3]))
    assert once.decode_batch().copy_from.tolist() == [-1, 1]
    assert once.decode_batch(jnp.array([True, False])).copy_from.tolist() == [-1, -1]
    for rows, want in ((4, 1), (3, -1)):
        assert twice.ragged_batch(jnp.array([0, rows])).copy_from.tolist() == [-1, want]
        assert twice.prefill_batch(1, rows).copy_from.tolist() == [want]
    # Nothing is let go before a token is counted that a step may have written.
    reserved, _ = pool.reserve(jnp.array([0, 7]))
    assert reserved.settle().copy_from.tolist() == [-1, 1] and twice.settle().copy_from.tolist() == [-1, -1]
    assert (int(twice.pages_in_use), int(twice.release(jnp.array([True, False])).pages_in_use)) == (4, 4)
    assert int(twice.settle().release(jnp.array([True, False])).pages_in_use) == 3


def test_a_slot_that_is_not_empty_gets_nothing():
    pool, _ = PagePool.init(8, 3, 4, 4).extend(jnp.array([6, 1, 0]))
    same, ok = pool.fork(jnp.array([-1, 0, 3]))
    assert ok.tolist() == [True, False, False]
    chex.assert_trees_all_equal(same, pool)
    shared, ok = pool.share(jnp.array([-1, -1, 0]), jnp.array([99, -1, 7]))
    assert ok.tolist() == [True, True, False]
    chex.assert_trees_all_equal(shared, pool)


def test_no_slot_gets_what_another_gets_in_the_same_call():
    machine = PoolMachine()
    machine.extend([0, 0, 1])
    machine.share([2, 0, -1], [1, 1, 0])
    machine.agrees()
    assert machine.pool.lengths.tolist() == [1, 0, 1]


@pytest.mark.slow
def test_a_hundred_thousand_operations():
    check_pool(examples=2500, steps=50)


@pytest.mark.slow
def test_operations_on_4096_pages_and_64_slots_take_less_than_a_millisecond():
    """Of CPU time, the best of 20, each traced once; slots hold up to 2048 tokens, and half of them are forks."""
    slots, rng = np.arange(64), np.random.default_rng(0)
    source = jnp.asarray(np.where(slots < 32, -1, slots - 32), jnp.int32)
    pool = PagePool.init(num_pages=4096, num_slots=64, pages_per_seq=128, page_size=16)
    pool, _ = pool.extend(jnp.asarray(np.where(slots < 32, rng.integers(1, 1000, 64), 0), jnp.int32))
    forked, ok = pool.fork(source)
    assert ok.all()
    one, flags = jnp.ones(64, jnp.int32), jnp.asarray(slots % 2 == 0)
    groups = GroupedPool([forked] * 2, [[paged.Everything()], [MASKS["window"]]])
    calls = {
        "extend": (forked.extend(one)[0], one),
        "fork": (pool, source),
        "share": (pool, source, one),
        "reorder": (forked, jnp.asarray(rng.integers(0, 64, 64), jnp.int32)),
        "release": (forked, flags),
        "settle": (forked.extend(one)[0],),
        "ragged_batch": (forked, one),
        "trim": (forked,),
        "trim groups": (groups,),
        "extend groups": (groups, one),
    }
    more_calls = {
        "trim": lambda pool: pool.trim(paged.Causal() & (paged.Prefix(4) | paged.Window(128))),
        "trim groups": GroupedPool.trim,
        "extend groups": GroupedPool.extend,
    }
    for name, (first, *more) in calls.items():
        run = jax.jit(chex.assert_max_traces(more_calls.get(name) or getattr(PagePool, name), n=1))
        jax.block_until_ready(run(first, *more))
        times = []
        for _ in range(20):
            start = time.process_time()
            jax.block_until_ready(run(first, *more))
            times.append(time.process_time() - start)
        pools = first.num_groups if isinstance(first, GroupedPool) else 1
        assert min(times) < 1e-3 * pools, (name, min(times))


def test_batches_pass_the_check():
    pool, _ = PagePool.init(8, 4, 3, 2).extend(jnp.array([3, 0, 6, 1]))
    layout = paged.PageLayout(page_size=2, num_kv_heads=1, head_dim=1)
    spec = paged.AttentionSpec(num_q_heads=1, num_kv_heads=1, head_dim=1, causal=False)
    pages = layout.init(8)
    ragged = pool.ragged_batch(jnp.array([2, 0, 5, 1]))
    assert paged.check(spec, pages, ragged, 10).query_starts.tolist() == [0, 2, 2, 7, 8]
    decode = paged.check(spec, pages, pool.decode_batch(), 4)
    assert decode.query_rows == 1 and decode.lengths.tolist() == [3, 0, 6, 1]
    prefill = paged.check(spec, pages, pool.prefill_batch(slot=2, query_rows=4), 8)
    assert prefill.lengths.tolist() == [6] and prefill.block_tables[0].tolist() == pool.block_tables[2].tolist()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda pool: PagePool.init(0, 1, 1, 1), ValueError, "num_pages must be at least 1; got 0."),
        (lambda pool: PagePool.init(1, 1.0, 1, 1), TypeError, "num_slots must be a Python int; got 1.0."),
        (lambda pool: PagePool.init(1, 1, 2**20, 2**12), ValueError, "must fit in int32"),
        (
            lambda pool: pool.reserve(jnp.zeros(3, jnp.int32)),
            ValueError,
            r"tokens must be \[seqs\] = \[2\].*got \(3,\)",
        ),
        (lambda pool: pool.extend(jnp.zeros(2)), TypeError, "tokens must be int32; got float32."),
        (lambda pool: pool.release(jnp.zeros(2, jnp.int32)), TypeError, "is_released must be bool; got int32."),
        (lambda pool: pool.release([0, 1]), TypeError, "is_released must be bool; got int64."),
        (lambda pool: pool.extend([1.5, 1]), TypeError, "tokens must be int32; got float64."),
        (lambda pool: pool.extend("12"), ValueError, r"tokens must be \[seqs\] = \[2\].*got \(\)"),
        (lambda pool: pool.decode_batch([1, 0]), TypeError, "is_decoding must be bool; got int64."),
        (lambda pool: pool.ragged_batch([2, -1]), ValueError, r"query_rows must not be negative; got \[2, -1\]"),
        (lambda pool: pool.prefill_batch(2, 1), ValueError, "slot must be at most 1; got 2"),
        (lambda pool: pool.prefill_batch(-1, 1), ValueError, "slot must be at least 0; got -1"),
        (lambda pool: pool.prefill_batch(True, 1), TypeError, "slot must be an int; got the bool True"),
        (lambda pool: pool.prefill_batch(0.0, 1), TypeError, "slot must be an int; got 0.0"),
        (lambda pool: pool.prefill_batch(jnp.zeros(1, int), 1), TypeError, r"slot must be an int.*shape \(1,\)"),
        (lambda pool: pool.prefill_batch(0, 1.5), TypeError, "query_rows must be an int; got 1.5"),
        (lambda pool: pool.prefill_batch(0, jnp.float32(1)), TypeError, "query_rows must be an int.*float32"),
        (lambda pool: pool.prefill_batch(0, 5), ValueError, "query_rows must be at most 4; got 5"),
        (lambda pool: pool.decode_batch(query_rows=1.5), TypeError, "query_rows must be an int; got 1.5"),
        (lambda pool: pool.trim(None), TypeError, "mask must be a Mask.*spec.visibility; got None"),
    ],
)
def test_error_texts(call, error, text):
    with pytest.raises(error, match=text):
        call(PagePool.init(4, 2, 2, 2))


def test_counts_of_every_width_mean_what_they_say():
    """An int64 or uint32 that int32 cannot hold is more than any slot has room for, and never wraps."""
    pool = PagePool.init(4, 2, 2, 2)
    many = [np.array([3, 2**32 + 1]), np.array([3, 2**32 - 1], np.uint32), jnp.array([3, 2**32 - 1], jnp.uint32)]
    many += [[3, 2**40], np.array([3, -(2**40)]), np.array([3, 2**63], np.uint64)]
    with jax.enable_x64(True):
        many += [jnp.array([3, 2**32 + 1])]
        for tokens in many:
            after, ok = pool.extend(tokens)
            assert ok.tolist() == [True, False] and after.lengths.tolist() == [3, 0], tokens
    for tokens in (np.array([3, 1], np.int8), jnp.array([3, 1], jnp.uint8), [3, 1]):
        assert pool.extend(tokens)[0].lengths.tolist() == [3, 1]
    assert pool.extend([3, 1])[0].release([True, False]).lengths.tolist() == [0, 1]
    assert pool.prefill_batch(np.int64(1), np.array(0)).lengths.tolist() == [0]


MASKS = {
    "window": paged.Causal() & paged.Window(5),
    "sink and window": paged.Causal() & (paged.Prefix(3) | paged.Window(4)),
    "chunk": paged.Causal() & paged.Chunk(6),
    "by head": paged.PerHead((paged.Window(3), paged.Window(7))).bind(2),
    "spans": paged.Causal() & paged.Window(2) | paged.Spans((1, 4), (5, 6)),
    "of a user": paged.Causal() & paged.Window(6) & paged.Where(lambda p, j: (p + j) % 2 == 0),
    "where": paged.Causal() & paged.Where(lambda p, j: p - j < 3),
    "full": paged.Causal(),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("sink and window", "of a user", "where") else pytest.param(name, marks=pytest.mark.kernels)
        for name in MASKS
    ],
)
def test_trim_frees_what_no_query_to_come_sees_and_nothing_else(name):
    """By the mask's value for every pair of positions, for every length; `Where` says nothing, so it keeps all."""
    mask, size, width = MASKS[name], 2, 12
    asked = paged.Causal() & paged.Window(6) if name == "of a user" else mask
    lengths = np.arange(width * size + 1)
    pool, ok = PagePool.init(400, len(lengths), width, size).extend(lengths)
    trimmed = jax.jit(lambda pool: pool.trim(mask))(pool)
    p, j = np.arange(64)[:, None, None], np.arange(width * size)[None, :, None]
    seen = np.asarray(asked.given(Given(head=np.arange(2)[None, None]))(p, j)).any(axis=-1)
    seen = np.stack([seen[n:].any(axis=0).reshape(width, size).any(axis=-1) for n in lengths])
    is_full = np.arange(width) < lengths[:, None] // size
    is_kept = (np.asarray(pool.block_tables) >= 0) & (~is_full | seen if name != "where" else True)
    assert bool(ok.all()) and (name in ("where", "full")) == bool(is_kept[-1].all())
    np.testing.assert_array_equal(trimmed.block_tables, np.where(is_kept, pool.block_tables, -1))
    assert int(trimmed.pages_in_use) == is_kept.sum() and (trimmed.lengths == pool.lengths).all()


def test_trim_asks_each_slot_for_its_own_numbers():
    mask = paged.Causal() & (paged.Window(paged.Value("window")) | paged.Spans(*map(_pair, ("starts", "ends"))))
    pool, _ = PagePool.init(32, 3, 8, 2).extend([12, 12, 12])
    numbers = {"starts": jnp.array([[0, 0], [0, 3], [0, 11]]), "ends": jnp.array([[0, 0], [20, 4], [0, 16]])}
    trimmed = jax.jit(lambda pool, values: pool.trim(mask, values))(pool, {"window": jnp.array([1, 1, 5]), **numbers})
    assert [[i for i, page in enumerate(table) if page >= 0] for table in trimmed.block_tables.tolist()] == [
        [],
        [0, 1, 2, 3, 4, 5],
        [4, 5],
    ]
    with pytest.raises(ValueError, match="values must have 'window', which the mask"):
        pool.trim(mask, numbers)
    with pytest.raises(ValueError, match=r"values\['starts'\] must be int32\[3, 2\]; got shape \(3,\)"):
        pool.trim(mask, {**numbers, "window": jnp.ones(3, int), "starts": jnp.ones(3, int)})


def _pair(name):
    return paged.Value(name, size=2)


def test_a_trimmed_slot_goes_on_where_it_was():
    mask, pool = paged.Causal() & paged.Window(2), PagePool.init(4, 1, 8, 2)
    step = jax.jit(lambda pool: pool.trim(mask).extend([1]))
    for length in range(1, 17):
        pool, ok = step(pool)
        assert ok.tolist() == [True] and pool.lengths.tolist() == [length]
        entries = np.flatnonzero(np.asarray(pool.block_tables[0]) >= 0)
        assert entries[-1] == (length - 1) // 2 and len(entries) <= 2, "no page of the past is taken again"
        assert int(pool.pages_in_use) == len(entries)
    assert not pool.extend([1])[1].any()
    assert int(pool.release([True]).num_free) == 4
