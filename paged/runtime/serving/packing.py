"""Requests on their way to the device: one array of words for all columns, so that an upload is one transfer."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt

from ..sampling import Samplers
from .requests import Requests

# Columns that a table may lack.
_OPTIONAL = ("cuts", "log_probs", "prompt_log_probs")


def packed(rows: np.ndarray, folds: np.ndarray, columns: Mapping[str, Any]) -> np.ndarray:
    """Columns of 32-bit numbers side by side, uint32[requests, words], as `put_packed` takes them.

    **Arguments:**

    - `rows` i32[requests]: of the table, in which the requests go.
    - `folds` i32[requests, 2]: the numbers that are folded into the key of each request, one after the other; -1 for
      none.
    - `columns`: see `Requests.columns`.
    """
    parts = [rows[:, None], folds, *(x for _, x in _flat(columns))]
    return np.concatenate([np.ascontiguousarray(x).reshape(len(rows), -1).view(np.uint32) for x in parts], axis=1)


def put_packed(
    rows: Int[Array, " new"], words: UInt[Array, "new words"], keys: Sequence[Any], table: Requests
) -> Requests:
    """The table with new requests.

    **Arguments:**

    - `rows`: in which they go; one past the table drops its request.
    - `words`: see `packed`, without the rows.
    - `keys`: a typed key for each new request, in which its numbers are folded.
    - `table`: where they go.
    """
    folds, words = _ints(words[:, :2]), words[:, 2:]
    found: dict[str, Any] = {}
    for name, column in _flat(_columns_of(table)):
        width = int(np.prod(column.shape[1:]))
        own = words[:, :width].reshape(len(rows), *column.shape[1:])
        found[name], words = jax.lax.bitcast_convert_type(own, column.dtype), words[:, width:]
    own_keys = jax.vmap(_folded)(jnp.stack(keys), folds)
    new: dict[str, Any] = {**dict.fromkeys(_OPTIONAL), **{name: x for name, x in found.items() if "." not in name}}
    nested = {
        group: {name[len(group) + 1 :]: x for name, x in found.items() if name.startswith(group + ".")}
        for group in ("samplers", "values")
    }
    return table.put(
        rows, Requests(**new, samplers=Samplers(**nested["samplers"]), values=nested["values"], keys=own_keys)
    )


def _columns_of(table: Requests) -> dict[str, Any]:
    """The columns of a table as `Requests.columns` names them."""
    of = lambda x: {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
    return {**of(table), "samplers": of(table.samplers), "keys": None}


def _flat(columns: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every column with its name, in an order that the names alone say."""
    for name in sorted(columns):
        if isinstance(columns[name], Mapping):
            yield from _flat(columns[name], f"{prefix}{name}.")
        elif columns[name] is not None:
            yield prefix + name, columns[name]


def _ints(words: UInt[Array, "*shape"]) -> Int[Array, "*shape"]:
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def _folded(key: Any, numbers: Int[Array, "2"]) -> Any:
    for number in numbers:
        data = jax.random.key_data(jax.random.fold_in(key, jnp.maximum(number, 0)))
        data = jnp.where(number >= 0, data, jax.random.key_data(key))
        key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
    return key
