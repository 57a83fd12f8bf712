"""Rotary scalings: how a model trained on short contexts turns its frequencies for longer ones."""

import abc
import dataclasses
import math
from typing import Any

import numpy as np


class RotaryScaling(abc.ABC):
    """A change of the rotary frequencies, decided when traced: a frozen dataclass, hashable, in float64 numpy.

    A new one has `frequencies`, and `magnitude` where it also scales the rotated vectors.
    """

    @abc.abstractmethod
    def frequencies(self, theta: float, rotary_dim: int) -> np.ndarray:
        """float64[rotary_dim // 2]: radians a position, fastest first."""

    @property
    def magnitude(self) -> float:
        """What the rotated queries and keys are multiplied by, 1 for most."""
        return 1.0


def plain_frequencies(theta: float, rotary_dim: int) -> np.ndarray:
    """float64[rotary_dim // 2]: ``theta ** (-2 i / rotary_dim)`` (RoFormer, arXiv:2104.09864, section 3.2.2).

    >>> plain_frequencies(10000.0, 4).tolist()
    [1.0, 0.01]
    """
    return theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)


@dataclasses.dataclass(frozen=True)
class LinearScaling(RotaryScaling):
    """Position interpolation: every position divided by ``factor`` (Chen et al., arXiv:2306.15595).

    >>> LinearScaling(4.0).frequencies(10000.0, 4).tolist()
    [0.25, 0.0025]
    """

    factor: float

    def __post_init__(self):
        _require_at_least_one(self, "factor")

    def frequencies(self, theta, rotary_dim):
        return plain_frequencies(theta, rotary_dim) / self.factor


@dataclasses.dataclass(frozen=True)
class NtkScaling(RotaryScaling):
    """NTK-aware scaling: a larger base, ``theta * factor ** (d / (d - 2))``, that divides the slowest frequency by
    ``factor`` and leaves the fastest (arXiv:2309.00071, section 3.1).

    "Dynamic" NTK recomputes the factor from the length at hand. Keys in a cache are already rotated, so a base that
    changes while a sequence grows would make them disagree: choose the length once, with `at_length`.
    """

    factor: float

    def __post_init__(self):
        _require_at_least_one(self, "factor")

    @classmethod
    def at_length(cls, factor: float, length: int, original_context: int) -> "NtkScaling":
        """The dynamic rule at one length: ``factor * length / original_context - (factor - 1)``, and 1 within it.

        >>> NtkScaling.at_length(2.0, length=8192, original_context=4096)
        NtkScaling(factor=3.0)
        """
        return cls(max(1.0, factor * length / original_context - (factor - 1)))

    def frequencies(self, theta, rotary_dim):
        if rotary_dim == 2:
            return plain_frequencies(theta, rotary_dim)  # one frequency, the fastest, which stays
        return plain_frequencies(theta * self.factor ** (rotary_dim / (rotary_dim - 2)), rotary_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RotaryScaling):
    """Llama 3.1's rule: long wavelengths are slowed by ``factor``, short ones kept, those between blended.

    A wavelength is long above ``original_context / low_freq_factor`` tokens and short below
    ``original_context / high_freq_factor``. Defaults are those of the released Llama 3.1 models
    (Meta's reference code).
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self):
        _require_at_least_one(self, "factor")
        _require_positive(self, "original_context")
        _require_positive(self, "low_freq_factor")
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                "high_freq_factor must be greater than low_freq_factor, so that there is a band to blend in; got "
                f"{self.high_freq_factor} and {self.low_freq_factor}."
            )

    def frequencies(self, theta, rotary_dim):
        plain = plain_frequencies(theta, rotary_dim)
        turns = self.original_context * plain / (2 * math.pi)  # of each pair, over the original context
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return (1 - kept) * plain / self.factor + kept * plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling(RotaryScaling):
    """YaRN: interpolate the pairs that turn fewer than ``beta_slow`` times in the original context, keep those that
    turn more than ``beta_fast`` times, and blend linearly in the pair's number (Peng et al., arXiv:2309.00071,
    section 3.2).

    The band's ends are pair numbers, rounded outward where ``is_rounded`` (the authors' code; gpt-oss does not round).
    ``attention_factor`` multiplies rotated queries and keys each, so scores by its square; left out, it is the
    paper's ``0.1 ln(factor) + 1`` (section 3.4).

    >>> round(YarnScaling(factor=32.0, original_context=4096).magnitude, 4)
    1.3466
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    is_rounded: bool = True

    def __post_init__(self):
        _require_at_least_one(self, "factor")
        _require_positive(self, "original_context")
        _require_positive(self, "beta_slow")
        if not self.beta_fast > self.beta_slow:
            raise ValueError(
                "beta_fast must be greater than beta_slow: pairs that turn more often than beta_fast are kept, less "
                f"often than beta_slow interpolated; got {self.beta_fast} and {self.beta_slow}."
            )
        if self.attention_factor is not None:
            _require_positive(self, "attention_factor")

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0

    def frequencies(self, theta, rotary_dim):
        plain = plain_frequencies(theta, rotary_dim)
        low, high = (self._pair_that_turns(n, theta, rotary_dim) for n in (self.beta_fast, self.beta_slow))
        if self.is_rounded:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        width = high - low if high > low else 0.001  # a band without width is a step
        slowed = np.clip((np.arange(rotary_dim // 2) - low) / width, 0, 1)
        return slowed * plain / self.factor + (1 - slowed) * plain

    def _pair_that_turns(self, turns: float, theta: float, rotary_dim: int) -> float:
        """The (fractional) number of the pair that turns this often in the original context."""
        return rotary_dim * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))


def _require_positive(scaling: Any, name: str) -> None:
    value = getattr(scaling, name)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{type(scaling).__name__}.{name} must be positive and finite; got {value}.")


def _require_at_least_one(scaling: Any, name: str) -> None:
    value = getattr(scaling, name)
    if not (value >= 1 and math.isfinite(value)):
        raise ValueError(
            f"{type(scaling).__name__}.{name} must be at least 1 and finite: it is how many times longer the context "
            f"becomes; got {value}. For no scaling, leave it out (scaling=None)."
        )
