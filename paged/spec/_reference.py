"""The reference: what a spec means, dense and readable. Slow, and kept free of everything the lowerings do."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .attention import AttentionSpec
from .batch import RaggedBatch
from .layout import Pages
from .sinks import Sinks, require_sinks, sinks_per_head
from .state import AttentionState, add_sinks


def reference(
    spec: AttentionSpec,
    q: Float[Array, "tokens q_heads head_dim"],
    pages: Pages,
    batch: RaggedBatch,
    sinks: Sinks | None = None,
) -> Float[Array, "tokens q_heads value_dim"]:
    """Attention as `docs/semantics.md` defines it, with every score in memory; for tests and for understanding.

    Takes and gives what a lowered call does: ``q`` float[tokens, q_heads, head_dim], output in ``q``'s dtype, 0 for
    empty rows and for rows of no sequence. Computes in float32, or in float64 when ``q`` is float64 (with
    ``jax_enable_x64``). Memory and time grow with tokens x table width.

    >>> spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=4)
    >>> layout = PageLayout(page_size=2, num_kv_heads=1, head_dim=4, dtype=jnp.float32)
    >>> batch = RaggedBatch.decode(lengths=[3], block_tables=[[1, 0]])
    >>> reference(spec, jnp.ones((1, 2, 4)), layout.init(num_pages=2), batch).shape
    (1, 2, 4)
    """
    return reference_state(spec, q, pages, batch, sinks).out


def reference_state(
    spec: AttentionSpec,
    q: Float[Array, "tokens q_heads head_dim"],
    pages: Pages,
    batch: RaggedBatch,
    sinks: Sinks | None = None,
) -> AttentionState:
    """`reference` together with the log-sum-exp; ``lse`` is ``-inf`` (or the sink) for an empty row."""
    require_sinks(spec, sinks)
    tokens, dtype = q.shape[0], jnp.promote_types(q.dtype, jnp.float32)
    if not batch.has_rows(tokens):
        return AttentionState.empty(tokens, spec.num_q_heads, pages.layout.value_dim, q.dtype)
    row = _rows(batch, tokens)
    j, keys, values, is_stored = _sequence_keys(pages, batch, row, dtype)

    p, h = row.position[:, None, None], jnp.arange(spec.num_q_heads)[:, None]
    is_visible = spec.visibility(p, j) & is_stored[:, None, :] & row.is_live[:, None, None]
    # A stale table entry may lead to another sequence's NaN, which a weight of 0 does not silence.
    keys, values = (jnp.where(is_visible[:, 0, :, None, None], x, 0) for x in (keys, values))

    grouped = q.astype(dtype).reshape(tokens, spec.num_kv_heads, spec.group, -1)
    s = jnp.einsum("thgd,tjhd->thgj", grouped, keys, precision="highest") * spec.softmax_scale
    s = s.reshape(tokens, spec.num_q_heads, -1)
    for op in spec.score_ops:
        s = op(s, p, j, h)
    s = jnp.where(is_visible, s, -jnp.inf)

    top = jnp.max(s, axis=-1, keepdims=True, initial=-jnp.inf)
    weights = jnp.exp(s - jnp.where(jnp.isneginf(top), 0.0, top))
    total = weights.sum(axis=-1, keepdims=True)
    weights = (weights / jnp.where(total == 0, 1.0, total)).reshape(tokens, spec.num_kv_heads, spec.group, -1)
    out = jnp.einsum("thgj,tjhd->thgd", weights, values, precision="highest").reshape(tokens, spec.num_q_heads, -1)
    state = AttentionState(out, (jnp.log(total) + top)[..., 0])
    if sinks is not None:
        with_sinks = add_sinks(state, sinks_per_head(spec, sinks))
        state = AttentionState(
            *(jnp.where(_like(row.is_live, x), x, y) for x, y in zip(with_sinks, state, strict=True))
        )
    return AttentionState(state.out.astype(q.dtype), state.lse.astype(jnp.float32))


class _Rows(NamedTuple):
    """What each query row is: whether a live sequence owns it, and if so which, that one's length, and its position."""

    is_live: Bool[Array, " tokens"]
    seq: Int[Array, " tokens"]
    length: Int[Array, " tokens"]
    position: Int[Array, " tokens"]


def _rows(batch: RaggedBatch, tokens: int) -> _Rows:
    slots = jnp.arange(batch.num_slots)
    is_live_slot = slots < batch.num_seqs
    start, stop = batch.query_starts[:-1], batch.query_starts[1:]
    row = jnp.arange(tokens)[:, None]
    owns = (row >= start) & (row < stop) & is_live_slot  # [tokens, seqs]
    seq = jnp.argmax(owns, axis=1)
    length = jnp.maximum(batch.lengths, 0)[seq]
    position = length - (stop - start)[seq] + row[:, 0] - start[seq]
    return _Rows(owns.any(axis=1), seq, length, position)


def _sequence_keys(pages: Pages, batch: RaggedBatch, row: _Rows, dtype: Any) -> tuple[Array, Array, Array, Array]:
    """For each row: key positions, keys, values (0 where none is stored) and which positions are stored."""
    size = pages.layout.page_size
    j = jnp.arange(batch.pages_per_seq * size)
    page = batch.block_tables[row.seq][:, j // size]  # [tokens, positions]
    is_stored = (j < row.length[:, None]) & (page >= 0) & (page < pages.num_pages)
    page = jnp.where(is_stored, page, 0)

    def read(pool: Array) -> Array:
        rows = pool[page, :, j % size].astype(dtype)  # [tokens, positions, kv_heads, dim]
        return jnp.where(is_stored[..., None, None], rows, 0)

    return j, read(pages.keys()), read(pages.values()), is_stored


def _like(flags: Array, array: Array) -> Array:
    return flags.reshape(flags.shape + (1,) * (array.ndim - 1))
