"""Groups of layers: each holds the pages that its masks keep, and no token depends on it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.runtime import GroupedPool, LayerStack, PagedAttention, PagePool, generate, most_pages, page_groups, pools_of
from paged.spec import Chunk, Everything, Prefix, Value, Where, Window

from .tiny import EMBED, GLOBAL, LAYOUT, LOCAL, PAGE_SIZE, VOCAB, greedy_ref, random_layer

SPEC = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, scale=1.5)
SINK = SPEC.replace(mask=Prefix(2) | Window(6))
CHUNK = SPEC.replace(mask=Chunk(8))
EVEN = SPEC.replace(mask=Where(lambda p, j: (p - j) % 2 == 0))


def test_masks_that_keep_the_same_pages_are_one_group():
    specs = [
        LOCAL,
        GLOBAL,
        SINK,
        EVEN,
        CHUNK,
        LOCAL.replace(causal=False),
        SPEC.replace(window=6),
        LOCAL.replace(scale=2.0),
    ]
    specs += [SPEC.replace(window=Value("window")), SPEC.replace(window=Value("other"))]
    full, *others = page_groups(specs)
    assert full == (GLOBAL.visibility, EVEN.visibility, Everything()), "`Where` says nothing of what it hides"
    assert [len(masks) for masks in others] == [2, 1, 1, 1, 1, 1]
    assert others[0] == (LOCAL.visibility, LOCAL.replace(causal=False).visibility)
    assert page_groups([LOCAL]) == ((LOCAL.visibility,),) and page_groups([]) == ()
    assert page_groups([SPEC.replace(window=2**20)]) == ((SPEC.replace(window=2**20).visibility,),)


@pytest.mark.parametrize("spec", [LOCAL, SINK, CHUNK, EVEN], ids=["window", "sink", "chunk", "where"])
def test_no_sequence_holds_more_pages_than_most_pages(spec):
    """At any length, in steps of at most so many tokens; and in steps of one token some length needs so many."""
    tokens, limits = 60, np.repeat([1, 3, 4, 20], 3)
    steps = np.random.default_rng(0).integers(1, limits + 1, (tokens, len(limits)))

    @jax.jit
    def serve(pool):
        def step(pool, rows):
            pool, ok = pool.trim(spec.visibility).extend(jnp.minimum(rows, tokens - pool.lengths))
            return pool, (ok, jnp.sum(pool.block_tables >= 0, axis=1))

        return jax.lax.scan(step, pool, jnp.asarray(steps, jnp.int32))

    pool, (ok, held) = serve(PagePool.init(180, len(limits), tokens // PAGE_SIZE, PAGE_SIZE))
    assert bool(ok.all()) and pool.lengths.tolist() == [tokens] * len(limits)
    most = np.array([most_pages(spec.visibility, tokens, PAGE_SIZE, int(limit)) for limit in limits])
    held = np.max(np.asarray(held), axis=0)
    assert (held <= most).all() and (most <= tokens // PAGE_SIZE).all() and (held[:3] == most[:3]).all()


@pytest.mark.parametrize(
    ("local", "full", "layers", "share"),
    [
        (paged.presets.gemma3_4b_local(), paged.presets.gemma3_4b_global(), (5, 1), 1 / 5),
        (paged.presets.gpt_oss_20b_local(), paged.presets.gpt_oss_20b_global(), (1, 1), 0.51),
    ],
    ids=["gemma3", "gpt-oss"],
)
def test_what_the_layouts_of_published_models_hold(local, full, layers, share):
    """Counted: one sequence of 32768 tokens, served in chunks of 64; the most pages at once, of all that there are."""
    page_size, chunk = 16, 64
    width, steps = 32768 // page_size, 32768 // chunk
    pool = GroupedPool.init([local, full], width, 1, width, page_size, chunk_size=chunk)

    @jax.jit
    def serve(pool):
        def step(pool, _):
            pool, ok = pool.trim().extend(jnp.array([chunk]))
            return pool, (ok, pool.pages_in_use)

        return jax.lax.scan(step, pool, None, length=steps)

    pool, (ok, in_use) = serve(pool)
    of_full, of_local = np.max(np.asarray(in_use), axis=0)
    assert bool(ok.all()) and pool.lengths.tolist() == [32768]
    assert of_full == width and 0 <= pool.num_pages[1] - of_local <= 1, "chunks that begin with a page need one less"
    held, all_of_them = of_local * layers[0] + of_full * layers[1], width * sum(layers)
    assert held <= share * all_of_them, (held, all_of_them)


def test_a_slot_gets_its_pages_in_every_group_or_in_none():
    groups = page_groups([GLOBAL, SPEC.replace(window=2)])
    pool = GroupedPool([PagePool.init(6, 3, 4, 2), PagePool.init(3, 3, 4, 2)], groups)

    @jax.jit
    def run(pool):
        pools = [pool.extend([4, 4, 2])]
        pools.append((pools[-1][0].trim(), pools[-1][1]))  # position 4 sees tokens 3 and 4, position 2 tokens 1 and 2
        pools.append(pools[-1][0].reserve([5, 0, 3]))
        pools.append((pools[-1][0].release([True, False, True]), pools[-1][1]))
        return [(pool, pool.num_free, pool.pages_trimmed, ok) for pool, ok in pools]

    extended, trimmed, reserved, released = run(pool)
    assert extended[3].tolist() == [True, False, True] and extended[1].tolist() == [3, 0]
    assert [own.lengths.tolist() for own in extended[0].pools] == [[4, 0, 2]] * 2
    assert trimmed[1].tolist() == [3, 1] and trimmed[2].tolist() == [0, 1]
    assert reserved[3].tolist() == [True, True, False] and reserved[1].tolist() == [2, 0]
    assert reserved[0].pools[1].block_tables.tolist() == [[-1, 1, 0, -1], [-1] * 4, [2, -1, -1, -1]]
    assert released[1].tolist() == [6, 3] and released[0].lengths.tolist() == [0, 0, 0]


class Layered(eqx.Module):
    """A language model of a stack of layers with several masks, in which any layer may have pages of its own number."""

    embedding: jax.Array
    layers: LayerStack

    def __init__(self, specs, num_pages, layout, key):
        keys = jax.random.split(key, len(specs))
        make = [lambda key, s=s, n=n: Residual(s, n, layout, key) for s, n in zip(specs, num_pages, strict=True)]
        self.layers = LayerStack.make(make, keys)
        self.embedding = jax.random.normal(key, (VOCAB, EMBED))

    def __call__(self, tokens, batch, state):
        x, state = self.layers(self.embedding[tokens], batch, state)
        return x @ self.embedding.T, state

    def dense(self, tokens):
        return (self.layers.dense(self.embedding[tokens][None]) @ self.embedding.T)[0]


class Residual(eqx.Module):
    attention: PagedAttention

    def __init__(self, spec, num_pages, layout, key):
        if layout == LAYOUT:
            self.attention = random_layer(spec, num_pages, key, check=False)
        else:
            self.attention = PagedAttention(spec, layout, num_pages, EMBED, check=False, key=key)

    def __call__(self, x, batch, state):
        y, state = self.attention(x, batch, state)
        return x + 3 * y, state

    def dense(self, x):
        return x + 3 * self.attention.dense(x)


def poisoned(model, state, pool):
    """NaN in every page of every layer that no slot holds."""

    def poison(run, own):
        stacked = state.get(run.attention.cache.index)
        pages = stacked.value
        is_free = jnp.tile(own.ref_counts == 0, stacked.num_layers)
        axis = pages.layout.page_axis
        shape = [-1 if i == axis else 1 for i in range(pages.arrays[0].ndim)]
        arrays = tuple(jnp.where(is_free.reshape(shape), jnp.nan, x) for x in pages.arrays)
        return eqx.tree_at(lambda s: s.value.arrays, stacked, arrays)

    for run in model.layers.runs:
        mask = run.attention.spec.visibility
        own = next(own for own, masks in zip(pool.pools, pool.masks, strict=True) if mask in masks)
        state = state.set(run.attention.cache.index, poison(run, own))
    return state


@pytest.mark.parametrize(
    "order",
    [
        pytest.param("packed", marks=pytest.mark.kernels),
        pytest.param("split", marks=pytest.mark.slow),
        pytest.param("interleaved", marks=pytest.mark.slow),
    ],
)
def test_freed_pages_may_hold_nan(order):
    """A random program of chunks, decode steps and releases over three slots, by groups of the least size.

    After every operation every free page of every layer is NaN. The logits are those of whole sequences.
    """
    layout = LAYOUT.replace(order=order)
    specs, tokens, chunk = [SPEC.replace(window=5), SPEC.replace(window=5), SINK, SPEC], 24, 4
    groups = page_groups(specs)
    sizes = [3 * min(6, most_pages(masks[0], tokens, PAGE_SIZE, chunk)) for masks in groups]
    assert sizes == [18, 9, 15]
    pages = [next(n for n, masks in zip(sizes, groups, strict=True) if spec.visibility in masks) for spec in specs]
    model, state = eqx.nn.make_with_state(Layered)(specs, pages, layout, jax.random.key(2))
    pool = GroupedPool([PagePool.init(n, 3, 6, PAGE_SIZE) for n in sizes], groups)
    assert [held.num_pages for held in pools_of(state)] == [9, 15, 18]
    known = np.random.default_rng(1).integers(0, VOCAB, (3, tokens))
    dense = np.stack([eqx.filter_jit(model.dense)(jnp.asarray(row)) for row in known])

    @eqx.filter_jit
    def step(rows, starts, pool, state):
        pool, ok = pool.trim().extend(rows)
        state = poisoned(model, state, pool)
        batch = pool.ragged_batch(rows)
        slot = jnp.clip(jnp.searchsorted(batch.query_starts, jnp.arange(3 * chunk), side="right") - 1, 0, 2)
        place = starts[slot] + jnp.arange(3 * chunk) - batch.query_starts[slot]
        logits, state = model(jnp.asarray(known)[slot, jnp.clip(place, 0, tokens - 1)], batch, state)
        return ok, logits, pool, state

    lengths, rng, finished = np.zeros(3, int), np.random.default_rng(3), 0
    while finished < 4:
        rows = np.minimum(rng.choice([0, 1, 1, chunk], 3), tokens - lengths)
        ok, logits, pool, state = step(jnp.asarray(rows, jnp.int32), jnp.asarray(lengths, jnp.int32), pool, state)
        assert bool(ok.all()), "the least size suffices"
        want = np.concatenate([dense[s, lengths[s] : lengths[s] + rows[s]] for s in range(3)])
        np.testing.assert_allclose(logits[: len(want)], want, atol=2e-3)
        lengths += rows
        is_done = (lengths == tokens) | (rng.random(3) < 0.03)
        finished += is_done.sum()
        pool, lengths = pool.release(is_done), np.where(is_done, 0, lengths)


PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [7], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9]]


@pytest.mark.kernels
def test_generate_gives_windowed_layers_the_pages_that_they_need():
    """The same tokens with few pages in the windowed layers; steps tell what groups hold, and masks have freed."""
    small = eqx.nn.make_with_state(Layered)([LOCAL, GLOBAL], [7, 16], LAYOUT, jax.random.key(4))
    reports = []
    sizes = {"max_new_tokens": [20, 30, 12], "num_slots": 2, "chunk_size": 4}
    results = generate(*small, PROMPTS, **sizes, on_step=reports.append)
    assert [r.tokens for r in results] == [
        greedy_ref(small[0], p, n) for p, n in zip(PROMPTS, [20, 30, 12], strict=True)
    ]
    full, local = zip(*(report.groups for report in reports), strict=True)
    assert {(group.num_pages, group.bytes_per_page) for group in full + local} == {(16, 512), (7, 512)}
    assert full[0].masks == ("j <= p",) and local[0].masks == ("(j <= p) & (p - j < 5)",)
    assert max(group.pages_in_use for group in local) <= 6 and {group.pages_trimmed for group in full} == {0}
    assert [r.pages_in_use for r in reports] == [max(g.pages_in_use for g in r.groups) for r in reports]
    assert max(group.pages_trimmed for group in local) >= 9 and max(g.bytes_saved for g in local) >= 9 * 512
    ends = sum((len(p) + n - 1 - 5) // PAGE_SIZE for p, n in zip(PROMPTS, [20, 30, 12], strict=True))
    assert sum(report.pages_freed for report in reports) >= ends


@pytest.mark.kernels
def test_windows_alone_serve_prompts_longer_than_the_pool_and_preempt():
    spec = LOCAL.replace(window=Value("window"))
    model, state = eqx.nn.make_with_state(Layered)([spec], [5], LAYOUT, jax.random.key(5))
    wide, wide_state = eqx.nn.make_with_state(Layered)([spec], [64], LAYOUT, jax.random.key(5))
    prompts, values = [[*range(30)], [5, 6], [*range(20)]], {"window": [6, 2, 9]}
    sizes = {"max_new_tokens": 20, "num_slots": 3, "chunk_size": 4, "values": values}
    results = generate(model, state, prompts, **sizes)
    assert [r.tokens for r in results] == [r.tokens for r in generate(wide, wide_state, prompts, **sizes)]
    assert sum(r.preemptions for r in results) >= 1
    text = r"prompts\[0\] can never be .* need 7 pages of 4 tokens at once in layers with the mask .* can have 5 "
    with pytest.raises(ValueError, match=text):
        generate(model, state, prompts[:1], max_new_tokens=20, num_slots=1, chunk_size=17, values={"window": [6]})


def test_a_prefix_is_shared_where_its_needed_pages_are_held():
    """A slot of 9 tokens has freed all that position 9 does not see: of a prefix more may be needed."""
    groups = page_groups([SPEC.replace(window=4), SPEC])

    @jax.jit
    def run(tokens):
        pool = GroupedPool([PagePool.init(12, 3, 6, 2), PagePool.init(12, 3, 6, 2)], groups)
        pool = pool.extend([9, 0, 0])[0].trim()
        shared, ok = pool.share([-1, 0, 0], tokens)
        alone = pool.pools[1].share([-1, 0, 0], tokens)[1]
        forked, _ = pool.fork([-1, 0, -1])
        extended, _ = forked.extend([0, 1, 0])
        return shared, ok, alone, forked, [batch.copy_from for batch in extended.decode_batch().batches]

    shared, ok, alone, forked, copies = run(jnp.array([0, 8, 9]))
    assert ok.tolist() == [True, False, True] and alone.tolist() == [True, False, True], "position 8 sees token 5"
    assert [own.block_tables[2].tolist() for own in shared.pools] == [[0, 1, 2, 3, 4, -1], [-1, -1, -1, 3, 4, -1]]
    assert run(jnp.array([0, 9, 4]))[1].tolist() == [True, True, False]
    assert forked.pages_in_use.tolist() == [5, 2] and [c.tolist() for c in copies] == [[-1, 4, -1], [-1, 4, -1]]


@pytest.mark.kernels
@pytest.mark.parametrize("rows", [1, pytest.param(5, marks=pytest.mark.slow)], ids=["decode", "chunks"])
@pytest.mark.parametrize("mask", [Window(11), Prefix(3) | Window(9)], ids=["one run of pages", "listed pages"])
def test_kernels_never_read_what_was_freed(mask, rows):
    """NaN in every page that no slot holds: kernels give what XLA gives from the pages that nobody trimmed."""
    spec = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=16, mask=mask)
    layout = paged.PageLayout(page_size=8, num_kv_heads=2, head_dim=16, dtype=jnp.float32)
    lengths, steps = np.array([29, 16, 3]), np.minimum(rows, 3 if rows > 1 else 1) + np.arange(3) * (rows > 1)
    full, _ = PagePool.init(16, 3, 5, 8).extend(lengths)
    trimmed = full.trim(spec.visibility)
    assert int(trimmed.num_free) > int(full.num_free)
    keys = jax.random.split(jax.random.key(0), 4)
    own = np.asarray(trimmed.ref_counts > 0)[:, None, None, None, None]
    kv = jax.random.normal(keys[0], layout.array_shapes(16)[0])
    total = int(steps.sum())
    q, k, v = (jax.random.normal(key, (total, n, 16)) for key, n in zip(keys[1:], (4, 2, 2), strict=True))
    full, trimmed = (pool.extend(steps)[0] for pool in (full, trimmed))
    want, _ = paged.lower(spec, layout, "xla").update(q, k, v, layout.wrap(kv), full.ragged_batch(steps))
    attend = paged.lower(spec, layout, "tpu", interpret=True)
    batch = trimmed.decode_batch() if rows == 1 else trimmed.ragged_batch(steps)
    got, _ = attend.update(q, k, v, layout.wrap(jnp.where(own, kv, jnp.nan)), batch)
    np.testing.assert_allclose(got, want, atol=2e-5)
