"""What a batch brings, on XLA: numbers of a sequence, positions and ancestors of its rows; and masks by head."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.spec import (
    ALiBi,
    AttentionSpec,
    Bias,
    Causal,
    Chunk,
    Coverage,
    Everything,
    Mask,
    PageLayout,
    PerHead,
    Prefix,
    RaggedBatch,
    Segments,
    Spans,
    Tree,
    Value,
    Where,
    Window,
    reference_state,
)

HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8}
LAYOUT = PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
LENGTHS, ROWS, WIDTH = [19, 3, 0, 12, 16], [5, 3, 1, 1, 6], 5


@dataclasses.dataclass(frozen=True)
class Every(Mask):
    """A mask of a user's own, with a number that may be a `Value`."""

    step: int | Value

    def __call__(self, p, j):
        return j % self.step == p % self.step

    def coverage(self, p0, p1, j0, j1):
        return Coverage(True, False)


def far(p, j, most):
    return p - j >= most


def by_head(p, j, h):
    return (p - j) % 4 != h


def slanted(p, j, h, slope):
    return slope * (j - p).astype(jnp.float32) * (h + 1).astype(jnp.float32)


def _where(n):
    return Where(far, values=(n,)) if isinstance(n, Value) else Where(functools.partial(far, most=n))


def _bias(n):
    return Bias(slanted, values=(n,)) if isinstance(n, Value) else Bias(functools.partial(slanted, slope=n))


def ints(*numbers):
    return jnp.asarray(numbers, jnp.int32)


NUMBERS = {
    "prefix": (lambda n: {"mask": Prefix(n), "causal": False}, ints(7, 0, 3, 12, 2)),
    "causal or prefix": (lambda n: {"mask": Causal() | Prefix(n), "causal": False}, ints(9, 2, 3, 12, 2)),
    "window": (lambda n: {"window": n}, ints(3, 1, 2, 9, 4)),
    "not window": (lambda n: {"mask": ~Window(n)}, ints(3, 1, 2, 9, 4)),
    "chunk": (lambda n: {"mask": Chunk(n)}, ints(3, 1, 2, 9, 4)),
    "own": (lambda n: {"mask": Every(n)}, ints(3, 1, 2, 2, 4)),
    "where": (lambda n: {"mask": _where(n)}, ints(3, 1, 2, 2, 4)),
    "soft cap": (lambda n: {"soft_cap": n}, jnp.asarray([2.0, 1.0, 0.5, 3.0, 30.0])),
    "bias": (lambda n: {"scores": (_bias(n),)}, jnp.asarray([0.5, 1.0, 0.0, -1.0, 0.25])),
}
MANY = {
    "spans": (
        lambda a, b: {"mask": Causal() | Spans(a, b), "causal": False},
        (np.array([[2, 9], [0, 0], [1, 1], [4, 11], [15, 3]]), np.array([[6, 18], [3, 0], [0, 2], [12, 12], [16, 9]])),
    ),
    "segments": (lambda a, b: {"mask": Segments(a)}, (np.array([[5, 11], [1, 9], [1, 1], [9, 11], [4, 4]]), None)),
    "slopes": (lambda a, b: {"scores": (ALiBi(a),)}, (np.linspace(0.1, 2.0, 20, dtype=np.float32).reshape(5, 4), None)),
}


