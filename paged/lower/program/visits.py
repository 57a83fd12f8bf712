"""Which pages a range of query rows visits: those in which the program cannot rule out a visible key."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from paged.spec import LARGEST_INT32, Coverage

from .brought import QueryRows
from .call import Call
from .program import Program
from .sequences import count_up_to

# Pairs of positions and pages that are asked about at most, to bound how many pages a row sees.
_MOST_PAIRS = 2**20
# Pages of a table whose places are a constant of the compiled program.
_FEW_PAGES = 1024


class Visits(NamedTuple):
    """Pages of a sequence to visit: first those that are visible in full, then the others, each in ascending order.

    The first ``count`` entries are valid, and the first ``num_full`` of them need no mask. ``index`` counts pages of
    the sequence (page ``i`` holds tokens ``i * P`` onward); ``page`` is where each lies in the pool. Entries past
    ``count`` hold any page of the table, or page 0. Where ``is_seen`` is given, an entry is to be visited only if it is
    True there.

    There are two ways to make the list, with the same result: `visits_by_scatter` for one sequence, and
    `visits_by_sort` for many at once. `visits_in_place` does not sort the pages.
    """

    index: Int[Array, "*tiles pages_per_seq"]
    page: Int[Array, "*tiles pages_per_seq"]
    num_full: Int[Array, "*tiles"]
    count: Int[Array, "*tiles"]
    is_seen: Bool[Array, "*tiles pages_per_seq"] | None = None


def visits_by_scatter(
    program: Program, rows: QueryRows, table: Int[Array, " pages_per_seq"], page_size: int, num_pages: int
) -> Visits:
    """The pages that query rows may see in their sequence.

    Every page computes its place in the list and is scattered there. A table entry outside the pool is a hole: its page
    is never visited, so its tokens are invisible.
    """
    (some, full), num_full = _visits(program, rows, table, page_size, num_pages)
    count = jnp.sum(some, dtype=jnp.int32)
    partial = some & ~full
    # One sum along both: a compiler of a CPU makes many programs of each.
    of_full, of_partial = jnp.cumsum(jnp.stack((full, partial)), axis=1, dtype=jnp.int32) - 1
    rank = jnp.where(full, of_full, of_full[-1:] + 1 + of_partial)
    width = table.shape[0]
    column = jnp.arange(width, dtype=jnp.int32)
    index = jnp.zeros(width, jnp.int32).at[jnp.where(some, rank, width)].set(column, mode="drop")
    return Visits(index, jnp.where(column < count, table[index], 0), num_full, count)


def visits_by_sort(
    program: Program,
    rows: QueryRows,
    tables: Int[Array, "tiles pages_per_seq"],
    page_size: int,
    num_pages: int,
    *,
    has_maxima: bool = False,
) -> Visits:
    """`visits_by_scatter` for many tiles of query rows at once, by one sort: a TPU has no fast scatter.

    With ``has_maxima`` the counts are maxima over the sorted list, of which XLA:CPU makes one program each. It makes
    three of a sum. And entries past the count are page 0.
    """

    def visits(rows, table):
        return _visits(program, rows, table, page_size, num_pages)

    (some, full), num_full = jax.vmap(visits)(rows, tables)
    width = tables.shape[1]
    index = jnp.arange(width, dtype=jnp.int32)[None]
    # Full pages sort before all partial ones, and these before all others; within each kind the index decides.
    key = index + jnp.where(full, 0, jnp.where(some, width, 2 * width))
    key, page = jax.lax.sort((key, tables), dimension=1, num_keys=1)
    count_below = lambda bound: jnp.max(jnp.where(key < bound, index + 1, 0), axis=1, initial=0)
    if has_maxima:
        # Pages of the step's own tokens sort before others, and need a mask if the batch brings anything for its rows.
        num_full = count_below(width) if rows.own is None else num_full
        count, page = count_below(2 * width), jnp.where(key < 2 * width, page, 0)
    else:
        count = jnp.sum(some, axis=1, dtype=jnp.int32)
    return Visits(jax.lax.rem(key, width), page, num_full, count)


def visits_in_place(
    program: Program, rows: QueryRows, table: Int[Array, " pages_per_seq"], page_size: int, num_pages: int, room: int
) -> Visits:
    """The pages that query rows may see, in ascending order, in a list with room for ``room`` pages.

    ``room`` is as wide as the table, or at least what `most_pages_of_any` says. It takes no scatter and no sort. In a
    list as wide as the table each page stays in its column, and ``is_seen`` says which pages are visited. Otherwise
    entry ``i`` is the column with ``i`` visited pages before it. No page counts as visible in full.
    """
    (some, _), _ = _visits(program, rows, table, page_size, num_pages)
    width, none = table.shape[0], jnp.int32(0)
    if room is width or room == width:
        column = jnp.arange(width, dtype=jnp.int32)
        count = jnp.max(jnp.where(some, column + 1, 0), initial=0)
        return Visits(column, jnp.where(some, table, 0), none, count, some)
    so_far = jnp.cumsum(some, dtype=jnp.int32)
    index = jnp.minimum(count_up_to(so_far, jnp.arange(room, dtype=jnp.int32)), width - 1)
    is_valid = jnp.arange(room, dtype=jnp.int32) < so_far[-1]
    return Visits(index, jnp.where(is_valid, table[index], 0), none, so_far[-1])


def page_coverage(
    program: Program, rows: QueryRows, table: Int[Array, " pages_per_seq"], page_size: int, num_pages: int
) -> Coverage:
    (some, full), is_own = _by_place(program, rows, table, page_size, num_pages)
    return Coverage(some, full if is_own is None else full & ~is_own)


def _visits(program: Program, rows: QueryRows, table: Any, page_size: int, num_pages: int) -> tuple[Coverage, Any]:
    """The pages to visit, and those that come first; and how many of these need no mask.

    Pages of the step's own tokens come where they would if the batch brought nothing for its rows. So what it brings
    changes no result where it says the same.
    """
    (some, full), is_own = _by_place(program, rows, table, page_size, num_pages)
    return Coverage(some, full), jnp.sum(full if is_own is None else full & ~is_own, dtype=jnp.int32)


def _first_keys(width: Any, page_size: int) -> Array:
    """The place of each page's first key: in short tables a constant, so that XLA on CPU makes one program of it, and
    not one per use. Where more than eight programs are ready at once, it wakes other threads, which takes longer."""
    if isinstance(width, int) and width <= _FEW_PAGES:
        return jnp.asarray(np.arange(width, dtype=np.int32) * np.int32(page_size))
    return jnp.arange(width, dtype=jnp.int32) * page_size


def _by_place(program: Program, rows: QueryRows, table: Any, page_size: int, num_pages: int) -> tuple[Coverage, Any]:
    """Coverage by the places of keys, where pages of the step's own tokens are visited in any case; and which these
    are, if the batch brings anything for its rows: then nothing more is known of them."""
    p0, p1, length, numbers, own = rows
    j0 = _first_keys(table.shape[0], page_size)
    j1, is_own = j0 + page_size, None
    is_there = (p0 < p1) & (table >= 0) & (table < num_pages)
    some, full = program.coverage(p0, p1, j0, j1, length, numbers)
    if own is not None:
        is_own = (j1 > own) & (j0 < length)
        some = some | is_own
    return Coverage(some, full) & Coverage(is_there, is_there), is_own


def most_pages_seen(program: Program, page_size: int, call: Call) -> int:
    """The most pages that one sequence's rows see, at a sample of lengths up to the table's capacity."""
    rows, capacity = call.query_rows or 1, call.pages_per_seq * page_size
    lengths = np.unique(np.concatenate([np.linspace(1, capacity, 16).astype(int), capacity - np.arange(page_size)]))
    first = np.arange(call.pages_per_seq)[None] * page_size
    length = np.maximum(lengths, 1)[:, None]
    with jax.ensure_compile_time_eval():  # numbers in place of values may be JAX's
        some = program.coverage(length - rows, length, first, first + page_size, length, program.any_numbers()).some
    return max(1, int(np.max(np.sum(np.broadcast_to(some, (len(lengths), call.pages_per_seq)), axis=1))))


@functools.lru_cache(maxsize=256)
def most_pages_of_any(program: Program, page_size: int, width: int, rows: int) -> int:
    """At least the number of pages that ``rows`` consecutive rows of any sequence see, in a table of ``width`` pages.

    `Program.coverage` proves it for all positions of the first row, taken in ranges of a page. In wide tables larger
    ranges come first, and then their pages alone. A mask that asks for numbers of the batch has no such bound, so that
    the answer is ``width``.

    >>> spec = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=64, window=128)
    >>> most_pages_of_any(Program.from_spec(spec), page_size=16, width=64, rows=1)
    9
    """
    if program.values:
        return width

    def seen(p0: Any, p1: Any, page: np.ndarray) -> np.ndarray:
        with jax.ensure_compile_time_eval():
            some = program.coverage(p0, p1, page * page_size, (page + 1) * page_size, LARGEST_INT32).some
        return np.broadcast_to(np.asarray(some), np.broadcast_shapes(np.shape(p0), np.shape(p1), page.shape))

    column, capacity = np.arange(width, dtype=np.int64)[None], width * page_size
    # Rows of which the first has no position yet, and rows past the table.
    outer = seen(np.array([[-capacity], [capacity]]), np.array([[rows], [LARGEST_INT32]]), column)
    pages = -(-width * width // _MOST_PAIRS)
    p0 = np.arange(0, capacity, pages * page_size, dtype=np.int64)[:, None]
    some = seen(p0, p0 + pages * page_size - 1 + rows, column)
    most = int(some.sum(axis=1).max())
    if 1 < pages < pages * len(p0) * most <= 4 * _MOST_PAIRS and most < width:
        own = np.argsort(~some, axis=1, kind="stable")[:, None, :most]  # each range's pages first
        p0 = p0[:, None] + np.arange(pages, dtype=np.int64)[None, :, None] * page_size
        most = int(seen(p0, p0 + page_size - 1 + rows, own).sum(axis=2).max())
    return min(width, max(1, most, int(outer.sum(axis=1).max())))
