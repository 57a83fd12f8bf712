"""Gradients, crossed with every lowering: those of the reference in float64, and finite in empty rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.spec import AttentionSpec, AttentionState, Bias, Chunk, Prefix, reference_state
from tests.support import Case, build, every_lowering, lowered
from tests.support.specs import PHASES

SPECS = {
    "causal": {},
    "window, cap, sinks": {"window": 5, "soft_cap": 20.0, "sinks": True},
    "chunks, ALiBi": {"causal": False, "mask": Prefix(3) | Chunk(6), "scores": (paged.ALiBi(),)},
}
PHASE_OF = {"causal": "decode", "window, cap, sinks": "ragged", "chunks, ALiBi": "prefill"}
# Relative to the largest entry of each gradient: sums of up to a hundred terms, each with the error of a weight,
# 2e-6, times scores' and values' sizes of about 10.
RELATIVE = 1e-5


def _case(name, **facts):
    spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, **SPECS[name])
    phase = PHASE_OF[name]
    sinks = (4,) if spec.sinks else None
    return Case(spec=spec, phase=phase, sink_shape=sinks, **{**PHASES[phase], **facts})


def _weights(built, dtype):
    """Random cotangents of the output and the lse; 0 for the lse of rows that are empty, where it is -inf."""
    rng = np.random.default_rng(5)
    out = rng.normal(size=(*built.q.shape[:2], built.pages.layout.value_dim))
    lse = rng.normal(size=built.q.shape[:2])
    return jnp.asarray(out, dtype), jnp.asarray(lse, dtype)


def _loss(state, weights):
    lse = jnp.where(jnp.isneginf(state.lse), 0.0, state.lse)
    return jnp.sum(state.out * weights[0]) + jnp.sum(lse.astype(weights[1].dtype) * weights[1])


def _gradient(state, case, num_extra):
    """The gradients of `_loss` by q, the pages' arrays, the sinks and whatever else: one program for all batches."""

    def loss(q, arrays, sinks, *rest):
        *extra, batch, weights = rest
        return _loss(state(q, case.layout.wrap(*arrays), batch, sinks, *extra), weights)

    which = tuple(i for i in range(3 + num_extra) if i != 2 or case.spec.sinks)
    return jax.jit(jax.grad(loss, argnums=which))


def _exact_of(case, spec_of, num_extra=0):
    """The reference's gradients in float64, as a function of built arrays and of what else there is."""
    state = lambda q, pages, batch, sinks, *extra: reference_state(spec_of(*extra), q, pages, batch, sinks)
    gradient = _gradient(state, case, num_extra)

    def exact(built, *extra):
        with jax.enable_x64(True):
            values = (built.q, built.sinks, *extra)
            double = [None if x is None else jnp.asarray(np.asarray(x, np.float64)) for x in values]
            weights = _weights(built, jnp.float64)
            gradients = gradient(double[0], built.pages.arrays, *double[1:], built.batch, weights)
            return [np.asarray(g, np.float64) for g in jax.tree.leaves(gradients)]

    return exact


def _got_of(case, attend_of, num_extra=0):
    """The same by an attention."""
    state = lambda q, pages, batch, sinks, *extra: attend_of(*extra).state(q, pages, batch, sinks)
    gradient = _gradient(state, case, num_extra)

    def got(built, *extra):
        weights = _weights(built, jnp.float32)
        return jax.tree.leaves(gradient(built.q, built.pages.arrays, built.sinks, *extra, built.batch, weights))

    return got


def _assert_close(got, want):
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        a = np.asarray(a, np.float64)
        assert np.isfinite(a).all(), f"gradient {i} is not finite"
        assert np.abs(b).max() > 1e-2, f"gradient {i} is nothing to compare with"
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error <= RELATIVE, f"gradient {i} is off by {error:.3g} of its largest entry"


@every_lowering
@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_the_references(lowering, name):
    """Gradients of q, the pages and the sinks, through both out and lse. Pages hold NaN where no token lies."""
    case = _case(name)
    attend = lowered(lowering, case)
    got, exact = _got_of(case, lambda: attend), _exact_of(case, lambda: case.spec)
    for corner in ("mixed", "more rows than tokens"):
        built = build(case.replace(corner=corner))
        _assert_close(got(built), exact(built))


@every_lowering
@pytest.mark.parametrize(
    "order", ["interleaved", *(pytest.param(order, marks=pytest.mark.kernels) for order in ("split", "joined"))]
)
def test_gradients_of_the_other_page_orders_are_the_references(lowering, order):
    case = _case("window, cap, sinks", order=order, value_dim=3 if order == "split" else None)
    built = build(case)
    attend = lowered(
        lowering, case, pages_per_block=1, rows_per_tile=3, row_blocks_at_once=2 if order == "split" else 1
    )
    _assert_close(_got_of(case, lambda: attend)(built), _exact_of(case, lambda: case.spec)(built))


