"""Sinks: learnt logits of each query head that enter the denominator of its softmax and have no value."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .attention import AttentionSpec
from .state import log_add_exp

Sinks = Float[Array, " q_heads"] | Float[Array, "q_heads sinks_per_head"]


def require_sinks(spec: AttentionSpec, sinks: Any) -> None:
    """Check that a call has sinks exactly when its spec has them, as float[q_heads] or float[q_heads, n].

    **Arguments:**

    - `spec`: the attention of the call.
    - `sinks`: the call's sinks, or None.

    **Raises:** ``ValueError`` where sinks are missing, where the spec has none, and for any other shape; the message
    says what to write instead. ``TypeError`` for sinks that are not floating point.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, sinks=True)
    >>> require_sinks(spec, jnp.zeros(4))
    """
    heads = spec.num_q_heads
    if spec.sinks and sinks is None:
        raise ValueError(
            f"sinks is missing: the spec says sinks=True, so the call needs float32[{heads}], one learnt logit for "
            "each query head."
        )
    if sinks is None:
        return
    if not spec.sinks:
        raise ValueError("sinks were given, but the spec says sinks=False: use spec.replace(sinks=True).")
    if not jnp.issubdtype(jnp.result_type(sinks), jnp.floating):
        raise TypeError(f"sinks must be floating point; got {jnp.result_type(sinks).name}.")
    shape = np.shape(sinks)
    if len(shape) not in (1, 2) or shape[0] != heads or 0 in shape:
        raise ValueError(
            f"sinks must be [q_heads] = [{heads}], or [q_heads, n] for n sinks of each query head, which add up in the "
            f"denominator; got {shape}.{_remedy(spec, shape)}"
        )


def sinks_per_head(spec: AttentionSpec, sinks: Sinks) -> Float[Array, " q_heads"]:
    """One logit for each query head that stands for all of its sinks: the log of the sum of their exponentials.

    **Arguments:**

    - `spec`: an attention with sinks.
    - `sinks`: float[q_heads], or float[q_heads, n] for ``n`` sinks of each head.

    **Returns:** float32[q_heads]. Sinks of ``-inf`` are no sinks.

    **Raises:** ``ValueError`` or ``TypeError`` as `require_sinks` does.

    >>> spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=8, sinks=True)
    >>> sinks_per_head(spec, jnp.zeros((2, 3))).tolist() == [float(jnp.log(3.0))] * 2
    True
    """
    require_sinks(spec, sinks)
    sinks = jnp.asarray(sinks, jnp.float32)
    return sinks if sinks.ndim == 1 else functools.reduce(log_add_exp, jnp.unstack(sinks, axis=1))


def _remedy(spec: AttentionSpec, shape: tuple[int, ...]) -> str:
    """What the caller may have meant, and how to write it."""
    heads, kv_heads, group = spec.num_q_heads, spec.num_kv_heads, spec.group
    if 0 in shape:
        return ""
    if shape == (kv_heads, group):
        return f" For one sink of each query head: sinks.reshape({heads})."
    if len(shape) == 1:
        every = f" For {shape[0]} sinks of every head: jnp.broadcast_to(sinks, ({heads}, {shape[0]}))."
        return every + (f" For one sink of each KV head: jnp.repeat(sinks, {group})." if shape[0] == kv_heads else "")
    if len(shape) == 2 and shape[0] == kv_heads:
        return f" For {shape[1]} sinks of each KV head: jnp.repeat(sinks, {group}, axis=0)."
    return ""
