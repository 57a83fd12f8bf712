"""`check_write`: new tokens go to their own places in the pages, and no other bit changes; beside a loop in Python."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paged.lower import write
from paged.spec import PageLayout, Pages, RaggedBatch

from .failures import CheckFailure
from .interpreter import watched

# ``f(k, v, pages, batch) -> pages``, as `paged.write` is.
Write = Callable[[jax.Array, jax.Array, Pages, RaggedBatch], Pages]

_WIDTH, _SLOTS, _TOKENS = 5, 8, 128
_GARBAGE = (-1, -7, 10**6, -(2**31), 2**31 - 1)
WRITES: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
    "mixed": ([70, 9, 0, 5, 40, 3, 33, 16], [45, 1, 0, 5, 16, 2, 1, 16], {}),
    "every start, 1 row": ([start + 1 for start in range(16, 24)], [1] * 8, {}),
    "every start, 9 rows": ([start + 9 for start in range(16, 24)], [9] * 8, {}),
    "every end": (list(range(40, 48)), [11, 12, 13, 14, 15, 16, 17, 18], {}),
    "holes": ([70, 40, 24, 65, 16, 9, 80, 1], [30, 20, 10, 9, 16, 1, 33, 1], {"holes": True}),
    "more rows than tokens": ([3, 8, 0, 21, 1, 0, 16, 7], [9, 16, 5, 30, 2, 1, 17, 7], {}),
    "few live": ([20, 17, 33, 50, 8, 8, 8, 8], [20, 2, 3, 16, 8, 8, 8, 8], {"num_seqs": 3}),
    "past the table": ([1000, 81, 80, 79, 10**6, -4, 5, 2], [20, 3, 8, 9, 24, 3, 5, 2], {}),
    "neighbours": ([19, 21, 24, 18, 20, 40, 16, 1], [3, 2, 3, 1, 2, 20, 16, 1], {"shared": ((0, 1, 2), (3, 4))}),
    "shared pages": (
        [70, 9, 0, 5, 40, 3, 33, 17],
        [45, 1, 0, 5, 16, 2, 1, 1],
        {"copies": (0, 1, 2, 5, -1, 6, 10**6, 3)},
    ),
    "no rows": ([50] * 8, [0] * 8, {}),
}
"""The batches of `check_write`, by name: lengths and rows of eight sequences, and what else a batch has."""


def check_write(
    write: Write, *, layouts: Iterable[PageLayout] | None = None, batches: Iterable[str] = tuple(WRITES)
) -> None:
    """Check that a write puts every row of a live sequence into its place, and changes no other bit of the pages.

    The pages begin as other values for every place, a part of them NaN. Batches have holes in their tables, more rows
    than tokens, dead slots, rows past the table, sequences that write to neighbouring places of one page, and
    sequences whose page is copied first from one that others hold. A kernel that is interpreted is `watched`.

    **Arguments:**

    - `write`: ``write(k, v, pages, batch)`` returns the pages, as `paged.write` does. Rows are float32
      [128, kv_heads, head_dim].
    - `layouts`: page layouts; by default float32 pages of 16 tokens. Float pages are compared with a loop over the
      rows, quantised ones with `paged.write` on XLA.
    - `batches`: names in `WRITES`.

    **Raises:** `CheckFailure` named ``"writes"`` with the first place that is wrong, or of `KERNEL_CHECKS`.

    >>> check_write(paged.write, batches=["holes"])
    """
    default = PageLayout(page_size=16, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
    run = jax.jit(write)
    for layout in (default,) if layouts is None else layouts:
        pages, (k, v) = _pages(layout), _rows(layout)
        for name in batches:
            batch = _batch(name, layout.page_size, pages.num_pages)
            require_written(watched(run, k, v, pages, batch), k, v, pages, batch, f'the batch "{name}", {layout}')


def require_written(got: Pages, k: jax.Array, v: jax.Array, pages: Pages, batch: RaggedBatch, where: str) -> None:
    """Raise `CheckFailure` unless ``got`` is ``pages`` with the batch's rows in their places, to the bit."""
    want = written_by_loop(k, v, pages, batch) if not pages.layout.is_quantised else write(k, v, pages, batch, "xla")
    layout = pages.layout
    for which, (a, b) in enumerate(zip(got.arrays, want.arrays, strict=True)):
        axes = layout.page_axis, layout.offset_axis
        a, b = (np.moveaxis(np.asarray(x), axes, (0, 1)) for x in (a, b))
        wrong = np.argwhere((_bits(a) != _bits(b)).reshape(*a.shape[:2], -1).any(-1))
        if len(wrong):
            place = tuple(int(x) for x in wrong[0])
            raise CheckFailure(
                "writes",
                f"in array {which} of the pages, {len(wrong)} places are wrong, the first of them (page, offset) = "
                f"{place}, in {where}",
            )
    for a, b in zip((got.k_scale, got.v_scale), (want.k_scale, want.v_scale), strict=True):
        if b is not None and not np.array_equal(_bits(np.asarray(a)), _bits(np.asarray(b))):
            raise CheckFailure("writes", f"scales of the pages are wrong, in {where}")


