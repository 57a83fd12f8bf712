"""The calls that are timed: an entry point, and a bare ``jax.jit`` of what it lowers to, over the same tiny arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import paged
from paged import compat

Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, PAGES = 4, 2, 8, 4, 16
SPEC = paged.AttentionSpec(num_q_heads=Q_HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, window=8)
LAYOUT = paged.PageLayout(page_size=PAGE_SIZE, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=jnp.float32)


class Pair(NamedTuple):
    """Two functions of no arguments that launch the same computation."""

    wrapped: Callable[[], Any]
    bare: Callable[[], Any]


def pairs() -> dict[str, Pair]:
    """By what is called: the native surface under ``jax.jit`` and outside of it, and the field's entry points."""
    return {**_native(), **_compat()}


def _native() -> dict[str, Pair]:
    """Outside of ``jax.jit`` a call always computes the log-sum-exps too, and so does what is beside it."""
    attend = paged.lower(SPEC, LAYOUT, "xla")
    (q, k, v), lengths, tables = _arrays()
    pages, batch = LAYOUT.init(PAGES), paged.RaggedBatch.decode(lengths, tables)
    read = (q, pages.arrays[0], batch.lengths, batch.block_tables, batch.query_starts, batch.num_seqs)
    write = (q, k, v, *read[1:])

    def out(q: jax.Array, pool: jax.Array, *integers: jax.Array) -> jax.Array:
        return attend(q, LAYOUT.wrap(pool), paged.RaggedBatch(*integers, query_rows=1))

    def state(q: jax.Array, pool: jax.Array, *integers: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(attend.state(q, LAYOUT.wrap(pool), paged.RaggedBatch(*integers, query_rows=1)))

    def update(
        q: jax.Array, k: jax.Array, v: jax.Array, pool: jax.Array, *integers: jax.Array
    ) -> tuple[jax.Array, ...]:
        out, pages = attend.update(q, k, v, LAYOUT.wrap(pool), paged.RaggedBatch(*integers, query_rows=1))
        return out, pages.arrays[0]

    def updated_state(
        q: jax.Array, k: jax.Array, v: jax.Array, pool: jax.Array, *integers: jax.Array
    ) -> tuple[jax.Array, ...]:
        batch = paged.RaggedBatch(*integers, query_rows=1)
        state, pages = attend.update_state(q, k, v, LAYOUT.wrap(pool), batch)
        return *state, pages.arrays[0]

    def beside(call: Callable[[], Any], function: Callable[..., Any], args: tuple[jax.Array, ...]) -> Pair:
        bare = jax.jit(function)
        return Pair(call, lambda: bare(*args))

    jitted, jitted_update = jax.jit(attend.__call__), jax.jit(attend.update)
    return {
        "jax.jit(attend)": beside(lambda: jitted(q, pages, batch), out, read),
        "jax.jit(attend.update)": beside(lambda: jitted_update(q, k, v, pages, batch), update, write),
        "attend": beside(lambda: attend(q, pages, batch), state, read),
        "attend.update": beside(lambda: attend.update(q, k, v, pages, batch), updated_state, write),
    }


def _compat() -> dict[str, Pair]:
    (q, k, v), lengths, tables = _arrays()
    split = jnp.zeros((KV_HEADS, PAGES, PAGE_SIZE, HEAD_DIM))
    pages = jnp.zeros((PAGES, PAGE_SIZE, 2 * KV_HEADS, HEAD_DIM))
    starts, live = jnp.arange(3, dtype=jnp.int32), jnp.array([2], jnp.int32)
    ends, flat = jnp.array([2, 2, 2], jnp.int32), tables.reshape(-1)
    said = {"target": "xla", "sliding_window": 8}
    calls = {
        "page_attention": (compat.page_attention, (q, split, split, lengths, tables)),
        "prefill_page_attention": (compat.prefill_page_attention, (q, split, split, lengths[:1], tables[0])),
        "ragged_page_attention_v2": (compat.ragged_page_attention_v2, (q, pages, lengths, tables, starts, live)),
    }
    made = {name: _pair(function, args, said) for name, (function, args) in calls.items()}
    integers = (lengths, flat, starts, ends)
    made["ragged_page_attention_v3"] = _donating_pair(compat.ragged_page_attention_v3, pages, (q, k, v), integers, said)
    return made


def _pair(function: Callable[..., Any], args: tuple[Any, ...], said: dict[str, Any]) -> Pair:
    bare = jax.jit(lambda *args: function(*args, **said))
    return Pair(lambda: function(*args, **said), lambda: bare(*args))


def _donating_pair(
    function: Callable[..., Any], pages: jax.Array, new: Any, integers: Any, said: dict[str, Any]
) -> Pair:
    """Of a function that takes its cache and gives it back."""
    bare = jax.jit(lambda *args: function(*args, **said), donate_argnums=3)
    own, other = [pages], [jnp.array(pages)]

    def wrapped() -> Any:
        out, own[0] = function(*new, own[0], *integers, **said)
        return out

    def without() -> Any:
        out, other[0] = bare(*new, other[0], *integers)
        return out

    return Pair(wrapped, without)


def _arrays() -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Queries, keys and values of two sequences, their lengths and tables."""
    heads = (Q_HEADS, KV_HEADS, KV_HEADS)
    new = [jax.random.normal(jax.random.key(i), (2, n, HEAD_DIM)) for i, n in enumerate(heads)]
    tables = jnp.array([[3, 1, 2, 0], [5, 4, 0, 0]], jnp.int32)
    return new, jnp.array([9, 5], jnp.int32), tables
