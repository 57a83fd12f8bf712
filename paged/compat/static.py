"""Arguments that are no arrays: checked by name, and made into a spec and into hints for a kernel."""

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax.numpy as jnp

from paged.lower import sources_fingerprint
from paged.spec import AttentionSpec, PageLayout

from .devices import Devices
from .hints import Hints
from .number import integer, number

# The default of the originals: 0.7 of the least float32.
MASK_VALUE = -2.381976426469702e38
# Above this, a masked key might have some weight beside scores that are low as well.
_LEAST_HARMLESS = -1e9
_NO_HINTS = Hints()
_COMPUTE_DTYPES = tuple(jnp.dtype(d) for d in ("float16", "bfloat16", "float32"))


class Options(NamedTuple):
    """What one call says besides its arrays: hashable, so that JAX traces once for each."""

    target: str
    interpret: Any
    scale: float | None
    soft_cap: float | None
    window: int | None
    hints: Hints
    max_context_len: int | None = None
    is_float32: bool = False
    devices: Devices | None = None
    advice: Hashable = ()  # what contexts and tuning files were heeded: a trace is for these

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
        """Checked; ``scale`` and ``soft_cap`` come with the name that the entry point gives them."""
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
        """The attention over pages whose head dimension may be padded beyond ``head_dim``."""
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
    """A scale of scores, None for the default of ``1 / sqrt(head_dim)``."""
    if value is None:
        return None
    scale = number(name, value)
    if not math.isfinite(scale):
        raise ValueError(f"{name} must be finite; got {scale}. For 1 / sqrt(head_dim), leave it out.")
    return scale


def soft_cap_of(name: str, value: Any) -> float | None:
    """A bound of scores, None for none."""
    if value is None:
        return None
    cap = number(name, value)
    if not 0 < cap < math.inf:
        raise ValueError(f"{name} must be positive and finite, a bound of scores; got {cap}. For no cap, leave it out.")
    return cap


def window_of(value: Any) -> int | None:
    """A window that counts the query's own token, None for none."""
    if isinstance(value, tuple | list):
        raise TypeError(
            f"sliding_window must be a Python int, the tokens seen with the query's own; got {value!r}. A window of "
            "(left, right) tokens beside the query's is left + 1 here; right is 0, for these are causal."
        )
    return None if value is None else integer("sliding_window", value, 1)


def require_exact_mask(value: Any) -> None:
    """Refuse a mask value that could change a result: masks are exact, so that any other is as good as none."""
    if value is None:
        return
    got = number("mask_value", value)
    if not got <= _LEAST_HARMLESS:
        raise ValueError(
            f"mask_value={got} could give hidden keys a weight. Masks are exact here, hidden keys weigh 0 and no "
            f"value is needed: leave it out. Values up to {_LEAST_HARMLESS:g} are taken, and change nothing."
        )


def wants_float32(compute_dtype: Any) -> bool:
    """Whether products must be taken in float32 where queries and pages are narrower."""
    try:
        dtype = jnp.dtype(compute_dtype)
    except TypeError:
        dtype = None
    if dtype not in _COMPUTE_DTYPES:
        raise TypeError(f"compute_dtype must be float16, bfloat16 or float32; got {compute_dtype!r}.")
    return dtype == jnp.float32
