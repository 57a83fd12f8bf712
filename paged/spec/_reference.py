"""The reference: the meaning of a spec as plain code. It is slow, and shares no code with the lowerings."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .attention import AttentionSpec
from .batch import RaggedBatch
from .given import Given
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
    """Attention as `docs/semantics.md` defines it, with all scores in memory. It is for tests and for reading.

    **Arguments:**

    - `spec`: the attention.
    - `q`, `pages`, `batch`, `sinks`: as in a call of a lowered attention, see `paged.Attend`. A float64 ``q``, with
      ``jax_enable_x64``, makes it compute in float64, and otherwise it computes in float32.

    **Returns:** the output in the dtype of ``q``: 0 in empty rows and in rows of no sequence. Memory and time grow with
    the number of rows times the tokens that a table can hold.

    **Raises:** ``ValueError`` or ``TypeError`` for sinks that do not fit the spec, see `require_sinks`.

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
    """`reference`, and the log-sum-exp.

    **Arguments, raises:** as in `reference`.

    **Returns:** the `AttentionState`. In an empty row ``lse`` is ``-inf``, or the logarithm of the sinks' sum; in a row
    of no sequence it is ``-inf``.

    >>> spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=4)
    >>> layout = PageLayout(page_size=2, num_kv_heads=1, head_dim=4, dtype=jnp.float32)
    >>> batch = RaggedBatch.decode(lengths=[0], block_tables=[[1, 0]])
    >>> reference_state(spec, jnp.ones((1, 2, 4)), layout.init(num_pages=2), batch).lse.tolist()
    [[-inf, -inf]]
    """
    require_sinks(spec, sinks)
    tokens, dtype = q.shape[0], jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    if not batch.has_rows(tokens):
        return AttentionState.empty(tokens, spec.num_q_heads, pages.layout.value_dim, q.dtype)
    row = _rows(batch, tokens)
    j, keys, values, is_stored = _sequence_keys(pages, batch, row, dtype)

    p, h = row.position[:, None, None], jnp.arange(spec.num_q_heads, dtype=jnp.int32)[None, :, None]
    given, j = _given(spec, batch, row, j), _key_positions(batch, row, j)[:, None]
    mask: Any = spec.visibility.given(given._replace(head=h))
    is_visible = mask(p, j) & is_stored[:, None, :] & row.is_live[:, None, None]
    # An old table entry may lead to another sequence's NaN, and a weight of 0 times NaN is NaN: select, and then weigh.
    is_needed = is_visible.any(axis=1)[:, :, None, None]
    keys, values = (jnp.where(is_needed, x, 0) for x in (keys, values))

    grouped = q.astype(dtype).reshape(tokens, spec.num_kv_heads, spec.group, -1)
    s = jnp.einsum("thgd,tjhd->thgj", grouped, keys, precision="highest") * spec.softmax_scale
    s = s.reshape(tokens, spec.num_q_heads, -1)
    for op in spec.score_ops:
        with_numbers: Any = op.given(given)
        s = with_numbers(s, p, j, h).astype(s.dtype)
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
    """For each query row: whether a live sequence owns it, and that sequence's slot and length.

    ``place`` is the row's place in the sequence, ``position`` what masks and scores see, and ``first`` and ``place0``
    are the first row of the sequence and its place.
    """

    is_live: Bool[Array, " tokens"]
    seq: Int[Array, " tokens"]
    length: Int[Array, " tokens"]
    place: Int[Array, " tokens"]
    position: Int[Array, " tokens"]
    first: Int[Array, " tokens"]
    place0: Int[Array, " tokens"]


def _rows(batch: RaggedBatch, tokens: int) -> _Rows:
    slots = jnp.arange(batch.num_slots, dtype=jnp.int32)
    is_live_slot = slots < batch.num_seqs
    start, stop = batch.query_starts[:-1], batch.query_starts[1:]
    row = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    owns = (row >= start[None]) & (row < stop[None]) & is_live_slot[None]  # [tokens, seqs]
    seq = jax.lax.argmax(owns, axis=1, index_dtype=jnp.int32)
    length = jnp.maximum(batch.lengths, 0)[seq]
    place0 = length - (stop - start)[seq]
    place = place0 + row[:, 0] - start[seq]
    position = place if batch.positions is None else batch.positions
    return _Rows(owns.any(axis=1), seq, length, place, position, start[seq], place0)


def _own_row(row: _Rows, j: Int[Array, " positions"]) -> Array:
    """For each row and key, the number of the step's own row that the key is; negative before the step's own."""
    return j[None] - row.place0[:, None]


def _key_positions(batch: RaggedBatch, row: _Rows, j: Int[Array, " positions"]) -> Array:
    """What masks and scores see of each key of each row's sequence."""
    if batch.positions is None:
        return j[None]
    own = _own_row(row, j)
    at = jnp.clip(row.first[:, None] + own, 0, batch.positions.shape[0] - 1)
    return jnp.where((own >= 0) & (j[None] < row.length[:, None]), batch.positions[at], j[None])


def _given(spec: AttentionSpec, batch: RaggedBatch, row: _Rows, j: Int[Array, " positions"]) -> Given:
    """What the batch brings for each row, to broadcast against [tokens, heads, positions]."""
    numbers: dict[str, Any] = {}
    for value in spec.values:
        x = batch.values[value.name][row.seq][:, None, None]
        numbers[value.name] = x if value.size is None else tuple(x[..., i] for i in range(value.size))
    if not spec.has_ancestors or batch.ancestors is None:
        return Given(numbers, is_ancestor=True)
    own, words = _own_row(row, j), batch.ancestors
    word = jnp.take_along_axis(words, jnp.clip(own // 32, 0, words.shape[1] - 1), axis=1)
    has_bit = ((jax.lax.shift_right_logical(word, own % 32) & 1) == 1) & (own < 32 * words.shape[1])
    is_ancestor = (own < 0) | (own == (row.place - row.place0)[:, None]) | has_bit
    return Given(numbers, is_ancestor=is_ancestor[:, None])


def _sequence_keys(pages: Pages, batch: RaggedBatch, row: _Rows, dtype: Any) -> tuple[Array, Array, Array, Array]:
    """Key positions; for each query row the keys and values there, 0 where none is stored; and which are stored."""
    size = pages.layout.page_size
    j = jnp.arange(batch.pages_per_seq * size, dtype=jnp.int32)
    page = batch.block_tables[row.seq][:, j // size]  # [tokens, positions]
    is_stored = (j[None] < row.length[:, None]) & (page >= 0) & (page < pages.num_pages)
    page = jnp.where(is_stored, page, 0)

    def read(pool: Array) -> Array:
        rows = pool[page, :, (j % size)[None]].astype(dtype)  # [tokens, positions, kv_heads, dim]
        return jnp.where(is_stored[..., None, None], rows, 0)

    return j, read(pages.keys()), read(pages.values()), is_stored


def _like(flags: Array, array: Array) -> Array:
    return flags.reshape(flags.shape + (1,) * (array.ndim - 1))
