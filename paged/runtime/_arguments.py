"""What the callers of the runtime pass, checked: numbers and token ids, converted only where nothing is lost."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Integer

from paged.spec import AttentionSpec, minima_of, values_of

_LARGEST = np.iinfo(np.int32).max

# One per slot: an array, which may be traced, or a list.
Counts = Integer[Array | np.ndarray, " seqs"] | Sequence[int]
Flags = Bool[Array | np.ndarray, " seqs"] | Sequence[bool]
Number = Integer[Array | np.ndarray, ""] | int | np.integer


def integer(name: str, value: Any, least: int | None = None) -> int:
    """``value`` as a Python int. A NumPy or JAX integer is one; a bool, a float and a string are none."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be an int; got the bool {value!r}.")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int; got {value!r}.") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}; got {number}.")
    if number > _LARGEST:
        raise ValueError(f"{name} must be at most 2**31 - 1; got {number}.")
    return number


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """The ids of one prompt: of a list, a tuple, a range or an integer array of one axis."""
    if isinstance(value, np.ndarray | jax.Array):
        if value.ndim != 1 or not jnp.issubdtype(value.dtype, jnp.integer):
            raise TypeError(f"{name} must be int[tokens]; got {value.dtype.name} of shape {value.shape}.")
        ids = np.asarray(value).tolist()
    elif isinstance(value, str | bytes | bytearray):
        raise TypeError(f"{name} must be token ids; got {value!r}. Encode text with the model's tokenizer.")
    elif not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list, a tuple or an array of token ids; got {value!r}.")
    else:
        ids = list(value)
    if all(type(token) is int and 0 <= token <= _LARGEST for token in ids):
        return tuple(ids)  # most prompts, for which no name of a token is written
    return tuple(integer(f"{name}[{i}]", token, least=0) for i, token in enumerate(ids))


def prompts_of(prompts: Any) -> list[tuple[int, ...]]:
    """The ids of every prompt."""
    if isinstance(prompts, str | bytes | bytearray) or not isinstance(prompts, Sequence | np.ndarray | jax.Array):
        raise TypeError(f"prompts must be a list of prompts, each a list of token ids; got {prompts!r}.")
    if isinstance(prompts, np.ndarray | jax.Array):
        if prompts.ndim != 2:
            raise TypeError(f"prompts must be [prompts, tokens] as one array; got shape {prompts.shape}.")
        prompts = np.asarray(prompts)
    return [token_ids(f"prompts[{i}]", prompt) for i, prompt in enumerate(prompts)]


def limits_of(max_new_tokens: Any, num_prompts: int) -> list[int]:
    """The most new tokens of each prompt."""
    name = "max_new_tokens"
    if isinstance(max_new_tokens, np.ndarray | jax.Array) and max_new_tokens.ndim == 1:
        max_new_tokens = np.asarray(max_new_tokens)
        if max_new_tokens.dtype == bool:
            raise TypeError(f"{name} must be int[prompts]; got bool.")
    elif isinstance(max_new_tokens, str | bytes | bytearray) or not isinstance(max_new_tokens, Sequence):
        return [integer(name, max_new_tokens, least=1)] * num_prompts
    if len(max_new_tokens) != num_prompts:
        raise ValueError(
            f"{name} must be one int, or one for each of {num_prompts} prompts; got {len(max_new_tokens)}."
        )
    return [integer(f"{name}[{i}]", limit, least=1) for i, limit in enumerate(max_new_tokens)]


def values_of_prompts(
    values: Mapping[str, Any] | None, specs: Sequence[AttentionSpec], num_prompts: int
) -> dict[str, np.ndarray]:
    """The numbers of every prompt, by the names in a model's specs: [prompts], or [prompts, size]."""
    named = {value.name: value for value in values_of(*(spec.terms for spec in specs))}
    given = {} if values is None else dict(values)
    # A model whose attentions cannot be found may name anything.
    if set(named) - set(given) or (specs and set(given) - set(named)):
        raise ValueError(f"values must be {sorted(named)}, which the model's specs name; got {sorted(given)}.")
    found = {}
    for name, x in given.items():
        found[name] = np.asarray(x)
        if name in named:
            value, shape = named[name], (num_prompts,) if named[name].size is None else (num_prompts, named[name].size)
            if found[name].shape != shape or found[name].dtype.kind not in {"int32": "iu", "float32": "f"}[value.dtype]:
                got = f"{found[name].dtype.name}{list(found[name].shape)}"
                raise ValueError(f"values[{name!r}] must be {value.dtype}{list(shape)}, one row a prompt; got {got}.")
            found[name] = found[name].astype(value.dtype)
    for name, least, term in minima_of(*(spec.terms for spec in specs)):
        if np.any(found[name] < least):
            raise ValueError(f"values[{name!r}] must be at least {least}, for {term}; got {found[name].tolist()}.")
    return found


def end_ids(eos: Any) -> frozenset[int]:
    """The token ids that end a sequence, from one int or from a collection of ints."""
    if eos is None:
        return frozenset()
    if isinstance(eos, str | bytes | bytearray | Mapping):
        raise TypeError(f"eos must be a token id, or a list or set of them; got {eos!r}.")
    if isinstance(eos, np.ndarray | jax.Array):
        if eos.ndim > 1:
            raise TypeError(f"eos must be one token id or int[ids]; got shape {eos.shape}.")
        eos = np.asarray(eos)[()]
    if not isinstance(eos, Iterable) or isinstance(eos, np.generic):
        return frozenset([integer("eos", eos, least=0)])
    return frozenset(integer("each id of eos", token, least=0) for token in eos)


def slot_counts(name: str, value: Any, num_slots: int) -> jax.Array:
    """int32[seqs]: one count per slot. What int32 cannot hold becomes its largest, for which no slot has room."""
    value = _per_slot(name, value, num_slots, "int32", jnp.integer)
    return jnp.asarray(value) if value.dtype == jnp.int32 else _saturated(value)


def slot_flags(name: str, value: Any, num_slots: int) -> jax.Array:
    """bool[seqs]: one flag per slot."""
    return jnp.asarray(_per_slot(name, value, num_slots, "bool", jnp.bool_))


def index_or_traced(name: str, value: Any, least: int, most: int) -> jax.Array | int:
    """An int of ``[least, most]``, or an integer array of no axes, whose value is not looked at."""
    if not isinstance(value, jax.Array):
        number = integer(name, value, least)
        if number > most:
            raise ValueError(f"{name} must be at most {most}; got {number}.")
        return number
    if value.ndim or not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name} must be an int or int32[]; got {value.dtype.name} of shape {value.shape}.")
    return value


def _per_slot(name: str, value: Any, num_slots: int, wanted: str, kind: Any) -> Any:
    """The argument as an array with one entry per slot. A scatter would silently cut a wider one."""
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    if value.shape != (num_slots,):
        raise ValueError(f"{name} must be [seqs] = [{num_slots}], one for each slot; got {value.shape}.")
    if not jnp.issubdtype(value.dtype, kind):
        raise TypeError(f"{name} must be {wanted}; got {value.dtype.name}.")
    return value


def _saturated(value: Any) -> jax.Array:
    """An integer array of any width as int32."""
    if isinstance(value, np.ndarray):
        return jnp.asarray(np.clip(value, -_LARGEST, _LARGEST).astype(np.int32))
    info = jnp.iinfo(value.dtype)
    least, most = max(int(info.min), -_LARGEST), min(int(info.max), _LARGEST)
    return jnp.clip(value, jnp.asarray(least, value.dtype), jnp.asarray(most, value.dtype)).astype(jnp.int32)