@every_lowering
def test_gradients_reach_what_a_bias_closes_over(lowering):
    case = _case("window, cap, sinks")
    built = build(case)
    table = jnp.asarray(np.random.default_rng(3).normal(size=(4, 8)), jnp.float32)

    def spec_of(table):
        return case.spec.replace(scores=(Bias(lambda p, j, h: table[h, jnp.clip(p - j, 0, 7)]),))

    def attend_of(table):
        return paged.lower(spec_of(table), case.layout, lowered(lowering, case).lowering.target)

    _assert_close(_got_of(case, attend_of, 1)(built, table), _exact_of(case, spec_of, 1)(built, table))


@every_lowering
def test_gradients_are_finite_and_zero_where_nothing_is_visible(lowering):
    case = _case("causal").replace(phase="ragged")
    attend = lowered(lowering, case)
    got = _got_of(case, lambda: attend)
    for corner in ("empty", "all dead"):
        for gradient in got(build(case.replace(corner=corner))):
            assert not np.asarray(gradient).any(), corner


@every_lowering
def test_a_naive_loss_over_lse_keeps_gradients_finite_with_a_sink(lowering):
    """With a sink every row of a sequence has a finite lse, so a loss may sum it."""
    case = _case("window, cap, sinks")
    built = build(case.replace(corner="empty"))
    attend = lowered(lowering, case)

    def loss(q, sinks):
        state = attend.state(q, built.pages, built.batch, sinks)
        owned = np.array([row is not None for row in built.row_of])
        return jnp.sum(jnp.where(owned[:, None], state.lse, 0.0)) + jnp.sum(state.out)

    q, sinks = jax.jit(jax.grad(loss, argnums=(0, 1)))(built.q, built.sinks)
    assert not np.asarray(q).any()
    np.testing.assert_allclose(sinks, sum(row is not None for row in built.row_of), rtol=1e-6)