def written_by_loop(k: jax.Array, v: jax.Array, pages: Pages, batch: RaggedBatch) -> Pages:
    """Float pages with every row of a live sequence in its place, one row after the other."""
    layout = pages.layout
    axes = layout.page_axis, layout.offset_axis
    pages = layout.wrap(*_copied(pages, batch))
    arrays = [np.moveaxis(np.array(x), axes, (0, 1)) for x in pages.arrays]
    rows = [np.asarray(x) for x in layout.stack(*(x.astype(layout.dtype) for x in (k, v)))]
    starts, tables = np.asarray(batch.query_starts), np.asarray(batch.block_tables)
    for slot in range(int(batch.num_seqs)):
        count, length = int(starts[slot + 1]) - int(starts[slot]), max(int(batch.lengths[slot]), 0)
        for i in range(count):
            entry, offset = divmod(length - count + i, layout.page_size)
            page = int(tables[slot, entry]) if 0 <= entry < tables.shape[1] else -1
            if 0 <= page < pages.num_pages:
                for array, row in zip(arrays, rows, strict=True):
                    array[page, offset] = row[int(starts[slot]) + i]
    return layout.wrap(*(jnp.asarray(np.moveaxis(x, (0, 1), axes)) for x in arrays))


def _copied(pages: Pages, batch: RaggedBatch) -> list[jax.Array]:
    """The arrays of the pages after the batch's copies."""
    arrays = [np.moveaxis(np.array(x), pages.layout.page_axis, 0) for x in pages.arrays]
    if batch.copy_from is None:
        return list(pages.arrays)
    before, rows = [x.copy() for x in arrays], np.diff(np.asarray(batch.query_starts))
    for slot in range(int(batch.num_seqs)):
        first, source = int(batch.lengths[slot]) - int(rows[slot]), int(batch.copy_from[slot])
        if rows[slot] > 0 and first >= 0 and 0 <= source < pages.num_pages:
            page = int(batch.block_tables[slot, first // pages.layout.page_size])
            for array, old in zip(arrays, before, strict=True):
                array[page] = old[source]
    return [jnp.asarray(np.moveaxis(x, 0, pages.layout.page_axis)) for x in arrays]


def _pages(layout: PageLayout) -> Pages:
    """A pool of other values for every token, some of them NaN."""
    rng, num_pages = np.random.default_rng(0), _SLOTS * _WIDTH + 8
    arrays = []
    for shape in layout.array_shapes(num_pages):
        values = rng.integers(-128, 128, shape) if layout.dtype == jnp.int8 else rng.normal(0, 3, shape)
        if layout.dtype != jnp.int8:
            values[rng.random(shape) < 0.3] = np.nan
        arrays.append(jnp.asarray(values, layout.dtype))
    shape = layout.scale_shape(num_pages)
    if shape is None:
        return layout.wrap(*arrays)
    scales = (jnp.asarray(rng.uniform(0.01, 0.1, shape), jnp.float32) for _ in range(2))
    return layout.wrap(*arrays, **dict(zip(("k_scale", "v_scale"), scales, strict=True)))


def _rows(layout: PageLayout) -> tuple[jax.Array, jax.Array]:
    rng, dims = np.random.default_rng(7), (layout.head_dim, layout.value_dim)
    k, v = (rng.normal(0, 4, (_TOKENS, layout.num_kv_heads, dim)) for dim in dims)
    return jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32)


def _batch(name: str, page_size: int, num_pages: int) -> RaggedBatch:
    """A batch of `WRITES` with pages in a random order, and garbage wherever nothing may be read."""
    lengths, rows, more = WRITES[name]
    rng = np.random.default_rng(len(name))
    order = rng.permutation(num_pages)
    tables, spare = order[: _SLOTS * _WIDTH].reshape(_SLOTS, _WIDTH), order[_SLOTS * _WIDTH :]
    for first, *others in more.get("shared", ()):
        tables[others] = tables[first]
    if more.get("holes"):
        tables = np.where(rng.random(tables.shape) < 0.4, rng.choice(_GARBAGE, tables.shape), tables)
    used = -(-np.array(lengths) // page_size)
    tables = np.where(np.arange(_WIDTH) < used[:, None], tables, rng.choice(_GARBAGE, tables.shape))
    starts = np.concatenate([[0], np.cumsum(rows)])
    live = more.get("num_seqs", _SLOTS)
    starts[live + 1 :] = rng.choice(_GARBAGE, _SLOTS - live)
    copies = more.get("copies")
    copies = None if copies is None else [int(spare[i]) if 0 <= i < len(spare) else i for i in copies]
    return RaggedBatch(lengths, tables.astype(np.int32), starts.astype(np.int32), live, copy_from=copies)


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
