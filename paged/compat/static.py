"""`Options`: the arguments of a call that are no arrays, checked, and made into a spec."""

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax.numpy as jnp

from paged.lower import sources_fingerprint
from paged.spec import FLOAT_DTYPES, AttentionSpec, PageLayout

from .devices import Devices
from .hints import Hints
from .number import flag, integer, number, positive

# The default of the original entry points: 0.7 times the least float32.
MASK_VALUE = -2.381976426469702e38
# The least float16. A mask value above it could give a hidden key some weight, where all scores are low.
_LEAST_HARMLESS = float(jnp.finfo(jnp.float16).min)
_NO_HINTS = Hints()


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
    cache_order: str | None = None
    more: "More | None" = None

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
        cache_order: str | None = None,
        more: "More | None" = None,
    ) -> "Options":
        """The options, checked. ``scale`` and ``soft_cap`` are pairs: the argument's name, and its value."""
        require_exact_mask(mask_value)
        return cls(
            target,
            interpret,
            scale_of(*scale),
            soft_cap_of(*soft_cap),
            window_of(window, more is None or more.is_causal),
            hints,
            None if max_context_len is None else integer("max_context_len", max_context_len, 1),
            wants_float32(compute_dtype),
            devices,
            sources_fingerprint(),
            cache_order,
            more,
        )

    def spec(self, num_q_heads: int, head_dim: int, layout: PageLayout, sinks: bool = False) -> AttentionSpec:
        """The spec of the attention. ``head_dim`` is the queries'; the pages' may be larger, padded with zeros."""
        scale, k_scale = self.scale, self.scales(layout)[0]
        if scale is None and (head_dim != layout.head_dim or k_scale != 1.0):
            scale = 1.0 / math.sqrt(head_dim)
        return AttentionSpec(
            num_q_heads=num_q_heads,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            scale=scale if scale is None or k_scale == 1.0 else scale * k_scale,
            soft_cap=self.soft_cap,
            causal=self.more is None or self.more.is_causal,
            window=self.window,
            sinks=sinks,
        )

    def scales(self, layout: PageLayout) -> tuple[float, float]:
        """The numbers that multiply scores and outputs. Quantised pages carry their scales themselves."""
        if self.more is None or layout.is_quantised:
            return 1.0, 1.0
        return self.more.k_scale or 1.0, self.more.v_scale or 1.0

    def out_dtype(self, q: Any) -> Any:
        """The dtype of the output for queries ``q``."""
        return q.dtype if self.more is None or self.more.out_dtype is None else self.more.out_dtype


class More(NamedTuple):
    """Options that few calls have: scales of keys and values, the output's dtype, no causal mask, no write."""

    k_scale: float | None = None
    v_scale: float | None = None
    out_dtype: Any = None
    is_causal: bool = True
    is_written: bool = True

    @classmethod
    def of(
        cls,
        q_scale: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        out_dtype: Any = None,
        use_causal_mask: Any = True,
        update_kv_cache: Any = True,
    ) -> "More | None":
        """These options, checked; None where all are left out."""
        is_plain = q_scale is k_scale is v_scale is out_dtype is None
        if is_plain and use_causal_mask is True and update_kv_cache is True:
            return None
        is_causal, is_written = flag("use_causal_mask", use_causal_mask), flag("update_kv_cache", update_kv_cache)
        if q_scale is not None:
            positive("q_scale", q_scale)  # queries are not quantised here: to divide and to multiply gives the same
        return cls(
            None if k_scale is None else positive("k_scale", k_scale),
            None if v_scale is None else positive("v_scale", v_scale),
            None if out_dtype is None else _float_dtype("out_dtype", out_dtype),
            is_causal,
            is_written,
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


def window_of(value: Any, is_causal: bool = True) -> int | None:
    """The window in tokens, the query's own included. None is for no window.

    A pair ``(left, right)`` counts the tokens beside the query's own. The causal mask hides those to the right anyway.
    """
    if value is None:
        return None
    if not isinstance(value, tuple | list):
        return integer("sliding_window", value, 1)
    if len(value) != 2 or not is_causal:
        raise ValueError(
            "sliding_window must be a number of tokens, the query's own included, or under a causal mask a pair (left, "
            f"right) of tokens beside it; got {value!r}."
        )
    left, _ = (integer("sliding_window", side, 0) for side in value)
    return left + 1


def require_exact_mask(value: Any) -> None:
    """Raise for a mask value that could change a result. Masks are exact here, so all other values are ignored."""
    if value is None:
        return
    got = number("mask_value", value)
    if not got <= _LEAST_HARMLESS:
        raise ValueError(
            f"mask_value={got} could give hidden keys a weight. Masks are exact here, hidden keys weigh 0 and no value "
            f"is needed: leave it out. Values up to {_LEAST_HARMLESS:.0f} are accepted, and change nothing."
        )


def wants_float32(compute_dtype: Any) -> bool:
    """Whether products are computed in float32 even where queries and pages are narrower."""
    return compute_dtype is not None and _float_dtype("compute_dtype", compute_dtype) == jnp.float32


def _float_dtype(name: str, value: Any) -> Any:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16 or float32; got {value!r}.")
    return dtype
