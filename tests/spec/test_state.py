"""`merge` and sinks: the laws of the state, and its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.spec import AttentionState, add_sinks, exp_minus, log_add_exp, merge_stacked


def _state(seed, empty=()):
    rng = np.random.default_rng(seed)
    out = rng.normal(0, 3, (6, 2, 4)).astype(np.float32)
    lse = rng.normal(0, 30, (6, 2)).astype(np.float32)
    for row in empty:
        out[row], lse[row] = 0.0, -np.inf
    return AttentionState(jnp.asarray(out), jnp.asarray(lse))


A, B, C = _state(0, empty=(0, 1, 2)), _state(1, empty=(0, 1, 3)), _state(2, empty=(0, 2, 3))
EMPTY = AttentionState(jnp.zeros((6, 2, 4)), jnp.full((6, 2), -jnp.inf))


def _close(a, b):
    np.testing.assert_allclose(a.out, b.out, rtol=0, atol=2e-5)
    np.testing.assert_allclose(a.lse, b.lse, rtol=1e-6)
    assert np.isfinite(np.asarray(a.out)).all() and not np.isnan(np.asarray(a.lse)).any()


def test_merge_is_commutative_and_associative():
    _close(paged.merge(A, B), paged.merge(B, A))
    _close(paged.merge(paged.merge(A, B), C), paged.merge(A, paged.merge(B, C)))


def test_the_empty_state_is_the_identity_exactly():
    for merged in (paged.merge(A, EMPTY), paged.merge(EMPTY, A)):
        np.testing.assert_array_equal(merged.out, A.out)
        np.testing.assert_array_equal(merged.lse, A.lse)
    nothing = paged.merge(EMPTY, EMPTY)
    assert not np.asarray(nothing.out).any() and np.isneginf(nothing.lse).all()


def test_merge_is_the_law():
    """Against float64, where lse may differ by a hundred."""
    a, b = (np.asarray(x, np.float64) for x in (A.lse, B.lse))
    lse = np.logaddexp(a[4:], b[4:])
    merged = paged.merge(A, B)
    np.testing.assert_allclose(merged.lse[4:], lse, rtol=1e-6)
    out = np.exp(a[4:] - lse)[..., None] * A.out[4:] + np.exp(b[4:] - lse)[..., None] * B.out[4:]
    np.testing.assert_allclose(merged.out[4:], out, rtol=0, atol=3e-5)


def test_merge_is_a_mean_however_large_the_lse():
    """`exp(a - lse)` has the rounding error of lse: weights that add up to 2 at 1e30, and to 1.00003 at 1000."""
    for size in (1e3, 1e30, -1e30):
        state = AttentionState(jnp.ones((1, 1, 2)), jnp.full((1, 1), size))
        np.testing.assert_allclose(paged.merge(state, state).out, 1.0, rtol=1e-6)


def test_merge_keeps_dtype_and_works_under_vmap():
    half = AttentionState(A.out.astype(jnp.bfloat16), A.lse)
    assert paged.merge(half, half).out.dtype == jnp.bfloat16
    stacked = jax.tree.map(lambda x, y: jnp.stack([x, y]), A, B)
    mapped = jax.vmap(paged.merge)(stacked, stacked)
    np.testing.assert_array_equal(mapped.out[1], paged.merge(B, B).out)


@pytest.mark.parametrize("lse", [-np.inf, np.inf])
@pytest.mark.parametrize("left", [np.nan, np.inf, -np.inf, 7.0])
def test_an_empty_row_of_any_library_gives_the_other_part(left, lse):
    """A row is empty by its log-sum-exp, -inf or +inf; what another kernel left in its output has no effect."""
    odd = AttentionState(jnp.full_like(A.out, left), jnp.full_like(A.lse, lse))
    stacked = lambda *states: merge_stacked(jax.tree.map(lambda *xs: jnp.stack(xs), *states))
    for merge in (paged.merge, stacked):
        for merged in (merge(A, odd), merge(odd, A)):
            np.testing.assert_array_equal(merged.out, A.out)
            np.testing.assert_array_equal(merged.lse, A.lse)
        nothing = merge(odd, odd)
        assert not np.asarray(nothing.out).any() and np.isneginf(nothing.lse).all()
    sunk = add_sinks(odd, jnp.array([1.5, -2.0]))
    assert not np.asarray(sunk.out).any() and np.asarray(sunk.lse).tolist() == [[1.5, -2.0]] * 6


@pytest.mark.parametrize("lse", [-np.inf, np.inf])
def test_gradients_of_a_merge_with_an_empty_row_of_any_library_are_finite(lse):
    def loss(a, b):
        merged, sunk = paged.merge(a, b), add_sinks(b, jnp.zeros(2))
        kept = jnp.where(jnp.isfinite(merged.lse), merged.lse, 0)
        return jnp.sum(merged.out**2) + jnp.sum(kept) + jnp.sum(sunk.out)

    odd = AttentionState(jnp.full_like(A.out, jnp.nan), jnp.full_like(A.lse, lse))
    a, b = jax.grad(loss, argnums=(0, 1))(A, odd)
    np.testing.assert_array_equal(a.out, 2 * A.out)
    np.testing.assert_array_equal(a.lse, np.isfinite(A.lse).astype(np.float32))
    assert not np.asarray(b.out).any() and not np.asarray(b.lse).any()


STATE_ERRORS = {
    "tuple": (lambda: paged.merge((A.out, A.lse), A), TypeError, "a must be an AttentionState.*got tuple"),
    "array": (lambda: paged.merge(A, A.out), TypeError, "b must be an AttentionState.*got ArrayImpl"),
    "lists": (lambda: paged.merge(A, AttentionState([1.0], [0.0])), TypeError, "b must be .*two arrays"),
    "integers": (lambda: paged.merge(A, A._replace(out=A.out.astype(int))), TypeError, "b.out must be floating.*int32"),
    "lse": (lambda: paged.merge(A._replace(lse=A.lse[:5]), A), ValueError, r"a.lse must have.*\(6, 2\); got \(5, 2\)"),
    "none stacked": (lambda: merge_stacked(jax.tree.map(lambda x: x[None][:0], A)), ValueError, "at least one state"),
}


@pytest.mark.parametrize("name", STATE_ERRORS)
def test_merge_refuses_what_is_no_state_by_name(name):
    act, kind, text = STATE_ERRORS[name]
    with pytest.raises(kind, match=text):
        act()


def test_merge_refuses_states_of_different_shapes():
    with pytest.raises(ValueError, match=r"merge needs states of one shape; got out \(6, 2, 4\) and \(5, 2, 4\)"):
        paged.merge(A, AttentionState(A.out[:5], A.lse[:5]))


def test_a_sink_takes_weight_and_gives_no_value():
    sinks = jnp.array([1.5, -2.0])
    state = add_sinks(A, sinks)
    np.testing.assert_array_equal(state.lse[0], sinks)
    assert not np.asarray(state.out[0]).any()
    weight = 1 / (1 + np.exp(np.asarray(sinks, np.float64) - np.asarray(A.lse[4:], np.float64)))
    np.testing.assert_allclose(state.out[4:], weight[..., None] * np.asarray(A.out[4:]), rtol=2e-5, atol=1e-30)
    as_state = AttentionState(jnp.zeros_like(A.out), jnp.broadcast_to(sinks, A.lse.shape))
    _close(paged.merge(A, as_state), state)


def test_a_sink_of_minus_infinity_is_no_sink():
    state = add_sinks(A, jnp.full(2, -jnp.inf))
    np.testing.assert_array_equal(state.out, A.out)
    np.testing.assert_array_equal(state.lse, A.lse)


@pytest.mark.parametrize("pair", [(-jnp.inf, -jnp.inf), (-jnp.inf, 2.0), (2.0, -jnp.inf), (3.0, 3.0), (80.0, -80.0)])
def test_log_add_exp_and_exp_minus_have_finite_values_and_gradients(pair):
    a, b = (jnp.float32(x) for x in pair)
    assert float(log_add_exp(a, b)) == pytest.approx(float(np.logaddexp(*map(float, pair))), rel=1e-6)
    gradients = jax.grad(lambda a, b: jnp.exp(log_add_exp(a, b) - 80), argnums=(0, 1))(a, b)
    assert all(np.isfinite(float(g)) for g in gradients)
    value, slope = jax.value_and_grad(exp_minus)(a, log_add_exp(a, b))
    want = 0.0 if np.isneginf(pair[0]) else float(np.exp(pair[0] - np.logaddexp(*map(float, pair))))
    assert float(value) == pytest.approx(want, rel=1e-5) and np.isfinite(float(slope))
