"""`Places`: where each query row of a step is written."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ..program import Sequences


class Places(NamedTuple):
    """Where each query row is written: a page and an offset in it, both in range, and whether it is written at all.

    ``order`` lists the rows, those that are written first, and ``count`` is how many these are.
    """

    page: Int[Array, " tokens"]
    offset: Int[Array, " tokens"]
    is_written: Bool[Array, " tokens"]
    order: Int[Array, " tokens"]
    count: Int[Array, ""]

    @classmethod
    def of(cls, seqs: Sequences, tokens: int, page_size: int, num_pages: int) -> "Places":
        """Rows without a place are rows of no sequence, before the first position, past the table, or in a hole."""
        seq, position, is_live = seqs.rows(tokens)
        has_entry = is_live & (position < seqs.tables.shape[1] * page_size)
        position = jnp.where(has_entry, position, 0)
        page = seqs.tables[seq, position // page_size]
        is_written = has_entry & (page >= 0) & (page < num_pages)
        _, order = jax.lax.sort((~is_written, jnp.arange(tokens, dtype=jnp.int32)), num_keys=1)
        count = jnp.sum(is_written, dtype=jnp.int32)
        return cls(jnp.where(is_written, page, 0), position % page_size, is_written, order, count)
