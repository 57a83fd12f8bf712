"""`Sampler`: how the tokens of one request are drawn."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._arguments import integer

# Below it a temperature is 0: its reciprocal is no normal float32.
_LEAST = float(np.finfo(np.float32).tiny)
_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a token is drawn from logits. Hashable.

    The rule, in this order:

    1. Add ``logit_bias``.
    2. Of each token that the prompt or the answer has, divide a positive logit by ``repetition_penalty`` and multiply
       a negative one (Keskar et al., arXiv:1909.05858, section 4.1). Of each token that the answer has, subtract
       ``presence_penalty``.
    3. Divide by the temperature, after the row's largest is subtracted from each, so that nothing that counts
       overflows.
    4. Keep the ``top_k`` largest; renormalise, and of the tokens left keep the fewest, largest first, whose
       probabilities add up to ``top_p`` (nucleus sampling, arXiv:1904.09751); and of these keep those whose
       probability is at least ``min_p`` times the largest (arXiv:2407.01082). Among equal logits the lower token id
       comes first.
    5. Draw one of them.

    **Arguments:**

    - `temperature`: at least 0. At 0, the default, and below the least normal float32, 1.2e-38, the token with the
      largest logit is taken: the limit of ever lower temperatures.
    - `top_k`: how many of the likeliest tokens may be drawn; None for all.
    - `top_p`: the probability mass that may be drawn, in (0, 1]; None for all.
    - `min_p`: the least probability relative to the likeliest token's, in [0, 1]; None for all.
    - `repetition_penalty`: positive; 1 for none.
    - `presence_penalty`: finite; 0 for none.
    - `logit_bias`: numbers by token id, which are added to the logits; ``-inf`` forbids a token. A mapping, or a tuple
      of pairs.

    Raises ``ValueError`` or ``TypeError`` for values outside of these ranges.

    >>> Sampler(temperature=0.7, top_p=0.9).is_greedy, Sampler().is_greedy
    (False, True)
    >>> Sampler(logit_bias={7: -np.inf}).logit_bias
    ((7, -inf),)
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    logit_bias: Any = ()  # a tuple of pairs after construction, in the order of their ids

    def __post_init__(self):
        set_ = lambda name, value: object.__setattr__(self, name, value)
        set_("temperature", _real("temperature", self.temperature))
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature must be finite and not negative; got {self.temperature}. 0 takes the likeliest token."
            )
        if self.top_k is not None:
            set_("top_k", integer("top_k", self.top_k))
            if self.top_k < 1:
                raise ValueError(
                    f"top_k must be at least 1, because one token must remain; got {self.top_k}. For all tokens, leave "
                    "it out."
                )
        if self.top_p is not None:
            set_("top_p", _real("top_p", self.top_p))
            if not 0 < self.top_p <= 1:
                raise ValueError(
                    f"top_p must be in (0, 1]: it is the probability mass to keep; got {self.top_p}. For all tokens, "
                    "leave it out."
                )
        if self.min_p is not None:
            set_("min_p", _real("min_p", self.min_p))
            if not 0 <= self.min_p <= 1:
                raise ValueError(
                    f"min_p must be in [0, 1]: it is a part of the largest probability; got {self.min_p}. For all "
                    "tokens, leave it out."
                )
        set_("repetition_penalty", _real("repetition_penalty", self.repetition_penalty))
        if not _LEAST <= self.repetition_penalty <= _LARGEST:
            raise ValueError(f"repetition_penalty must be positive; got {self.repetition_penalty}. 1 is none.")
        set_("presence_penalty", _real("presence_penalty", self.presence_penalty))
        if not abs(self.presence_penalty) <= _LARGEST:
            raise ValueError(f"presence_penalty must be finite in float32; got {self.presence_penalty}. 0 is none.")
        set_("logit_bias", _as_biases(self.logit_bias))

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without chance."""
        return self.temperature < _LEAST or self.top_k == 1

    @property
    def needs_history(self) -> bool:
        """Whether the rule asks which tokens the prompt and the answer have."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0


def _as_biases(biases: Any) -> tuple[tuple[int, float], ...]:
    """Pairs of a token id and a number, in the order of their ids."""
    try:
        pairs = [(token, bias) for token, bias in (biases.items() if isinstance(biases, Mapping) else biases)]
    except (TypeError, ValueError):
        raise TypeError(f"logit_bias must be numbers by token id, such as {{7: -1.5}}; got {biases!r}.") from None
    found = {}
    for token, bias in pairs:
        token = integer("a token of logit_bias", token, least=0)
        bias = _real(f"logit_bias[{token}]", bias)
        if not (abs(bias) <= _LARGEST or bias == -math.inf):
            raise ValueError(f"logit_bias[{token}] must be finite in float32, or -inf to forbid it; got {bias}.")
        if token in found:
            raise ValueError(f"logit_bias has token {token} twice.")
        found[token] = bias
    return tuple(sorted(found.items()))


def _real(name: str, value: Any) -> float:
    """``value`` as a Python float. A NumPy number is one; a bool and a string are none."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {value!r}.")
    return float(value)
