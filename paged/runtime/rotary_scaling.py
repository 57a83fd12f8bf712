"""Rotary scalings: how the rotary frequencies of a model change for contexts longer than those of its training."""

import abc
import dataclasses
import math
import numbers
from typing import Any

import numpy as np

from paged.spec import as_bool


class RotaryScaling(abc.ABC):
    """A change of the rotary frequencies, computed in float64 when traced. A subclass is a frozen dataclass.

    A subclass defines `frequencies`, and `magnitude` if it also scales the rotated vectors.
    """

    @abc.abstractmethod
    def frequencies(self, theta: float, rotary_dim: int) -> np.ndarray:
        """Radians per position of each pair, fastest first.

        **Arguments:**

        - `theta`: the base of the `Rotary`.
        - `rotary_dim`: how many features are turned.

        **Returns:** float64[rotary_dim // 2].
        """

    @property
    def magnitude(self) -> float:
        """The factor of rotated queries and keys; 1 unless a subclass says otherwise."""
        return 1.0


def plain_frequencies(theta: float, rotary_dim: int) -> np.ndarray:
    """Unscaled frequencies float64[rotary_dim // 2]: ``theta ** (-2 i / rotary_dim)`` (arXiv:2104.09864, 3.2.2).

    >>> plain_frequencies(10000.0, 4).tolist()
    [1.0, 0.01]
    """
    return theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)