def _few(*names, of):
    """The rows of a table, of which these run always."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.kernels) for name in of]


def arrays(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    tokens = sum(rows) + 2
    pool = [rng.normal(size=shape).astype(np.float32) for shape in LAYOUT.array_shapes(27)]
    pages = LAYOUT.wrap(*map(jnp.asarray, pool))
    tables = rng.permutation(25).reshape(5, WIDTH)
    q = jnp.asarray(rng.normal(size=(tokens, 4, 8)), jnp.float32)
    return q, pages, tables, np.concatenate([[0], np.cumsum(rows)])


def batch_of(tables, starts, **brought):
    return RaggedBatch(LENGTHS, tables, starts, **brought)


def assert_reference(spec, q, pages, batch):
    got = paged.lower(spec, LAYOUT, "xla").state(q, pages, batch)
    want = reference_state(spec, q, pages, batch)
    np.testing.assert_allclose(got.out, want.out, atol=2e-5)
    np.testing.assert_allclose(got.lse, want.lse, atol=2e-5)
    return got


@pytest.mark.parametrize("name", _few("causal or prefix", of=NUMBERS))
def test_a_number_for_each_sequence_is_the_static_number(name):
    """Bitwise, pages visited too, whichever sequence has it; and the reference's."""
    make, numbers = NUMBERS[name]
    q, pages, tables, starts = arrays()
    spec = AttentionSpec(**HEADS, **make(Value("n", dtype=numbers.dtype.name)))
    attend, batch = paged.lower(spec, LAYOUT, "xla"), batch_of(tables, starts, values={"n": numbers})
    got = assert_reference(spec, q, pages, batch)
    is_score = numbers.dtype == jnp.float32  # a static divisor may be a factor, which rounds otherwise
    for s, number in list(enumerate(numbers.tolist()))[::2]:  # the reference has looked at all
        if name in ("prefix", "causal or prefix") and number == 0:
            continue
        static = paged.lower(AttentionSpec(**HEADS, **make(number)), LAYOUT, "xla")
        want = static.state(q, pages, batch_of(tables, starts))
        rows = slice(starts[s], starts[s + 1])
        np.testing.assert_allclose(got.out[rows], want.out[rows], rtol=0, atol=1e-6 if is_score else 0)
        np.testing.assert_allclose(got.lse[rows], want.lse[rows], rtol=0, atol=1e-6 if is_score else 0)
        alone = dict(lengths=[LENGTHS[s]], block_tables=tables[s : s + 1], query_starts=[0, ROWS[s]])
        own = [
            a.explain(q[rows], pages, b).pages_visited
            for a, b in (
                (attend, RaggedBatch(**alone, values={"n": numbers[s : s + 1]})),
                (static, RaggedBatch(**alone)),
            )
        ]
        assert own[0] == own[1]


@pytest.mark.parametrize("name", _few("spans", of=MANY))
def test_several_numbers_for_each_sequence(name):
    make, (a, b) = MANY[name]
    q, pages, tables, starts = arrays()
    values = {name: x for name, x in (("a", a), ("b", b)) if x is not None}
    named = [
        None if x is None else Value(n, x.shape[1], x.dtype.name.replace("64", "32")) for n, x in (("a", a), ("b", b))
    ]
    spec = AttentionSpec(**HEADS, **make(*named))
    got = assert_reference(spec, q, pages, batch_of(tables, starts, values=values))
    for s in (0, 2, 4):  # the reference has looked at all
        static = AttentionSpec(**HEADS, **make(*(None if x is None else tuple(x[s].tolist()) for x in (a, b))))
        want = paged.lower(static, LAYOUT, "xla").state(q, pages, batch_of(tables, starts))
        rows = slice(starts[s], starts[s + 1])
        np.testing.assert_array_equal(got.out[rows], want.out[rows])


@pytest.mark.parametrize(
    "mask",
    [
        PerHead((Window(2), Chunk(4), Where(by_head), Prefix(3))),
        pytest.param(Where(by_head), marks=pytest.mark.kernels),
        pytest.param(PerHead((Window(2), Everything())), marks=pytest.mark.kernels),
        pytest.param(~PerHead((Window(2), Where(by_head))), marks=pytest.mark.kernels),
    ],
    ids=str,
)
def test_masks_by_head(mask):
    q, pages, tables, starts = arrays()
    assert_reference(AttentionSpec(**HEADS, mask=mask), q, pages, batch_of(tables, starts))


