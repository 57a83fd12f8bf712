"""`build`: a case's arrays, in which every offset of every page that holds no live token is poison."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paged.spec import Pages, RaggedBatch

from .brought import Brought, Pairs, batch_arrays
from .cases import Case

SPREAD = 3.0  # inputs are about 3 x normal: scores then reach +-30, and a softmax is nowhere near uniform
_GARBAGE = (-1, -9, 10**6, -(2**31), 2**31 - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Built:
    """A case's arrays for a lowering, and what is known of them.

    ``k`` and ``v`` are this step's own tokens, for `update`. ``is_held[page, offset]`` says where pages hold a live
    token. ``visible[row]`` lists the tokens that a head of a row sees by brute force, None for padding rows, and
    ``by_head[row]`` says for each head which of these. ``row_of[row]`` is a row's sequence and its place there.
    ``pairs`` is what masks and scores see of rows and keys. ``error_unit[row]`` is, for each head, the largest
    ``scale * sum_d |q_d k_d|`` over the visible keys, and the largest ``|v|``.
    """

    case: Case
    q: jax.Array
    k: jax.Array
    v: jax.Array
    pages: Pages
    batch: RaggedBatch
    sinks: jax.Array | None
    is_held: np.ndarray
    visible: list[np.ndarray | None]
    by_head: list[np.ndarray | None]
    error_unit: np.ndarray
    row_of: list[tuple[int, int] | None]
    pairs: Pairs

    def with_batch(self, **changes: Any) -> "Built":
        """These arrays with some values of the batch changed, such as ``lengths``.

        Each row may then see what any row saw: its ``error_unit`` is the largest of all. ``visible`` and ``row_of``
        stay.
        """
        is_even = self.batch.has_even_starts and "query_starts" not in changes
        batch = dataclasses.replace(self.batch, **{"has_even_starts": is_even, "checked_for": None, **changes})
        largest = np.broadcast_to(self.error_unit.max(axis=(0, 2), keepdims=True), self.error_unit.shape)
        return dataclasses.replace(self, batch=batch, error_unit=largest)

    def rows_first(self, rows: np.ndarray) -> dict[str, Any]:
        """What the batch brings for these rows, moved to the first rows; garbage in the rows after them."""
        brought = {name: getattr(self.batch, name) for name in ("positions", "ancestors")}
        return {name: jnp.full_like(x, -7).at[: len(rows)].set(x[rows]) for name, x in brought.items() if x is not None}


def build(
    case: Case, *, physical_seed: int = 0, changed: tuple[int, ...] = (), hold_new: bool = True, padding_seed: int = 0
) -> Built:
    """Arrays of a case, in which every place of every page that holds no live token is poison.

    **Arguments:**

    - `case`: the case.
    - `physical_seed`: moves pages about in the pool and redraws garbage. It changes nothing that may matter.
    - `changed`: sequences whose contents and lengths are drawn anew.
    - `hold_new`: whether the pages hold this step's own tokens. Without, the places where they will be written hold
      poison too.
    - `padding_seed`: redraws the queries of rows of no sequence.

    **Returns:** the arrays, and what is known of them.

    >>> built = build(Case(spec=AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8), phase="decode"))
    >>> built.batch.lengths.tolist(), [len(seen) for seen in built.visible]
    ([9, 1, 0, 4, 15], [9, 1, 0, 4, 15])
    >>> int(jnp.isnan(built.pages.keys()).any(-1).sum()) > 0
    True
    """
    lengths, rows, live = case.values()
    lengths = [max(1, n - 2) if s in changed else n for s, n in enumerate(lengths)]
    drawn = [_draw_sequence(case, s, lengths[s], s in changed) for s in range(case.slots)]
    starts = np.concatenate([[0], np.cumsum(rows)])
    tokens = case.tokens if case.phase == "ragged" else starts[-1]
    q = _normal(case, 90, (tokens, case.spec.num_q_heads, case.spec.head_dim))
    q[starts[live] :] = _normal(case, 91 + padding_seed, q[starts[live] :].shape)

    pool = _Pool.empty(case, np.random.default_rng([case.seed, 7, physical_seed]))
    tables = pool.garbage_tables()
    brought = [Brought.draw(case, s, lengths[s], rows[s], s in changed) for s in range(live)]
    pairs = Pairs.of(case, brought, starts, tokens)
    sees = pairs.visible(case.spec)
    visible: list[np.ndarray | None] = [None] * tokens
    by_head: list[np.ndarray | None] = [None] * tokens
    row_of: list[tuple[int, int] | None] = [None] * tokens
    for s in range(live):
        own = sees[starts[s] : starts[s] + rows[s], :, : lengths[s]]
        for i in range(rows[s]):
            visible[starts[s] + i], row_of[starts[s] + i] = np.flatnonzero(own[i].any(0)), (s, lengths[s] - rows[s] + i)
            by_head[starts[s] + i] = own[i][:, own[i].any(0)]
        written = np.arange(max(0, lengths[s] - rows[s]), min(lengths[s], case.capacity))
        needed = np.union1d(np.flatnonzero(own.any(axis=(0, 1))), written) // case.page_size
        held = np.arange(min(lengths[s] if hold_new else max(0, lengths[s] - rows[s]), case.capacity))
        pool.store(s, np.unique(needed), held, drawn[s], tables)
    pages, k_live, v_live = pool.pages()

    k, v = (np.full((tokens, case.spec.num_kv_heads, x.shape[-1]), np.nan, np.float32) for x in drawn[0])
    for row, owner in enumerate(row_of):
        if owner is not None and 0 <= owner[1] < case.capacity:
            k[row], v[row] = (x[:, owner[1]] for x in drawn[owner[0]])
    at = [
        None if w is None or j is None else (tables[w[0], j // case.page_size], j % case.page_size)
        for w, j in zip(row_of, visible, strict=True)
    ]
    error_unit = np.array([_error_unit(case, q[i], where, by_head[i], k_live, v_live) for i, where in enumerate(at)])
    more = batch_arrays(case, brought, starts, int(tokens), np.random.default_rng([case.seed, 8, physical_seed]))
    batch = _batch(case, lengths, rows, live, tables, more)
    q, k, v = (jnp.asarray(x, jnp.dtype(case.q_dtype)) for x in (q, k, v))
    return Built(case, q, k, v, pages, batch, _sinks(case), pool.is_held, visible, by_head, error_unit, row_of, pairs)


def _error_unit(
    case: Case, q: np.ndarray, where: tuple | None, by_head: np.ndarray | None, k: np.ndarray, v: np.ndarray
) -> np.ndarray:
    """For each head of a row, see `Built.error_unit`; 1 where nothing is visible."""
    heads, group = case.spec.num_q_heads, case.spec.group
    if where is None or by_head is None or not len(where[0]):
        return np.ones((2, heads))
    is_seen = np.broadcast_to(by_head, (heads, len(where[0]))).T
    k, v = (np.abs(np.repeat(x[where[0], :, where[1]], group, axis=1)) for x in (k, v))
    condition = np.where(is_seen, case.spec.softmax_scale * np.einsum("hd,jhd->jh", np.abs(q), k), 0).max(axis=0)
    largest = np.where(is_seen[..., None], v, 0).max(axis=(0, 2))
    none = ~is_seen.any(axis=0)
    return np.where(none, 1.0, np.stack([np.nan_to_num(condition, nan=1.0), np.nan_to_num(largest, nan=1.0)]))


def _batch(
    case: Case, lengths: list[int], rows: list[int], live: int, tables: np.ndarray, more: dict[str, Any]
) -> RaggedBatch:
    """The batch, with garbage in everything that dead slots own."""
    known = np.array(lengths)
    known[live:] = np.resize([9, -7, 10**6, -(2**31), 2**31 - 1], case.slots)[: case.slots - live]
    if case.phase == "prefill":
        even = RaggedBatch.prefill(known[0], tables[0], case.rows)
        return RaggedBatch(known, tables, even.query_starts, live, query_rows=case.rows, has_even_starts=True, **more)
    if case.phase == "decode":
        return RaggedBatch.decode(known, tables, live, query_rows=case.rows, **more)
    starts = np.concatenate([[0], np.cumsum(rows)])
    # The first dead slot claims every padding row, in plausible numbers; those after it are nonsense.
    starts[live + 1 :] = np.resize([case.tokens, 10**6, -4, 2, -(2**31)], case.slots)[: case.slots - live]
    return RaggedBatch(known, tables, starts, live, **more)


def _normal(case: Case, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([case.seed, stream]).normal(0, SPREAD, shape).astype(np.float32)


def _draw_sequence(case: Case, s: int, length: int, is_changed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values ``[kv_heads, length, dim]`` of one sequence; they depend on nothing but the sequence."""
    heads, layout = case.spec.num_kv_heads, case.layout
    full = case.capacity
    streams = (200 + s, 300 + s) if is_changed else (s, 100 + s)
    k, v = (
        _normal(case, stream, (full, heads, dim))
        for stream, dim in zip(streams, (layout.head_dim, layout.value_dim), strict=True)
    )
    return np.moveaxis(k, 1, 0)[:, :length], np.moveaxis(v, 1, 0)[:, :length]


