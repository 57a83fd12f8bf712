"""Comparison with the reference in float64: the tolerances, each with its reason, and what must hold exactly."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paged.spec import AttentionState, reference_state, sinks_per_head

from .arrays import Built

UNIT = 2.0**-24  # one rounding of float32


class Tolerance(NamedTuple):
    """``|got - want| <= max(roundings, 1.5 * condition) * UNIT * max|v| + output * |want| + tiny``.

    The output is a convex mean of the values that a row sees, so its error is measured against the largest of them,
    ``max|v|``: a row whose values cancel cannot do better. 32 roundings of float32, 1.9e-6, cover the products, the
    exponentials and the sums. A score is itself a sum, of products of size ``condition = scale * sum_d |q_d k_d|``,
    and no order of summation is better than some roundings of that; it enters the output through the exponential. At
    head_dim 8 and inputs of 3 x normal the condition is about 20; at 256 it is about 100. Measured errors of the XLA
    lowering reach 0.65 of what is allowed, at head dims from 8 to 256 alike; without the condition they grow with it.
    """

    roundings: float
    output: float
    tiny: float = 0.0


TOLERANCES = {
    # See above; the result is not rounded again.
    "float32": Tolerance(32, 0.0),
    # The same float32 arithmetic, then one rounding to 8 significant bits.
    "bfloat16": Tolerance(32, 2.0**-8),
    # The same float32 arithmetic, then one rounding to 11 significant bits, or to a multiple of 2**-24 under 2**-14.
    "float16": Tolerance(32, 2.0**-11, 2.0**-25),
}
"""How far an output may be from the reference, by its dtype. Softmax and sums are float32 for all of them."""

# The log-sum-exp has the error of its largest score, absolute, in roundings of the condition: of the sum of products
# (which at head_dim 256 is some roundings by itself), of the maximum that is added back, and of the reference's own.
# Measured: up to 3.6, at head dims from 8 to 256 alike. A score operation may add more than the products are, and
# then it is the sum whose roundings count, so that the log-sum-exp's own size is the least that is allowed for.
# Measured, a bias with products of size 12: a log-sum-exp above 32 was off by one unit of its last place, 3.8e-6, where
# roundings of the products alone would allow 3.4e-6.
LSE_ROUNDINGS = 5

# Kernels round the weights of a softmax to bfloat16 where queries and stored pages are that narrow, since the matrix
# unit multiplies nothing wider at full speed. Each weight is then off by at most half a unit of its 8 significant bits,
# 2**-8 of itself, and so their weighted mean by at most 2**-8 of the largest value that the row sees. The sum of
# weights, and with it the log-sum-exp, is of the weights before rounding.
ROUNDED_WEIGHTS = 2.0**-8
"""What more is allowed where a kernel rounds the weights of a softmax to bfloat16: this part of the largest value."""

_reference = jax.jit(reference_state, static_argnums=0)


@functools.lru_cache(maxsize=4)
def exact_state(built: Built) -> AttentionState:
    """The reference's state in float64 (``lse`` in float32), as NumPy arrays."""
    with jax.enable_x64(True):
        q = jnp.asarray(np.asarray(built.q, np.float64))
        state = _reference(built.case.spec, q, built.pages, built.batch, built.sinks)
    return AttentionState(*(np.asarray(x) for x in state))  # pyright: ignore


