"""Which pages a block of query rows visits: the pages that the program cannot rule out, and no other."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .program import Program


class Visits(NamedTuple):
    """Pages of one sequence in ascending order, the first ``count`` entries of ``index`` being valid.

    ``index`` counts pages of the sequence (page ``i`` holds tokens ``i * P`` onward); ``page`` is where each lies in
    the pool.
    """

    index: Int[Array, " pages_per_seq"]
    page: Int[Array, " pages_per_seq"]
    count: Int[Array, ""]


def visible_pages(
    program: Program, p0: Any, p1: Any, length: Any, table: Int[Array, " pages_per_seq"], page_size: int, num_pages: int
) -> Visits:
    """The pages that the query positions ``[p0, p1)`` may see in a sequence of ``length`` tokens.

    A table entry outside the pool is a hole: its page is never visited, so its tokens are invisible.
    """
    is_visited = page_mask(program, p0, p1, length, table, page_size, num_pages)
    index = jnp.nonzero(is_visited, size=table.shape[0], fill_value=0)[0]
    return Visits(index, table[index], jnp.sum(is_visited, dtype=jnp.int32))


def page_mask(
    program: Program, p0: Any, p1: Any, length: Any, table: Int[Array, " pages_per_seq"], page_size: int, num_pages: int
) -> Bool[Array, " pages_per_seq"]:
    """For each page of the table, whether the query positions ``[p0, p1)`` visit it."""
    j0 = jnp.arange(table.shape[0]) * page_size
    some = program.coverage(p0, p1, j0, j0 + page_size, length).some
    return some & (p0 < p1) & (table >= 0) & (table < num_pages)
