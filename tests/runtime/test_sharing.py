"""A random program of all operations over real pages: every row sees its own tokens, and NaN lies everywhere else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.runtime import PagePool, PrefixCache
from paged.testing import interpret_params, watched

PAGES, SLOTS, WIDTH, SIZE, ROWS = 12, 3, 4, 8, 16
CAPACITY = WIDTH * SIZE
SPEC = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)

_extend, _release, _settle, _fork = map(jax.jit, (PagePool.extend, PagePool.release, PagePool.settle, PagePool.fork))
_share, _reorder, _batch = map(jax.jit, (PagePool.share, PagePool.reorder, PagePool.ragged_batch))
_attach, _evict, _insert = map(jax.jit, (PrefixCache.attach, PrefixCache.evict, PrefixCache.insert))


@functools.cache
def vectors(tokens):
    """The query, key and value of a token: of it and of all before it."""
    rng = np.random.default_rng([len(tokens), *tokens])
    return rng.normal(0, 2, (4, 8)), rng.normal(0, 2, (2, 8)), rng.normal(0, 2, (2, 8))


@functools.cache
def attention(tokens):
    """What the last token sees, in float64."""
    q, keys, values = vectors(tokens)[0], *zip(*(vectors(tokens[: j + 1])[1:] for j in range(len(tokens))), strict=True)
    k, v = np.repeat(np.array(keys), 2, axis=1), np.repeat(np.array(values), 2, axis=1)
    weights = np.exp(np.einsum("hd,khd->hk", q, k) / np.sqrt(8))
    return np.einsum("hk,khd->hd", weights / weights.sum(1, keepdims=True), v)


class Program:
    """Slots with tokens over pages that a step writes; a page that nobody holds is NaN."""

    def __init__(self, layout, target, seed, **how):
        attend = paged.lower(SPEC, layout, target, **how)
        self.update = jax.jit(attend.update) if target == "xla" else functools.partial(watched, jax.jit(attend.update))
        pages = layout.init(PAGES)
        self.pages = jax.tree.map(_poisoned, pages)
        # What rounding of stored keys and values may change; another token's would change far more.
        self.error = {4: 1e-4, 2: 0.1, 1: 0.2}[layout.dtype.itemsize]
        self.pool = PagePool.init(PAGES, SLOTS, WIDTH, SIZE)
        self.cache, self.tokens, self.rng = PrefixCache.init(self.pool), [()] * SLOTS, np.random.default_rng(seed)

    def step(self, new):
        """More tokens of every slot, if there are pages for them, in one step."""
        counts = [len(tokens) for tokens in new]
        self.pool, ok = _extend(self.pool, jnp.asarray(counts, jnp.int32))
        new = [tokens if fits else () for tokens, fits in zip(new, ok.tolist(), strict=True)]
        batch = _batch(self.pool, jnp.asarray([len(tokens) for tokens in new], jnp.int32))
        known = [
            own + tokens[: i + 1] for own, tokens in zip(self.tokens, new, strict=True) for i in range(len(tokens))
        ]
        rows = np.zeros((3, ROWS, 4, 8), np.float32)
        for row, tokens in enumerate(known):
            for part, x in zip(rows, vectors(tokens), strict=True):
                part[row, : len(x)] = x
        q, k, v = jnp.asarray(rows[0]), jnp.asarray(rows[1, :, :2]), jnp.asarray(rows[2, :, :2])
        out, self.pages = self.update(q, k, v, self.pages, batch)
        for row, tokens in enumerate(known):
            np.testing.assert_allclose(out[row], attention(tokens), atol=self.error, err_msg=f"{tokens} in row {row}")
        self.tokens, self.pool = (
            [own + tokens for own, tokens in zip(self.tokens, new, strict=True)],
            _settle(self.pool),
        )

    def operate(self):
        """One operation, and then NaN in every page that nobody holds."""
        kind, slot = self.rng.random(), int(self.rng.integers(SLOTS))
        own, other = self.tokens[slot], int(self.rng.integers(SLOTS))
        padded = jnp.asarray(np.resize([*own, 0], CAPACITY), jnp.int32)
        if kind < 0.35:
            most = min(5, ROWS // SLOTS)
            self.step([tuple(self.rng.integers(0, 2, self.rng.integers(0, most + 1)).tolist()) for _ in range(SLOTS)])
        elif kind < 0.5 and own:
            self.cache, self.pool = _insert(self.cache, self.pool, slot, padded, len(own), has_partial=kind < 0.45)
        elif kind < 0.6:
            self.pool, self.tokens[slot] = _release(self.pool, jnp.arange(SLOTS) == slot), ()
        elif kind < 0.75 and not own:
            asked = self.rng.integers(0, 2, CAPACITY)
            self.cache, self.pool, count = _attach(self.cache, self.pool, slot, jnp.asarray(asked, jnp.int32), 20)
            self.tokens[slot] = tuple(asked[: int(count)].tolist())
        elif kind < 0.85 and not own:
            tokens = int(self.rng.integers(0, len(self.tokens[other]) + 1))
            source = jnp.full(SLOTS, -1).at[slot].set(other)
            self.pool, _ = _share(self.pool, source, jnp.full(SLOTS, tokens, jnp.int32))
            self.tokens[slot] = self.tokens[other][:tokens]
        elif kind < 0.95:
            parents = self.rng.integers(-1, SLOTS, SLOTS)
            self.pool, _ = _reorder(self.pool, jnp.asarray(parents, jnp.int32))
            self.tokens = [self.tokens[p] if p >= 0 else () for p in parents.tolist()]
        else:
            self.cache, self.pool = _evict(self.cache, self.pool, int(self.rng.integers(0, PAGES)))
        is_free = np.asarray(self.pool.ref_counts) == 0

        def poison(x):
            axis = x.shape.index(PAGES)
            return jnp.where(jnp.expand_dims(is_free, [i for i in range(x.ndim) if i != axis]), _poisoned(x), x)

        self.pages = jax.tree.map(poison, self.pages)


def _poisoned(x):
    """NaN, and in pages of integers the number that is farthest from others: their scales are NaN."""
    return jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else -128)


def layout_of(order, dtype="float32", scales=None):
    sizes = {"page_size": SIZE, "num_kv_heads": 2, "head_dim": 8}
    return paged.PageLayout(**sizes, dtype=jnp.dtype(dtype), order=order, scales=scales)


LAYOUTS = {
    "split": layout_of("split"),
    "joined, bfloat16": layout_of("joined", "bfloat16"),
    "interleaved, int8, token": layout_of("interleaved", "int8", "token"),
}


@pytest.mark.parametrize(
    ("layout", "steps"),
    [
        pytest.param(layout_of("packed"), 60, id="packed"),
        *[pytest.param(layout, 300, id=name, marks=pytest.mark.slow) for name, layout in LAYOUTS.items()],
    ],
)
def test_no_row_sees_what_is_not_its_own(layout, steps):
    program = Program(layout, "xla", seed=steps)
    for _ in range(steps):
        program.operate()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["on_wait", "eager"])
def test_no_row_sees_what_is_not_its_own_on_kernels(mode):
    """In joined order the kernel of copies runs too."""
    program = Program(layout_of("joined"), "tpu", seed=1, interpret=interpret_params(mode))
    for _ in range(40):
        program.operate()