def assert_state_close(got: AttentionState, built: Built, weights: float = 0.0) -> None:
    """Assert that a state is the reference's within its dtype's tolerance, and exact where nothing is seen.

    Rows of no sequence must be ``(0, -inf)``. Rows that see no key must be 0, with the sinks' log-sum-exp or ``-inf``.

    **Arguments:**

    - `got`: the state of a lowering.
    - `built`: the arrays that it was computed from, by `build`.
    - `weights`: the relative error of softmax weights that the lowering rounds: 0, or `ROUNDED_WEIGHTS`.

    **Raises:** ``AssertionError`` with the place of the largest error, and with what was allowed there.

    >>> built = build(Case(spec=AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)))
    >>> attend = paged.lower(built.case.spec, built.case.layout, "xla")
    >>> assert_state_close(attend.state(built.q, built.pages, built.batch), built)
    """
    want, case = exact_state(built), built.case
    assert got.out.dtype == built.q.dtype and got.lse.dtype == np.float32
    assert got.out.shape == want.out.shape and got.lse.shape == want.lse.shape
    assert_states_close(got, want, built.error_unit, str(built.q.dtype), weights)
    sinks = np.full(case.spec.num_q_heads, -np.inf)
    if built.sinks is not None:
        sinks = np.asarray(sinks_per_head(case.spec, built.sinks))
    out, lse = np.asarray(got.out, np.float64), np.asarray(got.lse)
    for row, (seen, by_head) in enumerate(zip(built.visible, built.by_head, strict=True)):
        if seen is None:
            assert not out[row].any() and np.isneginf(lse[row]).all(), f"padding row {row} is not (0, -inf)"
            continue
        empty = ~np.broadcast_to(by_head, (len(sinks), len(seen))).any(axis=1)  # pyright: ignore
        assert not out[row][empty].any(), f"empty row {row} is not 0"
        np.testing.assert_array_equal(lse[row][empty], sinks[empty], f"lse of empty row {row}")


def assert_output(got: Any, built: Built, weights: float = 0.0) -> None:
    """`assert_state_close` for an output without a log-sum-exp."""
    exact = exact_state(built)
    is_seen = np.array([seen is not None and len(seen) > 0 for seen in built.visible])[:, None]
    lse = np.where(is_seen, np.asarray(exact.lse), -np.inf).astype(np.float32)
    if built.sinks is not None:
        lse = np.asarray(exact.lse)
    assert_state_close(AttentionState(got, lse), built, weights)  # pyright: ignore


def assert_states_close(
    got: AttentionState, want: AttentionState, error_unit: np.ndarray, dtype: str, weights: float = 0.0
) -> None:
    """Two states agree within the dtype's tolerance; an infinite lse must be infinite in both.

    ``weights`` is the relative error of softmax weights that were rounded: 0, or `ROUNDED_WEIGHTS` for kernels.
    """
    tolerance = TOLERANCES[dtype]
    condition, largest_value = error_unit[:, 0], error_unit[:, 1]
    relative = UNIT * np.maximum(tolerance.roundings, 1.5 * condition) + weights
    out, exact = np.asarray(got.out, np.float64), np.asarray(want.out, np.float64)
    assert np.isfinite(out).all(), f"not finite at {np.argwhere(~np.isfinite(out))[:4].tolist()}"
    allowed = (relative * largest_value)[..., None] + tolerance.output * np.abs(exact) + tolerance.tiny
    _assert_within(np.abs(out - exact), allowed, "out")
    lse, exact = np.asarray(got.lse, np.float64), np.asarray(want.lse, np.float64)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(exact), "rows that are empty")
    finite = ~np.isneginf(exact)
    size = np.maximum(8.0, np.maximum(condition[finite], np.abs(exact[finite])))
    allowed = LSE_ROUNDINGS * UNIT * size
    _assert_within(np.abs(lse[finite] - exact[finite]), allowed, "lse")


def _assert_within(error: np.ndarray, allowed: np.ndarray, name: str) -> None:
    assert not np.isnan(error).any(), f"{name} has NaN"
    if error.size:
        worst = np.unravel_index(np.argmax(error / allowed), error.shape)
        where = [int(i) for i in worst]
        assert (error <= allowed).all(), f"{name}{where}: error {error[worst]:.3g}, allowed {allowed[worst]:.3g}"


def assert_bitwise(a: Iterable[Any], b: Iterable[Any], rows: Any = slice(None)) -> None:
    """Float32 arrays of both, in these rows, are equal to the bit, NaN and the sign of 0 too."""
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(np.asarray(x)[rows].view(np.uint32), np.asarray(y)[rows].view(np.uint32))