@dataclasses.dataclass(frozen=True)
class LinearScaling(RotaryScaling):
    """Position interpolation: every position is divided by a factor (Chen et al., arXiv:2306.15595).

    **Arguments:**

    - `factor`: how many times longer contexts become, at least 1.

    Raises ``ValueError`` for a factor below 1.

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
    """NTK-aware scaling: a larger base, ``theta * factor ** (d / (d - 2))`` (arXiv:2309.00071, section 3.1).

    It divides the slowest frequency by ``factor`` and keeps the fastest.

    "Dynamic" NTK computes the factor anew as a sequence grows. A cache holds keys that were rotated with an older base,
    so the base must not change: choose the length once, with `at_length`.

    **Arguments:**

    - `factor`: how many times longer contexts become, at least 1.

    Raises ``ValueError`` for a factor below 1.

    >>> NtkScaling(4.0).frequencies(10000.0, 4).tolist()
    [1.0, 0.0025]
    """

    factor: float

    def __post_init__(self):
        _require_at_least_one(self, "factor")

    @classmethod
    def at_length(cls, factor: float, length: int, original_context: int) -> "NtkScaling":
        """The factor of the dynamic rule for one length: ``factor * length / original_context - (factor - 1)``.

        **Arguments:**

        - `factor`: the factor of the dynamic rule.
        - `length`: the longest context to serve.
        - `original_context`: the context of training. A shorter ``length`` gives the factor 1.

        **Returns:** the scaling.

        >>> NtkScaling.at_length(2.0, length=8192, original_context=4096)
        NtkScaling(factor=3.0)
        """
        return cls(max(1.0, factor * length / original_context - (factor - 1)))

    def frequencies(self, theta, rotary_dim):
        if rotary_dim == 2:
            return plain_frequencies(theta, rotary_dim)  # the only pair is the fastest, which is kept
        return plain_frequencies(theta * self.factor ** (rotary_dim / (rotary_dim - 2)), rotary_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RotaryScaling):
    """Llama 3.1's rule: pairs of long wavelengths are slowed by a factor, short ones are kept, others are blended.

    The defaults are those of the released Llama 3.1 models, and so is the rule (Meta's reference code).

    **Arguments:**

    - `factor`: how many times longer contexts become, at least 1.
    - `low_freq_factor`: wavelengths above ``original_context / low_freq_factor`` tokens are long.
    - `high_freq_factor`: wavelengths below ``original_context / high_freq_factor`` tokens are short.
    - `original_context`: the context of training, in tokens.

    Raises ``ValueError`` unless all are positive and finite, and ``high_freq_factor`` is the greater one.

    >>> scaled = Llama3Scaling(factor=8.0, original_context=8192).frequencies(500000.0, 128)
    >>> plain = Rotary(128, theta=500000.0).frequencies
    >>> bool(scaled[0] == plain[0]), bool(np.isclose(scaled[-1], plain[-1] / 8))
    (True, True)
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self):
        _require_at_least_one(self, "factor")
        _require_positive(self, "original_context")
        _require_positive(self, "low_freq_factor")
        _require_positive(self, "high_freq_factor")
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
    """YaRN: pairs that turn often are kept, pairs that turn rarely are slowed by a factor, others are blended linearly
    in the pair's number (Peng et al., arXiv:2309.00071, section 3.2).

    **Arguments:**

    - `factor`: how many times longer contexts become, at least 1.
    - `original_context`: the context of training, in tokens.
    - `beta_fast`: pairs that turn more than this often in the original context are kept.
    - `beta_slow`: pairs that turn less than this often are slowed by ``factor``.
    - `attention_factor`: multiplies rotated queries and rotated keys, so that scores grow by its square. None: computed
      from ``mscale`` and ``mscale_all_dim``, or without them the paper's ``0.1 ln(factor) + 1`` (section 3.4).
    - `is_rounded`: whether the blended band begins and ends at whole pair numbers, rounded outward: ``truncate`` in
      Hugging Face's configurations. True in the authors' code, False in gpt-oss.
    - `mscale`, `mscale_all_dim`: weights of the logarithm, as DeepSeek's released code has them (arXiv:2405.04434,
      section 3.1.4, has 0.707). Rotated queries and keys are multiplied by ``0.1 mscale ln(factor) + 1`` over
      ``0.1 mscale_all_dim ln(factor) + 1``. DeepSeek's models also multiply all scores by `score_factor`. Other models
      that have these keys do not.

    The names are those of ``rope_scaling`` in Hugging Face's configurations, where ``original_context`` is
    ``original_max_position_embeddings``. A 0 for ``mscale`` or ``mscale_all_dim`` is a key left out there.

    Raises ``ValueError`` unless numbers are positive and finite, and ``beta_fast`` is greater than ``beta_slow``; for
    one of ``mscale`` and ``mscale_all_dim`` without the other, and for both beside ``attention_factor``.

    >>> round(YarnScaling(factor=32.0, original_context=4096).magnitude, 4)
    1.3466
    >>> deepseek = YarnScaling(factor=40.0, original_context=4096, mscale=1.0, mscale_all_dim=1.0)
    >>> deepseek.magnitude, round(deepseek.score_factor, 4)
    (1.0, 1.8739)
    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=4, head_dim=192, scale=192**-0.5 * deepseek.score_factor)
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    is_rounded: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self):
        _require_at_least_one(self, "factor")
        _require_positive(self, "original_context")
        _require_positive(self, "beta_slow")
        _require_positive(self, "beta_fast")
        as_bool("YarnScaling.is_rounded", self.is_rounded)
        self._require_one_magnitude()
        if not self.beta_fast > self.beta_slow:
            raise ValueError(
                "beta_fast must be greater than beta_slow: pairs that turn more often than beta_fast are kept, less "
                f"often than beta_slow interpolated; got {self.beta_fast} and {self.beta_slow}."
            )

    def _require_one_magnitude(self) -> None:
        given = [n for n in ("attention_factor", "mscale", "mscale_all_dim") if getattr(self, n) is not None]
        for name in given:
            _require_positive(self, name)
        if given not in ([], ["attention_factor"], ["mscale", "mscale_all_dim"]):
            raise ValueError(
                "YarnScaling needs mscale and mscale_all_dim together, or attention_factor alone, or none of them, "
                f"because released code disagrees about the rest; got {', '.join(given)}. A 0 in a configuration "
                "stands for a key left out. To set the factor of rotated queries and keys, pass attention_factor alone."
            )

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return self._weighted(self.mscale) / self._weighted(self.mscale_all_dim)
        return self._weighted(1.0)

    @property
    def score_factor(self) -> float:
        """The factor of ``AttentionSpec.scale`` in DeepSeek's models: ``(0.1 mscale_all_dim ln(factor) + 1) ** 2``.

        1 without ``mscale_all_dim``. It is not part of `magnitude`: a model that uses it passes it in its spec's scale.
        """
        return 1.0 if self.mscale_all_dim is None else self._weighted(self.mscale_all_dim) ** 2

    def _weighted(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0

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
        """The number of the pair that turns this often in the original context; a fraction between two pairs."""
        return rotary_dim * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling(RotaryScaling):
    """LongRoPE: every pair is slowed by a factor of its own, found by a search (Ding et al., arXiv:2402.13753).

    Released models have two lists of factors, for sequences within the context of training and for longer ones. Keys in
    a cache are turned already, so that one list serves all sequences of a model: choose it for the longest.

    **Arguments:**

    - `factors`: the divisor of each pair's frequency, fastest first: ``rotary_dim // 2`` numbers.
    - `attention_factor`: multiplies rotated queries and rotated keys, so that scores grow by its square. Released
      models have ``sqrt(1 + ln(s) / ln(original_context))`` for contexts that are ``s`` times longer.

    Raises ``ValueError`` for factors that are not positive and finite, and, when a `Rotary` uses it, for a number of
    factors that is not the number of pairs.

    >>> LongRopeScaling(factors=(1.0, 4.0)).frequencies(10000.0, 4).tolist()
    [1.0, 0.0025]
    """

    factors: tuple[float, ...] | list[float]  # a tuple after construction
    attention_factor: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "factors", tuple(self.factors))
        for factor in self.factors:
            if isinstance(factor, bool) or not isinstance(factor, numbers.Real):
                raise TypeError(f"LongRopeScaling.factors must be numbers; got {factor!r}.")
            if not (factor > 0 and math.isfinite(factor)):
                raise ValueError(f"LongRopeScaling.factors must be positive and finite; got {factor}.")
        _require_positive(self, "attention_factor")

    @property
    def magnitude(self) -> float:
        return self.attention_factor

    def frequencies(self, theta, rotary_dim):
        if len(self.factors) != rotary_dim // 2:
            raise ValueError(
                f"LongRopeScaling.factors must have one number for each pair, rotary_dim // 2 = {rotary_dim // 2}; got "
                f"{len(self.factors)}."
            )
        return plain_frequencies(theta, rotary_dim) / np.asarray(self.factors, np.float64)


def _number(scaling: Any, name: str) -> Any:
    value = getattr(scaling, name)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{type(scaling).__name__}.{name} must be a number; got {value!r}.")
    return value


def _require_positive(scaling: Any, name: str) -> None:
    value = _number(scaling, name)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{type(scaling).__name__}.{name} must be positive and finite; got {value}.")


def _require_at_least_one(scaling: Any, name: str) -> None:
    value = _number(scaling, name)
    if not (value >= 1 and math.isfinite(value)):
        raise ValueError(
            f"{type(scaling).__name__}.{name} must be at least 1 and finite: it is how many times longer the context "
            f"becomes; got {value}. For no scaling, leave it out (scaling=None)."
        )
