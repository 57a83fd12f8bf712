"""`check_score_op`: what a score operation must promise, so that every lowering may evaluate it in its own tiles."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paged.spec import Given, ScoreOp

from .failures import CheckFailure, require
from .positions import Region, regions_about
from .variants import least_of, numbers_for

_HEADS = 6  # no power of two, so that rules for other numbers of heads are tried
# Two programs of one formula differ by the order and the fusion of a few float32 operations.
_ROUNDINGS = 64 * 2.0**-24


def check_score_op(op: ScoreOp, *, num_q_heads: int = _HEADS, formula: Callable[..., float] | None = None) -> None:
    """Check every promise of a score operation, on small, large and negative positions and scores.

    **Arguments:**

    - `op`: a score operation. One that names a `Value` is tried with a few numbers, static and traced.
    - `num_q_heads`: query heads of the spec that it is bound to.
    - `formula`: what the operation means: ``formula(s, p, j, h)`` of Python numbers is the new score. For an operation
      that names values it is ``formula(s, p, j, h, given)``, with a `Given`. With None the promises alone are checked,
      which an operation may keep and mean something else.

    **Raises:** `CheckFailure` with a counterexample, of the first of `SCORE_CHECKS` that fails, or of the check
    ``"formula"``.

    >>> check_score_op(SoftCap(30.0), formula=lambda s, p, j, h: 30 * np.tanh(s / 30))
    """
    for check in SCORE_CHECKS.values():
        check(op, num_q_heads)
    if formula is not None:
        check_formula(op, num_q_heads, formula)


def check_op_hashable(op: ScoreOp, num_q_heads: int) -> None:
    """An operation has a hash and equals its copy, and binding it twice is binding it once."""
    try:
        hash(op)
    except TypeError as error:
        raise CheckFailure(
            "hashable", f"{op!r} has no hash ({error}). Make it a frozen dataclass whose fields are hashable."
        ) from error
    again = copy.copy(op)
    require(
        again == op and hash(again) == hash(op), "hashable",
        f"{op!r} does not equal its copy, so every new object would be compiled again. Make it a frozen dataclass.",
    )  # fmt: skip
    bound = op.bind(num_q_heads)
    require(
        bound == op.bind(num_q_heads) == bound.bind(num_q_heads), "bind",
        f"{op!r}.bind({num_q_heads}) gives {bound!r}, and binding that gives {bound.bind(num_q_heads)!r}: they must be "
        "equal, since a spec binds what it is given, bound or not.",
    )  # fmt: skip


def check_op_values(op: ScoreOp, num_q_heads: int) -> None:
    """Results are float32 of the scores' shape, elementwise, never NaN, and the same under ``jax.jit``.

    Numbers of a batch are traced under ``jax.jit``, and static outside of it.
    """
    bound = op.bind(num_q_heads)
    run = jax.jit(lambda numbers, s, p, j, h: _with(bound, numbers)(s, p, j, h))
    for numbers in numbers_for(bound):
        own, named = _with(bound, numbers), _named(op, numbers)
        for region in regions_about((op, *numbers.values())):
            arguments = _arguments(region, num_q_heads)
            whole = jax.eval_shape(own, *arguments)
            require(
                whole.shape == arguments[0].shape and whole.dtype == jnp.float32, "values",
                f"{named} of float32 scores {arguments[0].shape} returns {whole.dtype} {whole.shape}: it must return "
                "float32 in the shape of the scores. Cast positions with `.astype(s.dtype)`.",
            )  # fmt: skip
            values = np.asarray(run(numbers, *arguments))
            _require_no_nan(named, region, values)
            outside = np.asarray(own(*map(jnp.asarray, arguments)))
            _require_close(named, region, "under jax.jit and outside of it", values, outside)
            s, p, j, _ = arguments
            for head in (0, num_q_heads - 1):
                with np.errstate(over="ignore"):  # NumPy warns where a score over the least cap is infinite
                    alone = own(s[head, 2:5, 3:5], p[0, 2:5], j[0, :, 3:5], jnp.int32(head))
                _require_close(named, region, "in a tile and alone", values[head, 2:5, 3:5], np.asarray(alone))
    _check_least(op, bound, num_q_heads)


def _check_least(op: ScoreOp, bound: ScoreOp, num_q_heads: int) -> None:
    """Numbers below the least of each value give what the least gives."""
    least = least_of(bound)
    if least:
        at_least = {**numbers_for(bound)[0], **least}
        below = {name: number - 3 if name in least else number for name, number in at_least.items()}
        region = regions_about(op)[0]
        arguments = [jnp.asarray(x) for x in _arguments(region, num_q_heads)]
        want, got = (np.asarray(_with(bound, numbers)(*arguments)) for numbers in (at_least, below))
        _require_close(str(op), region, f"for {below} and for {at_least}, the least", want, got)


def _with(op: ScoreOp, numbers: Any) -> Any:
    return op.given(Given(numbers))


def _named(op: ScoreOp, numbers: dict[str, Any]) -> str:
    """An operation and its numbers, for an error."""
    said = ", ".join(f"{name}={number}" for name, number in numbers.items())
    return f"{op}, where {said}," if said else str(op)


def check_op_gradient(op: ScoreOp, num_q_heads: int) -> None:
    """The gradient by the scores is finite, and each score's is its own: the operation mixes no scores."""
    bound = op.bind(num_q_heads)
    slope = jax.jit(jax.grad(lambda s, numbers, *at: jnp.sum(_finite(_with(bound, numbers)(s, *at)))))
    for numbers, region in itertools.product(numbers_for(bound), regions_about(op)[:4]):
        s, p, j, h = _arguments(region, num_q_heads)
        gradient = np.asarray(slope(s, numbers, p, j, h))
        if not np.isfinite(gradient).all():
            head, row, key = (int(x) for x in np.argwhere(~np.isfinite(gradient))[0])
            raise CheckFailure(
                "gradient",
                f"the gradient of {_named(op, numbers)} is {gradient[head, row, key]} at s={s[head, row, key]}, "
                f"p={int(p[0, row, 0])}, j={int(j[0, 0, key])}, h={head}. A `jnp.where` whose other side overflows or "
                "divides by 0 has such a gradient: make the argument safe inside of it.",
            )


