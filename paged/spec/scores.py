"""Score operations: elementwise changes of scores, after the scaled product and before the mask."""

import abc
import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from .functions import function_name, require_elementwise, require_hashable_function
from .given import Term, Value, require_value
from .numbers import LARGEST_FLOAT32, SMALLEST_FLOAT32, Real, as_float


class ScoreOp(Term, abc.ABC):
    """An elementwise operation on float32 scores. It is hashable, holds no arrays, and means the same on every target.

    A new score operation is a frozen dataclass with `__call__`. Every target then evaluates it, as long as it uses
    elementwise arithmetic only. A spec lists its operations in ``scores``, and they run in that order.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Halve(ScoreOp):
    ...     def __call__(self, s, p, j, h):
    ...         return s / 2
    >>> spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=8, scores=(Halve(),))
    """

    # Whether the operation may close over arrays. Lowerings carry such arrays to where the operation is evaluated.
    is_opaque: bool = True

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "is_opaque" not in vars(cls):  # A subclass of a built-in operation may compute anything.
            cls.is_opaque = True

    @abc.abstractmethod
    def __call__(self, s: Any, p: Any, j: Any, h: Any) -> Any:
        """The changed scores.

        **Arguments:**

        - `s`: float32 scores, any shape.
        - `p`, `j`, `h`: query positions, key positions and query heads: integer arrays that broadcast against ``s``.

        **Returns:** float32 scores in the shape of ``s``.
        """

    def bind(self, num_q_heads: int) -> "ScoreOp":
        """This operation for a spec of so many query heads, with every default that depends on their number filled in.

        **Raises:** ``ValueError`` where the operation is made for another number of heads.
        """
        del num_q_heads
        return self


@dataclasses.dataclass(frozen=True)
class SoftCap(ScoreOp):
    """``s = cap * tanh(s / cap)``: scores stay between ``-cap`` and ``cap`` (Gemma 2, arXiv:2408.00118, section 2).

    The mask comes after it. A cap after the mask would turn ``-inf`` into ``-cap`` and show hidden keys.

    **Arguments:**

    - `cap`: the bound, positive and finite. Or a `Value` of dtype "float32" that the batch brings.

    **Raises:** ``ValueError`` for any other ``cap``.

    >>> SoftCap(5.0)(jnp.array([0.0, 1e6]), 0, 0, 0).tolist()
    [0.0, 5.0]
    """

    is_opaque = False
    least: ClassVar = {"cap": SMALLEST_FLOAT32}

    cap: Real | Value  # a float, or a value, after construction

    def __post_init__(self):
        if isinstance(self.cap, Value):
            require_value("SoftCap", "cap", self.cap, "float32")
            return
        is_number = isinstance(self.cap, numbers.Real) and not isinstance(self.cap, bool)
        if is_number and not SMALLEST_FLOAT32 <= self.cap <= LARGEST_FLOAT32:
            raise ValueError(
                f"SoftCap({self.cap}) is not a bound: scores are held in (-cap, cap), so cap must be positive and "
                "finite, also in float32. For no cap, leave it out (soft_cap=None)."
            )
        object.__setattr__(self, "cap", as_float("SoftCap's cap (soft_cap)", self.cap))

    def __call__(self, s, p, j, h):
        cap: Any = self.cap if isinstance(self.cap, float) else jnp.asarray(self.cap, s.dtype)
        return cap * jnp.tanh(s / cap)

    def __str__(self):
        return f"{self.cap:g} * tanh(s / {self.cap:g})"


@dataclasses.dataclass(frozen=True)
class ALiBi(ScoreOp):
    """``s = s + slope[h] * (j - p)``: a penalty that grows with distance (Press et al., arXiv:2108.12409).

    **Arguments:**

    - `slopes`: one float per query head. By default the paper's geometric sequence for the spec's number of query
      heads, see `alibi_slopes`; `bind` fills it in. Or a `Value` of dtype "float32" with a size, one for each head.

    **Raises:** ``TypeError`` for slopes that are no list of numbers, ``ValueError`` for slopes that are not finite in
    float32, where a spec has another number of query heads, and when called before it is bound.

    >>> ALiBi().bind(4).slopes
    (0.25, 0.0625, 0.015625, 0.00390625)
    """

    is_opaque = False

    slopes: Any = None  # a tuple of floats after construction, or a value, or None

    def __post_init__(self):
        if isinstance(self.slopes, Value):
            require_value("ALiBi", "slopes", self.slopes, "float32", has_size=True)
        elif self.slopes is not None:
            object.__setattr__(self, "slopes", _as_slopes(self.slopes))

    def bind(self, num_q_heads: int) -> "ALiBi":
        slopes = alibi_slopes(num_q_heads) if self.slopes is None else self.slopes
        count = slopes.size if isinstance(slopes, Value) else len(slopes)
        if count != num_q_heads:
            raise ValueError(f"ALiBi needs one slope per query head: the spec has {num_q_heads}, got {count}.")
        return ALiBi(slopes)

    def __call__(self, s, p, j, h):
        if self.slopes is None:
            raise ValueError("ALiBi() has no slopes before it is bound: call `ALiBi().bind(num_q_heads)` first.")
        if all(isinstance(slope, float) for slope in self.slopes):
            slope = jnp.asarray(self.slopes, s.dtype)[h]
        else:  # a batch's numbers: kernels have no rule for a gather from these
            slope = jnp.zeros((), s.dtype)
            for head, own in enumerate(self.slopes):
                slope = jnp.where(h == head, jnp.asarray(own, s.dtype), slope)
        return s + slope * jnp.asarray(j - p, s.dtype)

    def __str__(self):
        return "s + slope[h] * (j - p)"


