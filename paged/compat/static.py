"""`Options`: the arguments of a call that are no arrays, checked, and made into a spec."""

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax.numpy as jnp

from paged.lower import sources_fingerprint
from paged.spec import AttentionSpec, PageLayout

from .devices import Devices
from .hints import Hints
from .number import integer, number

# The default of the original entry points: 0.7 times the least float32.
MASK_VALUE = -2.381976426469702e38
# A mask value above this could give a hidden key some weight, where all scores are low.
_LEAST_HARMLESS = -1e9
_NO_HINTS = Hints()
_COMPUTE_DTYPES = tuple(jnp.dtype(d) for d in ("float16", "bfloat16", "float32"))


class Options(NamedTuple):
    """The arguments of one call that are no arrays. Hashable, so that JAX traces once per value."""

    target: str
    interpret: Any
    scale: float | None
    soft_cap: float | None
    window: int | None
    hints: Hints
    max_context_len: int | None = None
    is_float32: bool = False
    devices: Devices | None = None
    advice: Hashable = ()  # fingerprint of contexts and tuning files: a trace is for these

    @classmethod
    def of(
        cls,
        target: str,
        interpret: Any,
        scale: tuple[str, Any],
        soft_cap: tuple[str, Any],
        window: Any,
        mask_value: Any = None,
        hints: Hints = _NO_HINTS,
        max_context_len: Any = None,
        compute_dtype: Any = jnp.bfloat16,
        devices: Devices | None = None,
    ) -> "Options":
        """The options, checked. ``scale`` and ``soft_cap`` are pairs: the argument's name, and its value."""
        require_exact_mask(mask_value)
        return cls(
            target,
            interpret,
            scale_of(*scale),
            soft_cap_of(*soft_cap),
            window_of(window),
            hints,
            None if max_context_len is None else integer("max_context_len", max_context_len, 1),
            wants_float32(compute_dtype),
            devices,
            sources_fingerprint(),
        )

    def spec(self, num_q_heads: int, head_dim: int, layout: PageLayout, sinks: bool = False) -> AttentionSpec:
        """The spec of the attention. ``head_dim`` is the queries'; the pages' may be larger, padded with zeros."""
        scale = self.scale
        if scale is None and head_dim != layout.head_dim:
            scale = 1.0 / math.sqrt(head_dim)
        return AttentionSpec(
            num_q_heads=num_q_heads,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            scale=scale,
            soft_cap=self.soft_cap,
            window=self.window,
            sinks=sinks,
        )


def scale_of(name: str, value: Any) -> float | None:
    """The scale of scores. None is for the default, ``1 / sqrt(head_dim)``."""
    if value is None:
        return None
    scale = number(name, value)
    if not math.isfinite(scale):
        raise ValueError(f"{name} must be finite; got {scale}. For 1 / sqrt(head_dim), leave it out.")
    return scale


def soft_cap_of(name: str, value: Any) -> float | None:
    """The soft cap of scores. None is for no cap."""
    if value is None:
        return None
    cap = number(name, value)
    if not 0 < cap < math.inf:
        raise ValueError(f"{name} must be positive and finite, a bound of scores; got {cap}. For no cap, leave it out.")
    return cap


def window_of(value: Any) -> int | None:
    """The window in tokens, the query's own included. None is for no window."""
    if isinstance(value, tuple | list):
        raise TypeError(
            f"sliding_window must be a Python int, tokens with the query's own; got {value!r}. A window of "
            "(left, right) tokens beside the query's own is left + 1 here; right is 0, for these are causal."
        )
    return None if value is None else integer("sliding_window", value, 1)


def require_exact_mask(value: Any) -> None:
    """Raise for a mask value that could change a result. Masks are exact here, so all other values are ignored."""
    if value is None:
        return
    got = number("mask_value", value)
    if not got <= _LEAST_HARMLESS:
        raise ValueError(
            f"mask_value={got} could give hidden keys a weight. Masks are exact here, hidden keys weigh 0 and no value "
            f"is needed: leave it out. Values up to {_LEAST_HARMLESS:g} are accepted, and change nothing."
        )


def wants_float32(compute_dtype: Any) -> bool:
    """Whether products are computed in float32 even where queries and pages are narrower."""
    try:
        dtype = jnp.dtype(compute_dtype)
    except TypeError:
        dtype = None
    if dtype not in _COMPUTE_DTYPES:
        raise TypeError(f"compute_dtype must be float16, bfloat16 or float32; got {compute_dtype!r}.")
    return dtype == jnp.float32