def check_formula(op: ScoreOp, num_q_heads: int, formula: Callable[..., float]) -> None:
    """The operation has the formula's value, at a sample of scores and pairs, up to some roundings of float32."""
    bound = op.bind(num_q_heads)
    for numbers, region in itertools.product(numbers_for(bound), regions_about(op)[:4]):
        s, p, j, h = _arguments(region, num_q_heads)
        got = np.asarray(_with(bound, numbers)(*map(jnp.asarray, (s, p, j, h))))
        given = (Given(numbers),) if numbers else ()
        for head, row, key in np.ndindex(*s.shape):
            if (row + key) % 5 and (row, key) != (1, 0):
                continue
            at = float(s[head, row, key]), int(p[0, row, 0]), int(j[0, 0, key]), head
            want, value = formula(*at, *given), float(got[head, row, key])
            if abs(value - want) > _ROUNDINGS * max(1.0, abs(want), abs(at[0])):
                raise CheckFailure(
                    "formula",
                    f"{_named(op, numbers)} at s={at[0]:.6g}, p={at[1]}, j={at[2]}, h={head} is {value:.6g}, and the "
                    f"formula says {want:.6g}.",
                )


SCORE_CHECKS: dict[str, Callable[[ScoreOp, int], None]] = {
    "hashable": check_op_hashable,
    "values": check_op_values,
    "gradient": check_op_gradient,
}
"""What `check_score_op` checks, by name: functions of a score operation and the number of query heads."""


def _arguments(region: Region, num_q_heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scores [heads, queries, keys], some of them 0, tiny and huge; and positions and heads that broadcast."""
    p, j = region.p[None], region.j[None]
    h = np.arange(num_q_heads, dtype=np.int32)[:, None, None]
    s = 20 * np.random.default_rng(0).normal(size=(num_q_heads, p.shape[1], j.shape[2])).astype(np.float32)
    s[0, :4, 0] = (0.0, 1e-30, 3e4, -3e4)
    return s, p, j, h


def _finite(x: jax.Array) -> jax.Array:
    """A bias of -inf hides a key, and then has no gradient."""
    return jnp.where(jnp.isneginf(x), 0.0, x)


def _require_no_nan(op: str, region: Region, values: np.ndarray) -> None:
    wrong = np.argwhere(np.isnan(values) | np.isposinf(values))
    if len(wrong):
        head, row, key = (int(x) for x in wrong[0])
        raise CheckFailure(
            "values",
            f"{op} is {values[head, row, key]} at p={region.p0 + row}, j={region.j0 + key}, h={head}, for a "
            "finite score. Scores must stay finite; -inf alone is allowed, and hides the key.",
        )


def _require_close(op: str, region: Region, where: str, want: np.ndarray, got: np.ndarray) -> None:
    allowed = _ROUNDINGS * np.maximum(1.0, np.abs(np.where(np.isfinite(want), want, 0.0)))
    is_equal = (want == got) | (np.abs(np.where(np.isfinite(want), want - got, np.inf)) <= allowed)
    if want.shape != got.shape or not is_equal.all():
        raise CheckFailure(
            "values",
            f"{op} differs {where}, about p={region.p0}, j={region.j0}. An operation is elementwise: its "
            "value depends on one score, one pair of positions and one head.",
        )