@dataclasses.dataclass(frozen=True)
class Bias(ScoreOp):
    """``s = s + fn(p, j, h)``: a user's own bias.

    A bias of ``-inf`` hides a key, as a mask does, but no page is skipped for it: prefer a mask.

    **Arguments:**

    - `fn`: ``fn(p, j, h) -> float``. It receives integer arrays that broadcast against each other, works on them
      elementwise, and returns a float array. It may close over arrays, and gradients flow to them: inside a loss,
      ``Bias(lambda p, j, h: table[h, bucket(p - j)])`` trains ``table``. Two biases are equal when they have the same
      function object, so keep that object, as for `Where`.
    - `values`: what the batch brings for the function, each a `Value`: one argument more for each, after ``h``. One
      with a size arrives as a tuple. No gradient flows to them.

    **Raises:** ``TypeError`` unless ``fn`` is a callable with a hash, and where its result is no real number;
    ``ValueError`` where its result does not broadcast to the scores' shape.

    >>> first = Bias(lambda p, j, h: jnp.where(j == 0, 0.5, 0.0))
    >>> first(jnp.zeros(2), 3, jnp.arange(2), 0).tolist()
    [0.5, 0.0]
    """

    fn: Callable[..., Any]
    values: tuple[Value, ...] = ()

    def __post_init__(self):
        require_hashable_function("Bias", self.fn, "fn(p, j, h) -> float")
        if not isinstance(self.values, tuple) or not all(isinstance(value, Value) for value in self.values):
            raise TypeError(f'Bias needs values as a tuple, such as (Value("slope"),); got {self.values!r}.')

    def __call__(self, s, p, j, h):
        bias = jnp.asarray(self.fn(p, j, h, *self.values))
        if not (jnp.issubdtype(bias.dtype, jnp.floating) or jnp.issubdtype(bias.dtype, jnp.integer)):
            raise TypeError(
                f"Bias needs fn(p, j, h) to return real numbers; {self} returned {bias.dtype}. A predicate is a mask: "
                "paged.Where(fn)."
            )
        require_elementwise("Bias", self, bias.shape, jnp.shape(s))
        return s + bias.astype(s.dtype)

    def __str__(self):
        names = ["p", "j", "h", *map(str, self.values)]
        return f"s + {function_name(self.fn)}({', '.join(names)})"


def _as_slopes(slopes: Any) -> tuple[float, ...]:
    """A row of finite numbers, such as a tuple, a list or an array."""
    if isinstance(slopes, jax.core.Tracer):
        raise TypeError(
            "ALiBi's slopes must be numbers that are known when the spec is built; got a traced array. For traced "
            "slopes: Bias(lambda p, j, h: slopes[h] * (j - p))."
        )
    if isinstance(slopes, jax.Array | np.ndarray) and slopes.ndim == 1:
        slopes = slopes.tolist()
    if not isinstance(slopes, tuple | list):
        raise TypeError(f"ALiBi's slopes must be one number per query head, such as (0.5, 0.25); got {slopes!r}.")
    return tuple(as_float("Each of ALiBi's slopes", slope) for slope in slopes)


def alibi_slopes(num_q_heads: int) -> tuple[float, ...]:
    """The ALiBi paper's slopes for a number of query heads.

    For a power of two ``n`` they are ``2 ** (-8 * (h + 1) / n)``. For any other number they are the slopes of the power
    of two below, then every other slope of the power of two above, as in the authors' code.

    >>> alibi_slopes(3)
    (0.0625, 0.00390625, 0.25)
    """
    power = 2 ** int(math.log2(num_q_heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    between = [2.0 ** (-4.0 * (h + 1) / power) for h in range(0, 2 * power, 2)]
    return tuple(slopes + between[: num_q_heads - power])
