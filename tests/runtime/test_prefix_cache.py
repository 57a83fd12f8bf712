"""`PrefixCache`: a hit gives what a miss would give, whatever is inserted, shared, evicted and written between."""

import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.runtime import GroupedPool, PagePool, PrefixCache
from paged.runtime import _prefix_arrays as prefix_arrays

PAGES, SLOTS, WIDTH, SIZE, NODES = 14, 4, 5, 4, 9
CAPACITY = WIDTH * SIZE

_extend, _release, _settle, _fork = map(jax.jit, (PagePool.extend, PagePool.release, PagePool.settle, PagePool.fork))
_batch = jax.jit(PagePool.ragged_batch)
_attach, _evict, _clear = map(jax.jit, (PrefixCache.attach, PrefixCache.evict, PrefixCache.clear))
_insert = jax.jit(PrefixCache.insert)


class Server:
    """Slots with tokens, a pool and a cache, as a server has them, and what lies in memory.

    Every place of a page holds what a key would: the salt, the weights and all tokens up to its own.
    """

    def __init__(self, pages=PAGES, nodes=NODES):
        self.pool = PagePool.init(pages, SLOTS, WIDTH, SIZE)
        self.cache = PrefixCache.init(self.pool, nodes)
        self.memory = {}
        self.slots = [(0, 0, ())] * SLOTS  # salt, weights, tokens
        self.weights = 0

    def per_slot(self, slot, number, other=0):
        return jnp.full(SLOTS, other, jnp.int32).at[slot].set(number)

    def attach(self, slot, tokens, salt):
        """A slot with the beginning of these tokens. Returns how many were found."""
        padded = jnp.asarray([*tokens, *[7] * (CAPACITY - len(tokens))], jnp.int32)
        self.cache, self.pool, count = _attach(self.cache, self.pool, slot, padded, len(tokens), salt)
        self.slots[slot] = salt, self.weights, tuple(tokens[: int(count)])
        return int(count)

    def write(self, slot, tokens):
        """A step that computes more tokens of a slot, if there are pages for them."""
        salt, weights, known = self.slots[slot]
        self.pool, ok = _extend(self.pool, self.per_slot(slot, len(tokens)))
        if not ok[slot]:
            return False
        batch = _batch(self.pool, self.per_slot(slot, len(tokens)))
        table, source = batch.block_tables[slot].tolist(), int(batch.copy_from[slot])
        if source >= 0 and tokens:
            for offset in range(SIZE):
                self.memory[table[len(known) // SIZE], offset] = self.memory.get((source, offset))
        for token in tokens:
            page, offset = table[len(known) // SIZE], len(known) % SIZE
            assert int(self.pool.ref_counts[page]) == 1, "a page that several hold is written"
            known = (*known, token)
            self.memory[page, offset] = salt, weights, known
        self.slots[slot], self.pool = (salt, weights, known), _settle(self.pool)
        return True

    def insert(self, slot, has_partial):
        salt, weights, known = self.slots[slot]
        if weights == self.weights:
            padded = jnp.asarray([*known, *[7] * (CAPACITY - len(known))], jnp.int32)
            arguments = self.pool, slot, padded, len(known), salt
            self.cache, self.pool = _insert(self.cache, *arguments, has_partial=has_partial)

    def release(self, slot):
        self.pool = _release(self.pool, jnp.arange(SLOTS) == slot)
        self.slots[slot] = 0, 0, ()

    def nodes(self):
        """What each used node stands for: salt, weights and all tokens up to its page's last."""
        cache = jax.tree.map(np.asarray, self.cache)
        found = {}
        for node in np.argsort(cache.depths, kind="stable").tolist():
            if cache.counts[node]:
                parent, own = int(cache.parents[node]), tuple(cache.tokens[node, : cache.counts[node]].tolist())
                before = found[parent] if parent >= 0 else (int(cache.salts[node]), int(cache.epochs[node]), ())
                assert len(before[2]) == cache.depths[node] * SIZE, "a parent's page is full"
                found[node] = (*before[:2], before[2] + own)
        return found

    def require_sound(self):
        """Every slot and every node finds its own tokens; counts, tables, copies and nodes agree."""
        counts = np.zeros(self.pool.num_pages, int)
        tables, pages = np.asarray(self.pool.block_tables), np.asarray(self.cache.pages)[0]
        for slot, (salt, weights, known) in enumerate(self.slots):
            counts[tables[slot][tables[slot] >= 0]] += 1
            assert int(self.pool.lengths[slot]) == len(known)
            for j in range(len(known)):
                assert self.memory[int(tables[slot, j // SIZE]), j % SIZE] == (salt, weights, known[: j + 1])
        for node, (salt, weights, known) in self.nodes().items():
            counts[pages[node]] += 1
            first = (len(known) - 1) // SIZE * SIZE
            for j in range(first, len(known)):
                assert self.memory[int(pages[node]), j % SIZE] == (salt, weights, known[: j + 1])
        copies = np.asarray(self.pool.copy_from)
        np.add.at(counts, copies[copies >= 0], 1)
        np.testing.assert_array_equal(self.pool.ref_counts, counts)

    def longest(self, tokens, salt):
        """How many of these tokens are in the cache: whole pages, then what a page begins with."""
        kept = [known for s, w, known in self.nodes().values() if (s, w) == (salt, self.weights)]
        whole = 0
        while whole + SIZE <= len(tokens) and tuple(tokens[: whole + SIZE]) in kept:
            whole += SIZE
        begun = [
            known[whole:] for known in kept if known[:whole] == tuple(tokens[:whole]) and 0 < len(known) - whole <= SIZE
        ]
        rest = [
            next(
                (i for i, (a, b) in enumerate(zip(p, tokens[whole:], strict=False)) if a != b),
                min(len(p), len(tokens) - whole),
            )
            for p in begun
        ]
        return whole + max(rest, default=0)


def random_program(server, rng, steps):
    """Requests that begin alike come, compute, are kept, end and are forked; pages are given up; weights change."""
    for _ in range(steps):
        slot, kind = int(rng.integers(SLOTS)), rng.random()
        *_, known = server.slots[slot]
        if not known and kind < 0.9:
            tokens = rng.integers(0, 2, rng.integers(1, CAPACITY - 2)).tolist()
            salt, want = int(rng.integers(0, 2)), None
            want = server.longest(tokens[:-1], salt)
            count = server.attach(slot, tokens[:-1], salt)
            assert count == want, "the longest beginning is found, and no longer one"
            if not server.write(slot, tokens[count:]):
                server.cache, server.pool = _evict(server.cache, server.pool, WIDTH)
        elif kind < 0.3:
            server.insert(slot, bool(rng.integers(2)))
        elif kind < 0.6 and len(known) < CAPACITY:
            server.write(slot, [int(rng.integers(0, 2))])
        elif kind < 0.85:
            server.insert(slot, True)
            server.release(slot)
        elif kind < 0.92:
            free = [s for s in range(SLOTS) if not server.slots[s][2]]
            if free:
                server.pool, ok = _fork(server.pool, server.per_slot(free[0], slot, -1))
                assert ok.all()
                server.slots[free[0]] = server.slots[slot]
        elif kind < 0.98:
            before = int(server.pool.num_free)
            server.cache, server.pool = _evict(server.cache, server.pool, before + int(rng.integers(0, 4)))
        elif kind < 0.99:
            server.cache, server.weights = server.cache.with_new_weights(), server.weights + 1
        else:
            server.cache, server.pool = _clear(server.cache, server.pool)
            assert int(server.cache.num_used) == 0
        server.require_sound()


def test_pages_of_one_token_are_kept_once_and_can_be_given_up():
    """Of token 0, too, whose hash may not be that of any number of such pages."""
    server = Server()
    for _ in range(4):
        server.write(0, [0] * SIZE)
        server.insert(0, False)
        server.require_sound()
    assert int(server.cache.num_used) == 4
    server.release(0)
    assert int(_evict(server.cache, server.pool, PAGES)[1].num_free) == PAGES


def test_no_sequence_ever_finds_anothers_tokens():
    server = Server()
    random_program(server, np.random.default_rng(0), 120)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_long_random_programs(seed):
    rng = np.random.default_rng(seed)
    random_program(Server(pages=int(rng.integers(8, 24)), nodes=int(rng.integers(2, 24))), rng, 1500)


@pytest.mark.kernels
def test_equal_hashes_prove_nothing(monkeypatch):
    """With one hash for everything, whatever is found is right."""
    monkeypatch.setattr(prefix_arrays, "_mixed", lambda x: x * 0)
    jax.clear_caches()
    server, rng = Server(), np.random.default_rng(1)
    try:
        for _ in range(40):
            slot = int(rng.integers(SLOTS))
            tokens = rng.integers(0, 2, rng.integers(2, 12)).tolist()
            server.release(slot)
            count = server.attach(slot, tokens[:-1], 0)
            if server.write(slot, tokens[count:]):
                server.insert(slot, False)  # what a hash hides now is kept again, in the same page
                server.insert(slot, True)
            server.require_sound()
        for slot in range(SLOTS):
            server.release(slot)
        assert int(_evict(server.cache, server.pool, PAGES)[1].num_free) == PAGES
    finally:
        jax.clear_caches()


@pytest.mark.kernels
def test_old_pages_go_first_and_children_before_parents():
    server = Server(pages=10, nodes=10)
    for tokens in ([1] * 8, [2] * 8, [3] * 8):
        server.attach(0, tokens, 0)
        server.write(0, tokens)
        server.insert(0, False)
        server.release(0)
    server.attach(1, [1] * 8, 0)  # held again, and used last
    server.release(1)
    kept = lambda: sorted(known for *_, known in server.nodes().values())
    orders = []
    for _ in range(6):
        server.cache, server.pool = _evict(server.cache, server.pool, int(server.pool.num_free) + 1)
        orders.append(kept())
    one, two, three = ((n,) * 4 for n in (1, 2, 3))
    assert orders[0] == [one, one * 2, two, three, three * 2]
    assert orders[1:] == [[one, one * 2, three, three * 2], [one, one * 2, three], [one, one * 2], [one], []]


def test_pages_in_use_and_pinned_nodes_stay():
    server = Server(pages=10, nodes=10)
    for slot, tokens in enumerate(([1] * 8, [2] * 8, [3] * 8)):
        server.write(slot, tokens)
        server.insert(slot, False)
    server.release(1)
    server.release(2)
    hit = jax.jit(PrefixCache.lookup)(server.cache, jnp.asarray([3] * 8), 8)
    server.cache = server.cache.pin(hit.nodes)
    server.cache, server.pool = _evict(server.cache, server.pool, 10)
    assert sorted(known for *_, known in server.nodes().values()) == [(1,) * 4, (1,) * 8, (3,) * 4, (3,) * 8]
    assert int(server.pool.num_free) == 6
    server.cache = server.cache.pin(hit.nodes, -1)
    server.cache, server.pool = _evict(server.cache, server.pool, 8)
    assert sorted(known for *_, known in server.nodes().values()) == [(1,) * 4, (1,) * 8]
    server.require_sound()


def test_salt_and_weights_keep_sequences_apart():
    server = Server()
    server.slots[0] = 5, 0, ()
    server.write(0, [1, 2, 3, 4, 5])
    server.insert(0, True)
    tokens, lookup = jnp.array([1, 2, 3, 4, 5, 6]), jax.jit(PrefixCache.lookup)
    assert [int(lookup(server.cache, tokens, 6, salt).count) for salt in (5, 4, 0)] == [5, 0, 0]
    assert int(lookup(server.cache, tokens, 5, 5).count) == 5  # the very tokens of a page that is not full
    assert (
        int(lookup(server.cache, tokens, 3, 5).count) == 3
    )  # the beginning of a page, to be copied when it is written
    assert int(lookup(server.cache.with_new_weights(), tokens, 6, 5).count) == 0


@pytest.mark.slow
def test_operations_on_4096_pages_take_less_than_a_millisecond():
    """Of CPU time, the best of 20, each traced once: half of the nodes are used, in chains of 64 pages."""
    pool = PagePool.init(num_pages=4096, num_slots=64, pages_per_seq=64, page_size=16)
    cache, rng = PrefixCache.init(pool), np.random.default_rng(0)
    for _ in range(32):
        tokens = jnp.asarray(rng.integers(0, 100, 1024), jnp.int32)
        pool, _ = pool.extend(jnp.zeros(64, jnp.int32).at[0].set(1024))
        cache, pool = _insert(cache, pool, 0, tokens, 1024)
        pool = pool.release(jnp.arange(64) == 0)
    held, _ = pool.extend(jnp.zeros(64, jnp.int32).at[1].set(1024))
    fresh = jnp.asarray(rng.integers(0, 100, 1024), jnp.int32)
    calls = {
        "lookup": (tokens, 1023),
        "attach": (pool, 0, tokens, 1023),
        "insert": (held, 1, fresh, 1024),
        "evict": (pool, 2500),
    }
    for name, arguments in calls.items():
        traced = jax.jit(chex.assert_max_traces(getattr(PrefixCache, name), n=1))
        run = traced.lower(cache, *arguments).compile({"xla_backend_optimization_level": 3})  # tests compile without
        jax.block_until_ready(run(cache, *arguments))
        times = []
        for _ in range(20):
            start = time.process_time()
            jax.block_until_ready(run(cache, *arguments))
            times.append(time.process_time() - start)
        assert min(times) < 1e-3, (name, min(times))


@pytest.mark.kernels
def test_a_hit_needs_of_windowed_layers_what_the_window_still_sees():
    """Pages of 4 tokens and a window of 5: token 16 sees page 3, and token 15 sees token 11 of page 2 too."""
    full = paged.AttentionSpec(num_q_heads=1, num_kv_heads=1, head_dim=1)
    specs = [full, full.replace(window=5)]
    pool = GroupedPool.init(specs, PAGES, SLOTS, WIDTH, SIZE, chunk_size=CAPACITY)
    extend, lookup = jax.jit(GroupedPool.extend), jax.jit(PrefixCache.lookup)
    cache, tokens = PrefixCache.init(pool), jnp.arange(CAPACITY)
    pool, ok = extend(pool, jnp.array([16, 0, 0, 0]))
    assert ok[0]
    cache, pool = _insert(cache, jax.jit(GroupedPool.trim)(pool), 0, tokens, 16)
    freed = [page < 0 for page in pool.pools[1].block_tables[0, :4].tolist()]
    assert freed == [True, True, True, False]
    assert [int(lookup(cache, tokens, length).count) for length in (20, 16, 15, 12)] == [16, 16, 0, 0]
    cache, pool, count = _attach(cache, pool, 1, tokens, 16)
    tables = [own.block_tables[1, :4].tolist() for own in pool.pools]
    assert int(count) == 16 and min(tables[0]) >= 0 and tables[1][:3] == [-1] * 3 and tables[1][3] >= 0
    # What another sequence computes anew fills the gaps, and shorter beginnings are found then.
    pool, ok = extend(pool, jnp.array([0, 0, 12, 0]))
    assert ok[2]
    cache, pool = _insert(cache, pool, 2, tokens, 12)
    assert [int(lookup(cache, tokens, length).count) for length in (20, 12, 11, 4)] == [16, 12, 11, 4]
    pool = pool.release(jnp.ones(SLOTS, bool))
    cache, pool = _evict(cache, pool, jnp.array([0, pool.pools[1].num_pages]))
    assert pool.num_free.tolist() == [PAGES - 4, pool.pools[1].num_pages] and int(lookup(cache, tokens, 20).count) == 0
    cache, pool = _clear(cache, pool)
    assert pool.num_free.tolist() == list(pool.num_pages)
