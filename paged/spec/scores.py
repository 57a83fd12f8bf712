"""Score operations: what happens to a score between the scaled product and the mask, in the order listed."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from .functions import function_name, require_hashable_function


class ScoreOp(abc.ABC):
    """An elementwise map of float32 scores; hashable, without arrays, and the same on every target.

    A new one is a frozen dataclass with ``__call__``. Positions and heads are integer arrays that broadcast
    against the scores.
    """

    # Whether the operation may close over arrays, which lowerings then carry for it. A built-in one says that it does
    # not.
    is_opaque: bool = True

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "is_opaque" not in vars(cls):  # a subclass of a built-in operation may compute anything
            cls.is_opaque = True

    @abc.abstractmethod
    def __call__(self, s: Any, p: Any, j: Any, h: Any) -> Any:
        """New scores from scores ``s``, query positions ``p``, key positions ``j`` and query heads ``h``."""

    def bind(self, num_q_heads: int) -> "ScoreOp":
        """The same operation with everything that depends on the number of query heads made explicit."""
        del num_q_heads
        return self


@dataclasses.dataclass(frozen=True)
class SoftCap(ScoreOp):
    """``s = cap * tanh(s / cap)``: scores bounded by ``cap`` (Gemma 2, arXiv:2408.00118, section 2).

    It comes before the mask: capping a masked score would turn ``-inf`` into ``-cap`` and leak hidden keys.
    """

    is_opaque = False

    cap: float

    def __post_init__(self):
        if not self.cap > 0 or math.isinf(self.cap):
            raise ValueError(
                f"SoftCap({self.cap}) is not a bound: scores are held in (-cap, cap), so cap must be positive and "
                "finite. For no cap, leave it out (soft_cap=None)."
            )

    def __call__(self, s, p, j, h):
        return self.cap * jnp.tanh(s / self.cap)

    def __str__(self):
        return f"{self.cap:g} * tanh(s / {self.cap:g})"


@dataclasses.dataclass(frozen=True)
class ALiBi(ScoreOp):
    """``s = s + slope[h] * (j - p)``: linear biases (Press et al., arXiv:2108.12409).

    ``slopes`` is one float a query head; left out, they are the paper's geometric sequence, which for a number of
    heads that is no power of two takes every other slope of the next one (the authors' code).

    >>> ALiBi().bind(4).slopes
    (0.25, 0.0625, 0.015625, 0.00390625)
    """

    is_opaque = False

    slopes: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.slopes is not None:
            object.__setattr__(self, "slopes", tuple(float(slope) for slope in self.slopes))

    def bind(self, num_q_heads: int) -> "ALiBi":
        slopes = alibi_slopes(num_q_heads) if self.slopes is None else self.slopes
        if len(slopes) != num_q_heads:
            raise ValueError(f"ALiBi needs one slope a query head: the spec has {num_q_heads}, got {len(slopes)}.")
        return ALiBi(slopes)

    def __call__(self, s, p, j, h):
        if self.slopes is None:
            raise ValueError("ALiBi() has no slopes before it is bound: call `ALiBi().bind(num_q_heads)` first.")
        return s + jnp.asarray(self.slopes, s.dtype)[h] * (j - p)

    def __str__(self):
        return "s + slope[h] * (j - p)"


@dataclasses.dataclass(frozen=True)
class Bias(ScoreOp):
    """``s = s + fn(p, j, h)``: a user's additive bias, elementwise over arrays that broadcast.

    ``fn`` may close over arrays, and gradients flow to them: inside a loss,
    ``Bias(lambda p, j, h: table[h, bucket(p - j)])`` trains ``table``. Like ``Where``, equal when its function is.
    A bias of ``-inf`` hides a key, as a mask does, but skips no page: prefer a mask.
    """

    fn: Callable[[Any, Any, Any], Any]

    def __post_init__(self):
        require_hashable_function("Bias", self.fn, "fn(p, j, h) -> float")

    def __call__(self, s, p, j, h):
        return s + jnp.asarray(self.fn(p, j, h)).astype(s.dtype)

    def __str__(self):
        return f"s + {function_name(self.fn)}(p, j, h)"


def alibi_slopes(num_q_heads: int) -> tuple[float, ...]:
    """The ALiBi paper's slopes for a number of heads: ``2 ** (-8 (h + 1) / n)`` for a power of two ``n``."""
    power = 2 ** int(math.log2(num_q_heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    between = [2.0 ** (-4.0 * (h + 1) / power) for h in range(0, 2 * power, 2)]
    return tuple(slopes + between[: num_q_heads - power])
