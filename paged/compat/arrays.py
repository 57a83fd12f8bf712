"""Arguments that are arrays: checked by the caller's names, and brought into the shapes of `paged.lower`."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from paged.spec import FLOAT_DTYPES, Sinks

# Integers of the field's callers come as JAX's arrays or as NumPy's; lists are accepted too.
AnyArray = Array | np.ndarray

# Sizes that a step without rows or without sequences has as 0.
_MAY_BE_0 = ("batch", "chunk", "seqs", "tokens")


@runtime_checkable
class QuantisedPages(Protocol):
    """Pages in two arrays, as JAX's ``QuantizedTensor`` has them: int8 numbers, and the scale of each row of them."""

    weight: Any
    scales: Any


class Quantised(NamedTuple):
    """`QuantisedPages`, as a pytree."""

    weight: Any
    scales: Any


def as_arrays(**named: Any) -> tuple[Any, ...]:
    """The arguments as arrays. Lists and Python numbers become int32; anything else raises ``TypeError``.

    Quantised pages, of two arrays, stay what they are.
    """
    return tuple(x if is_array(x) else _integers(name, x) for name, x in named.items())


def is_array(x: Any) -> bool:
    """Whether it has a shape and a dtype. The type is asked first: the shape of a JAX array takes longer to get."""
    kind = type(x)
    return (hasattr(kind, "shape") and hasattr(kind, "dtype")) or (hasattr(x, "shape") and hasattr(x, "dtype"))


def _integers(name: str, value: Any) -> Any:
    if name in ("key_cache", "value_cache") and isinstance(value, QuantisedPages):
        return Quantised(*as_arrays(weight=value.weight, scales=value.scales))
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        array = np.asarray(None)
    if not array.size:
        return array.astype(np.int32)  # an empty list says nothing of its dtype
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be an array; got {type(value).__name__}.")
    return array.astype(np.int32)


def require_shape(name: str, array: Any, shape: tuple[Any, ...], meaning: str) -> None:
    """``ValueError`` unless the array has this shape.

    A string stands for any size of at least 1, or of at least 0 for rows and sequences.
    """
    got = tuple(array.shape)
    fits = len(got) == len(shape) and all(
        n >= (want not in _MAY_BE_0) if isinstance(want, str) else n == want for n, want in zip(got, shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("*" if isinstance(want, str) else str(want) for want in shape)
        raise ValueError(f"{name} must be {meaning} = [{sizes}]; got {got}.")


def require_integers(name: str, array: Any) -> None:
    """``TypeError`` unless the array holds integers."""
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be int32; got {array.dtype.name}.")


def require_floats(name: str, array: Any) -> None:
    """``TypeError`` unless the array has a dtype that queries and pages may have."""
    if array.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16 or float32; got {array.dtype.name}.")


def rows_of(name: str, array: Any, seq: int | None = None) -> Any:
    """Rows ``[tokens, heads, head_dim]``, from that shape or from ``[batch, seq, heads, head_dim]``."""
    require_floats(name, array)
    if array.ndim == 4:
        if seq is not None:
            require_shape(name, array, ("batch", seq, "heads", "head_dim"), "[batch, seq, heads, head_dim]")
        array = array.reshape(-1, *array.shape[2:])
    require_shape(name, array, ("tokens", "heads", "head_dim"), "[tokens, heads, head_dim]")
    return array


def require_heads(name: str, heads: int, cache: str, kv_heads: int, order: str) -> None:
    """``ValueError`` unless query heads are a multiple of the cache's KV heads."""
    if heads % kv_heads:
        raise ValueError(
            f"{name} has {heads} heads, which must be a multiple of the {kv_heads} KV heads of {cache}; {cache} is "
            f"{order}, and no other order is guessed."
        )


def sinks_of(softmax_aux: Any, heads: int, kv_heads: int) -> Sinks | None:
    """Sinks in the field's shapes as float[q_heads] or float[q_heads, n], which is what `paged.lower` accepts.

    ``[q_heads]`` and ``[kv_heads, group]`` are one sink of each query head. ``[n]`` are ``n`` sinks of every head,
    ``[kv_heads, n]`` are ``n`` sinks of every head of a KV head's group.
    """
    if softmax_aux is None:
        return None
    if not jnp.issubdtype(softmax_aux.dtype, jnp.floating):
        raise TypeError(f"softmax_aux must be float32; got {softmax_aux.dtype.name}.")
    shape, group = softmax_aux.shape, heads // kv_heads
    if shape == (heads,):
        return softmax_aux
    if shape == (kv_heads, group):
        return softmax_aux.reshape(heads)
    if softmax_aux.size and softmax_aux.ndim == 1:
        return jnp.broadcast_to(softmax_aux, (heads, *shape))
    if softmax_aux.size and softmax_aux.ndim == 2 and shape[0] == kv_heads:
        return jnp.repeat(softmax_aux, group, axis=0)
    raise ValueError(
        f"softmax_aux must be [q_heads] = [{heads}] or [kv_heads, group] = [{kv_heads}, {group}], one sink of each "
        f"query head, or [n] or [kv_heads, n], several sinks, which add up; got {tuple(shape)}."
    )


def padded(rows: Any, head_dim: int) -> Any:
    """Rows padded with zeros to the pages' head dimension."""
    missing = head_dim - rows.shape[-1]
    return jnp.pad(rows, ((0, 0), (0, 0), (0, missing))) if missing else rows