@every_lowering
def test_gradients_of_an_update_reach_the_new_tokens(lowering):
    """Through the write: as if the tokens had been in the pages."""
    case = _case("causal")
    built, held = build(case, hold_new=False), build(case)
    attend, weights = lowered(lowering, case), _weights(built, jnp.float32)

    def loss(k, v):
        out, _ = attend.update(built.q, k, v, built.pages, built.batch)
        return jnp.sum(out * weights[0])

    def loss_of_pages(arrays):
        return jnp.sum(attend(held.q, held.pages.layout.wrap(*arrays), held.batch) * weights[0])

    k, v = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.nan_to_num(built.k), jnp.nan_to_num(built.v))
    (pool,) = jax.jit(jax.grad(loss_of_pages))(held.pages.arrays)
    for row, owner in enumerate(built.row_of):
        if owner is not None and owner[1] >= 0:
            page, slot = built.batch.block_tables[owner[0], owner[1] // 4], owner[1] % 4
            np.testing.assert_allclose(k[row], pool[page, 0, :, slot], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(v[row], pool[page, 1, :, slot], rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(v)).max() > 0.1


def _dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# Derivatives of a loss ``f`` at ``x`` along ``a`` and ``b``: both modes, and both modes of both.
DERIVATIVES = {
    "jvp": lambda f, x, a, b: jax.jvp(f, (x,), (a,))[1],
    "linearize": lambda f, x, a, b: jax.linearize(f, x)[1](a),
    "jvp of jvp": lambda f, x, a, b: jax.jvp(lambda x: jax.jvp(f, (x,), (a,))[1], (x,), (b,))[1],
    "jvp of grad": lambda f, x, a, b: jax.jvp(jax.grad(f), (x,), (a,))[1],
    "grad of jvp": lambda f, x, a, b: jax.grad(lambda x: jax.jvp(f, (x,), (a,))[1])(x),
    "grad of grad": lambda f, x, a, b: jax.grad(lambda x: _dot(jax.grad(f)(x), a))(x),
}


@every_lowering
@pytest.mark.parametrize(
    ("name", "order", "kinds"),
    [
        pytest.param("causal", "split", tuple(DERIVATIVES), marks=pytest.mark.slow),
        pytest.param("window, cap, sinks", "packed", ("grad of grad",), marks=pytest.mark.kernels),
        pytest.param("chunks, ALiBi", "interleaved", ("jvp of grad",), marks=pytest.mark.kernels),
    ],
)
def test_every_first_and_second_derivative_is_the_references(lowering, name, order, kinds):
    """Of an update, by the queries, the new tokens, the pages, the sinks and a bias's table. Some rows are empty."""
    case = _case(name, order=order)
    built, table = build(case, hold_new=False), jnp.asarray(np.random.default_rng(3).normal(size=(4, 8)), jnp.float32)

    def spec_of(table):
        bias = Bias(lambda p, j, h: table[h, jnp.clip(p - j, 0, 7)])
        return case.spec.replace(scores=(*case.spec.scores, bias))

    clean = lambda x: jnp.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
    arrays = tuple(clean(a) for a in built.pages.arrays)
    x = (built.q, clean(built.k), clean(built.v), arrays, built.sinks, table)
    a, b = (_directions(x, seed) for seed in (1, 2))

    def got_loss(x):
        q, k, v, arrays, sinks, table = x
        attend = paged.lower(spec_of(table), case.layout, lowered(lowering, case).lowering.target)
        state, _ = attend.update_state(q, k, v, built.pages.layout.wrap(*arrays), built.batch, sinks)
        return _curved(state)

    def exact_loss(x):
        q, k, v, arrays, sinks, table = x
        pages = paged.write(k, v, built.pages.layout.wrap(*arrays), built.batch, "xla")
        return _curved(reference_state(spec_of(table), q, pages, built.batch, sinks))

    every = lambda f: lambda x, a, b: {kind: DERIVATIVES[kind](f, x, a, b) for kind in kinds}
    got, exact = (jax.tree.map(np.asarray, jax.jit(every(f))(x, a, b)) for f in (got_loss, exact_loss))
    for kind in kinds:
        for i, (y, z) in enumerate(zip(jax.tree.leaves(got[kind]), jax.tree.leaves(exact[kind]), strict=True)):
            assert np.isfinite(y).all() and np.abs(z).max() > 1e-2, (kind, i)
            # Both are float32; sums of second derivatives are of terms about ten times larger than their result.
            assert np.abs(y - z).max() <= 10 * RELATIVE * np.abs(z).max(), (kind, i)


def _directions(x, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), x)


def _curved(state):
    """A loss whose second derivative is not 0."""
    return jnp.sum(jnp.sin(state.out)) + jnp.sum(jnp.where(jnp.isneginf(state.lse), 0.0, state.lse) ** 2)


@every_lowering
def test_second_derivatives_are_finite_and_zero_where_nothing_is_visible(lowering):
    case = _case("causal")
    built = build(case.replace(corner="empty"))
    attend = lowered(lowering, case)
    loss = lambda q: _curved(attend.state(q, built.pages, built.batch))
    for name in ("jvp of grad", "grad of jvp"):
        found = jax.jit(lambda q, name=name: DERIVATIVES[name](loss, q, q, None))(built.q)
        assert not np.asarray(found).any(), name


@pytest.mark.kernels
@every_lowering
def test_a_third_derivative_is_for_forward_mode_and_says_so(lowering):
    built = build(_case("causal"))
    attend = lowered(lowering, built.case)
    loss = lambda q: jnp.sum(attend(q, built.pages, built.batch) ** 2)
    second = lambda q: jax.jvp(jax.grad(loss), (q,), (q,))[1]
    third = jax.jit(lambda q: jax.jvp(second, (q,), (q,))[1])(built.q)
    assert np.isfinite(np.asarray(third)).all() and np.asarray(third).any()
    with pytest.raises(NotImplementedError, match=r"no third derivative in reverse mode.*jax.jvp.*dense_attention"):
        jax.eval_shape(jax.grad(lambda q: jnp.sum(second(q))), built.q)


def test_gradients_of_a_merge_are_finite_at_empty_states():
    def loss(out, lse, is_empty):
        empty = AttentionState(jnp.zeros((2, 1, 3)), jnp.full((2, 1), -jnp.inf))
        a = AttentionState(out, jnp.where(is_empty, -jnp.inf, lse))
        merged = paged.merge(a, empty)
        return jnp.sum(merged.out**2) + jnp.sum(jnp.where(jnp.isneginf(merged.lse), 0.0, merged.lse))

    is_empty = jnp.array([[True], [False]])
    out, lse = jax.grad(loss, argnums=(0, 1))(3 * jnp.ones((2, 1, 3)), jnp.ones((2, 1)), is_empty)
    np.testing.assert_array_equal(out, jnp.array([[[0.0] * 3], [[6.0] * 3]]))
    np.testing.assert_array_equal(lse, jnp.array([[0.0], [1.0]]))
