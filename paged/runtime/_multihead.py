"""An ``eqx.nn.MultiheadAttention`` as a `PagedAttention`: its spec and its parts, or why pages cannot serve it."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from paged.spec import FLOAT_DTYPES, AttentionSpec, Mask, PageLayout

from .rotary import Rotary

_PROJECTIONS = ("query_proj", "key_proj", "value_proj", "output_proj")


def refusal(mha: Any) -> str | None:
    """Why pages cannot serve a ``MultiheadAttention``, whatever their layout; None if they can."""
    if type(mha) is not eqx.nn.MultiheadAttention:
        kind = "a subclass of MultiheadAttention, whose call may differ" if isinstance(mha, _MHA) else "none"
        return f"it must be an eqx.nn.MultiheadAttention; got a {type(mha).__name__}, which is {kind}"
    for name in _PROJECTIONS:
        weight = getattr(getattr(mha, name), "weight", None)
        rank, dtype = getattr(weight, "ndim", 2), getattr(weight, "dtype", jnp.dtype("float32"))
        if rank != 2:
            return (
                f"{name}.weight has {rank} dimensions, as stacked layers have: take them apart by "
                "[jax.tree.map(lambda x: x[i] if eqx.is_array(x) else x, stacked) for i in range(n)], and convert "
                "these; docs/layers.md makes them one scan again"
            )
        if dtype not in FLOAT_DTYPES:
            return f"{name}.weight is {dtype}, and queries must be float16, bfloat16 or float32"
    return None


def spec_of(mha: Any, layout: PageLayout, mask: Mask, rotary: Rotary | None) -> AttentionSpec:
    """What a ``MultiheadAttention`` with this mask means. Raises ``ValueError`` where such pages cannot serve it."""
    reason = refusal(mha)
    if reason is not None:
        raise ValueError(f"The attention cannot be served from pages: {reason}.")
    sizes = {"num_kv_heads": mha.num_heads, "head_dim": mha.qk_size, "value_dim": mha.vo_size}
    if any(getattr(layout, name) != size for name, size in sizes.items()):
        if mha.vo_size == mha.qk_size:
            del sizes["value_dim"]
        wanted = ", ".join(f"{name}={size}" for name, size in sizes.items())
        order = ', order="split"' if "value_dim" in sizes else ""
        raise ValueError(f"layout must have the attention's heads: PageLayout(..., {wanted}{order}); got {layout}.")
    require_rotary(rotary, mha.qk_size)
    heads = {"num_q_heads": mha.num_heads, "num_kv_heads": mha.num_heads, "head_dim": mha.qk_size}
    return AttentionSpec(**heads, causal=False, mask=mask)


def parts_of(mha: Any) -> dict[str, Any]:
    """The fields of a `PagedAttention` that a ``MultiheadAttention`` gives, by name."""
    sizes = mha.query_size, mha.key_size, mha.value_size
    absent = dict.fromkeys(("query_norm", "key_norm", "sinks"))
    return {name: getattr(mha, name) for name in (*_PROJECTIONS, "dropout")} | absent | {"input_sizes": sizes}


def require_rotary(rotary: Rotary | None, head_dim: int) -> None:
    """Raise ``ValueError`` where a rotary embedding is for other heads."""
    if rotary is not None and rotary.head_dim != head_dim:
        raise ValueError(
            f"rotary.head_dim must equal spec.head_dim = {head_dim}; got {rotary.head_dim}. To turn a part of the "
            "head, use Rotary(head_dim, rotary_dim=...)."
        )


_MHA = eqx.nn.MultiheadAttention
