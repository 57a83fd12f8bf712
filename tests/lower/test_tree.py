"""Trees of drafted tokens: shapes, the accepted path, and the move of its tokens to consecutive places."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged import tree
from paged.spec import PAGE_ORDERS, PageLayout

PARENTS = ([-1, 0, 0, 1, 2, 2], [-1, 0, 1, 2, 3, 4], [-1, 0, 0, 0, 0, 0], [-1, -1, 0, 1, 3, 3])


def test_ancestors_are_those_of_the_parents():
    """For one tree and for several, concrete and traced; more rows than a word has bits."""
    rng = np.random.default_rng(0)
    many = np.array([[-1, *(rng.integers(-1, i) for i in range(1, 40))] for _ in range(3)])
    for drafts in (tree.from_parents(many), jax.jit(tree.from_parents)(many)):
        for s, parents in enumerate(many):
            for i in range(40):
                above, at = {i}, int(parents[i])
                while at >= 0:
                    above.add(at)
                    at = int(parents[at])
                words = np.asarray(drafts.ancestors)[s, i].view(np.uint32)
                assert {b for b in range(40) if words[b // 32] >> (b % 32) & 1} == above
                assert drafts.depth[s, i] == len(above) - 1


def test_a_parent_after_its_child_is_an_error():
    with pytest.raises(ValueError, match="parents must be rows before their row"):
        tree.from_parents([-1, 2, 0])


def test_the_accepted_path_is_the_longest_that_is_accepted_whole():
    rng = np.random.default_rng(1)
    drafts = tree.from_parents(np.array(PARENTS))
    accepted = rng.random((4, 6)) < 0.6
    rows, count = tree.accepted_path(drafts, jnp.asarray(accepted))
    for s, parents in enumerate(PARENTS):
        best: list[int] = []
        for last in range(6):
            path = [last]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
            if accepted[s][path].all() and len(path) > len(best):
                best = path
        assert rows[s, : int(count[s])].tolist() == best


@pytest.mark.parametrize("dtype, scales", [("float32", None), ("bfloat16", None), ("int8", "token"), ("int8", "head")])
@pytest.mark.parametrize("order", PAGE_ORDERS)
def test_commit_moves_bits_to_consecutive_places(order, dtype, scales):
    """Nothing else changes: not a dead sequence's pages, not what no row is moved to. Holes and too many rows, too."""
    layout = PageLayout(page_size=4, num_kv_heads=2, head_dim=8, order=order, dtype=jnp.dtype(dtype), scales=scales)
    rng = np.random.default_rng(2)
    given = {}
    if scales == "head":
        given = {"k_scale": jnp.ones(2), "v_scale": jnp.ones(2)}
    pages = layout.init(num_pages=20, **given)
    shapes = [rng.normal(0, 20, size=x.shape) for x in pages.arrays]
    pages = paged.Pages(
        tuple(jnp.asarray(x, layout.dtype) for x in shapes),
        *(None if s is None else jnp.asarray(rng.random(s.shape), jnp.float32) for s in (pages.k_scale, pages.v_scale)),
        layout,
    )
    tables = rng.permutation(20)[:16].reshape(4, 4)
    tables[1, 1] = -1
    lengths, rows, count = (
        [13, 9, 4, 6],
        jnp.array([[0, 2, 5], [1, 3, 5], [0, 4, 7], [0, 1, 2]]),
        jnp.array([3, 2, 3, 9]),
    )
    step = tree.batch(lengths, tables, tree.from_parents(np.array(PARENTS)), num_seqs=3)
    moved = tree.commit(pages, step, rows, count)

    def stored(pages):
        found = [np.asarray(x, np.float32) for x in (pages.keys(), pages.values())]
        scales = [np.asarray(x) for x in (pages.k_scale, pages.v_scale) if layout.scales == "token"]
        return [np.moveaxis(x, 2, 1) for x in (*found, *scales)]  # [pages, offsets, heads, ...]

    before, after = stored(pages), stored(moved)
    want = [x.copy() for x in before]
    for s in range(3):
        place0 = lengths[s] - 6
        for i in range(min(int(count[s]), 3)):
            places = [place0 + int(rows[s, i]), place0 + i]
            if any(not 0 <= place < 16 for place in places) or int(rows[s, i]) >= 6:
                continue
            (source, target) = ((tables[s, place // 4], place % 4) for place in places)
            if source[0] >= 0 and target[0] >= 0:
                for x, y in zip(want, before, strict=True):
                    x[target] = y[source]
    for got, wanted in zip(after, want, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_commit_is_in_place():
    layout = PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
    step = tree.batch([6], [[2, 0]], tree.from_topk((2, 1)))
    run = jax.jit(tree.commit, donate_argnums=0)
    compiled = run.lower(layout.init(64), step, jnp.array([[0, 2, 4]]), jnp.array([3])).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == layout.bytes_per_page * 64


def test_documents_that_are_packed_are_the_documents_apart():
    """Values and gradients of dense attention, for masks and scores that count from a document's first token."""
    rng = np.random.default_rng(3)
    spec = paged.AttentionSpec(
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=8,
        causal=False,
        scores=(paged.ALiBi(),),
        mask=(paged.Causal() & paged.Chunk(3)) | paged.Prefix(2),
    )
    q, k, v = (jnp.asarray(rng.normal(size=(1, 11, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    ends = [0, 4, 5, 11]
    segments = jnp.asarray([[7] * 4 + [3] + [7] * 6])

    @jax.jit
    def packed(q, k, v):
        return paged.dense_attention(spec, q, k, v, segments=segments)

    @jax.jit
    def apart(q, k, v):
        parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
        return jnp.concatenate([paged.dense_attention(spec, q[:, s], k[:, s], v[:, s]) for s in parts], axis=1)

    np.testing.assert_allclose(packed(q, k, v), apart(q, k, v), atol=1e-6)
    square = lambda f: jax.jit(jax.grad(lambda *x: (f(*x) ** 2).sum(), argnums=(0, 1, 2)))(q, k, v)
    for a, b in zip(square(packed), square(apart), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_dense_attention_takes_values():
    rng = np.random.default_rng(4)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 6, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    base = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
    got = paged.dense_attention(base.replace(window=paged.Value("n")), q, k, v, values={"n": jnp.array([2, 4])})
    want = [
        paged.dense_attention(base.replace(window=n), *(x[i : i + 1] for x in (q, k, v))) for i, n in enumerate((2, 4))
    ]
    np.testing.assert_allclose(got, jnp.concatenate(want), atol=1e-6)
    with pytest.raises(ValueError, match=r"values must be \['n'\]"):
        paged.dense_attention(base.replace(window=paged.Value("n")), q, k, v)