def _sinks(case: Case) -> jax.Array | None:
    if case.sink_shape is None:
        return None
    return jnp.asarray(_normal(case, 50, case.sink_shape))


@dataclasses.dataclass(frozen=True)
class _Pool:
    """A pool under construction, as ``[pages, kv_heads, page_size, dim]`` of what the pages will store."""

    case: Case
    rng: np.random.Generator
    physical: np.ndarray
    raw: tuple[np.ndarray, np.ndarray]
    scales: tuple[np.ndarray, np.ndarray] | None
    is_held: np.ndarray

    @classmethod
    def empty(cls, case: Case, rng: np.random.Generator) -> "_Pool":
        layout, n = case.layout, case.num_pages
        head = (n, layout.num_kv_heads, layout.page_size)
        k, v = (_poison(rng, case.dtype, (*head, dim)) for dim in (layout.head_dim, layout.value_dim))
        scales = None
        if case.scales is not None:
            shape = {"tensor": (), "head": (layout.num_kv_heads,), "token": head}[case.scales]
            base = 3 * SPREAD / 127 if case.dtype == "int8" else 0.5
            k_scale, v_scale = (
                np.full(shape, np.nan, np.float32)
                if case.scales == "token"
                else base * np.random.default_rng([case.seed, 60 + i]).uniform(0.7, 1.4, shape).astype(np.float32)
                for i in range(2)
            )
            scales = k_scale, v_scale
        return cls(case, rng, rng.permutation(n), (k, v), scales, np.zeros((n, layout.page_size), bool))

    def garbage_tables(self) -> np.ndarray:
        """Tables of nothing but garbage: ids out of the pool, and ids of pages that may be someone else's.

        Dead slots have ids in the pool alone, which look like anybody's.
        """
        shape = (self.case.slots, self.case.pages_per_seq)
        inside = self.rng.integers(0, self.case.num_pages, shape)
        is_inside = (self.rng.random(shape) < 0.5) | (np.arange(shape[0])[:, None] >= self.case.values()[2])
        return np.where(is_inside, inside, self.rng.choice(_GARBAGE, shape)).astype(np.int32)

    def store(self, s: int, needed: np.ndarray, held: np.ndarray, drawn: Any, tables: np.ndarray) -> None:
        """Map a sequence's needed pages, and put the held tokens that lie in them at their offsets."""
        tables[s, needed] = self.physical[s * self.case.pages_per_seq + needed]
        held = held[np.isin(held // self.case.page_size, needed)]
        page, offset = tables[s, held // self.case.page_size], held % self.case.page_size
        self.is_held[page, offset] = True
        for which, x in enumerate(drawn):
            rows = np.moveaxis(x[:, held], 0, 1)  # [held, kv_heads, dim]
            if self.scales is not None:
                rows = self._quantise(which, rows, page, offset)
            self.raw[which][page, :, offset] = rows.astype(self.raw[which].dtype)

    def _quantise(self, which: int, rows: np.ndarray, page: np.ndarray, offset: np.ndarray) -> np.ndarray:
        scale = self.scales[which]  # pyright: ignore
        if self.case.scales == "token":
            scale[page, :, offset] = np.abs(rows).max(axis=-1) / (127 if self.case.dtype == "int8" else 12.0)
            rows = rows / scale[page, :, offset][..., None]
        else:
            rows = rows / (scale[:, None] if scale.ndim else scale)
        return np.clip(np.round(rows), -127, 127) if self.case.dtype == "int8" else rows

    def pages(self) -> tuple[Pages, np.ndarray, np.ndarray]:
        """The pages in the case's order; and dequantised, keys and values as ``[pages, kv_heads, offset, dim]``."""
        layout, (k, v) = self.case.layout, self.raw
        tokens = layout.stack(*(jnp.asarray(x.swapaxes(1, 2)) for x in (k, v)))  # [pages, page_size, ..]
        arrays = [np.moveaxis(np.asarray(x), (0, 1), (layout.page_axis, layout.offset_axis)) for x in tokens]
        k, v = (x.astype(np.float64) for x in (k, v))
        scales: dict[str, Any] = {}
        if self.scales is not None:
            scales = {name: jnp.asarray(x) for name, x in zip(("k_scale", "v_scale"), self.scales, strict=True)}
            broadcast = [x[..., None] if x.ndim == 3 else x.reshape(-1, 1, 1) for x in self.scales]
            k, v = k * broadcast[0], v * broadcast[1]
        return layout.wrap(*(jnp.asarray(x) for x in arrays), **scales), k, v


def _poison(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """What must never be seen: NaN and infinities, or the largest integers."""
    if dtype == "int8":
        return rng.choice(np.array([-128, 127], np.int8), shape)
    poison = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32), shape, p=[0.8, 0.1, 0.1])
    return poison.astype(jnp.dtype(dtype))


def layers_of(built: Built, count: int) -> tuple[list[Any], Any]:
    """``(q, k, v, pages)`` of each of so many layers of a model, whose tables are those of one batch; and stacked."""
    one = (built.q, built.k, built.v, built.pages)
    layers = [jax.tree.map(lambda x, i=i: x * (-0.5) ** i, one) for i in range(count)]
    return layers, jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