@pytest.mark.parametrize(
    "terms",
    [
        pytest.param(mask, marks=pytest.mark.kernels)
        for mask in (Window(3) & Tree(), Tree(), Prefix(2) & Tree(), Tree() & Chunk(4))
    ],
    ids=str,
)
def test_a_tree_equals_its_paths(terms):
    """Each path of the tree, run alone as a chain that follows the tokens before."""
    parents = [[-1, 0, 0, 1, 2], [-1, 0, 1], [-1], [-1], [-1, -1, 0, 1, 3, 3]]
    words, depth = [], []
    for of_seq in parents:
        own = []
        for i, parent in enumerate(of_seq):
            own.append((0 if parent < 0 else own[parent]) | 1 << i)
            depth.append(0 if parent < 0 else depth[len(depth) - i + parent] + 1)
        words += own
    q, pages, tables, starts = arrays()
    base = np.repeat(np.array(LENGTHS) - ROWS, ROWS)
    positions = np.concatenate([base + depth, [0, 0]])
    rng = np.random.default_rng(1)
    k, v = (jnp.asarray(rng.normal(size=(len(q), 2, 8)), jnp.float32) for _ in range(2))
    spec = AttentionSpec(**HEADS, mask=terms, scores=(ALiBi(),))
    batch = batch_of(tables, starts, positions=positions, ancestors=[*words, 0, 0])
    attend = paged.lower(spec, LAYOUT, "xla")
    out, _ = attend.update(q, k, v, pages, batch)
    written = paged.write(k, v, pages, batch)
    np.testing.assert_allclose(out, reference_state(spec, q, written, batch).out, atol=2e-5)
    static = spec.replace(mask={Tree(): None}.get(terms) if terms == Tree() else _without_tree(terms))
    plain = paged.lower(static, LAYOUT, "xla")
    for s, of_seq in enumerate(parents):
        for leaf in range(len(of_seq)):
            path, at = [], leaf
            while at >= 0:
                path.insert(0, at)
                at = of_seq[at]
            rows = starts[s] + np.array(path)
            length = LENGTHS[s] - ROWS[s] + len(path)
            if length <= 0:
                continue
            alone = RaggedBatch([length], tables[s : s + 1], [0, len(path)])
            want, _ = plain.update(q[rows], k[rows], v[rows], pages, alone)
            np.testing.assert_allclose(out[rows[-1]], want[-1], atol=2e-5)


def _without_tree(terms):
    left = [term for term in terms.terms if term != Tree()]
    return left[0]


def test_a_chain_as_a_tree_is_the_chain():
    q, pages, tables, starts = arrays()
    chain = np.concatenate([2 ** (np.arange(n) + 1) - 1 for n in ROWS] + [[0, 0]])
    spec = AttentionSpec(**HEADS, window=6)
    want = paged.lower(spec, LAYOUT, "xla").state(q, pages, batch_of(tables, starts))
    tree = paged.lower(spec.replace(mask=Tree()), LAYOUT, "xla")
    got = tree.state(q, pages, batch_of(tables, starts, ancestors=chain))
    np.testing.assert_array_equal(got.out, want.out)


@pytest.mark.kernels
def test_positions_are_what_masks_and_scores_see():
    q, pages, tables, starts = arrays()
    rng = np.random.default_rng(2)
    positions = rng.integers(0, 30, len(q))
    for mask in (None, Window(5), Where(far_apart)):
        spec = AttentionSpec(**HEADS, mask=mask, scores=(ALiBi(),))
        assert_reference(spec, q, pages, batch_of(tables, starts, positions=positions))


def far_apart(p, j):
    return (p - j) % 3 != 1


def test_a_new_number_does_not_trace_again_and_gradients_flow():
    q, pages, tables, starts = arrays()
    traces = []

    @jax.jit
    def loss(q, numbers):
        traces.append(1)
        spec = AttentionSpec(**HEADS, window=Value("n"), mask=PerHead((Everything(), Window(4))))
        return paged.lower(spec, LAYOUT, "xla")(q, pages, batch_of(tables, starts, values={"n": numbers})).sum()

    first, second = jax.grad(loss)(q, ints(3, 1, 2, 9, 4)), jax.grad(loss)(q, ints(2, 2, 2, 2, 2))
    assert len(traces) == 1 and np.isfinite(first).all() and not np.array_equal(first, second)


@pytest.mark.kernels
def test_a_batch_without_ancestors_is_a_chain():
    q, pages, tables, starts = arrays()
    spec = AttentionSpec(**HEADS, window=6)
    for mask, want in ((Tree(), spec), (Prefix(3) & Tree(), spec.replace(mask=Prefix(3))), (~Tree(), None)):
        attend, batch = paged.lower(spec.replace(mask=mask), LAYOUT, "xla"), batch_of(tables, starts)
        got = attend.state(q, pages, batch)
        if want is not None:
            np.testing.assert_array_equal(got.out, paged.lower(want, LAYOUT, "xla")(q, pages, batch))
            plan = attend.plan(q, pages, batch)
            np.testing.assert_array_equal(got.out, attend(q, pages, plan))
        np.testing.assert_allclose(got.out, reference_state(attend.spec, q, pages, batch).out, atol=2e-5)
