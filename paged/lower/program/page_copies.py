"""`PageCopies`: which pages a step copies before it writes, so that no page of several users is written."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .sequences import Sequences


class PageCopies(NamedTuple):
    """The pages that are copied before a step's write, one or none for each sequence.

    ``target`` is where the page ``source`` is copied to: the page of the sequence's first new token. It is -1 where
    nothing is copied, and ``source`` may then be anything. No page is both a source and a target, unless the caller is
    at fault.
    """

    source: Int[Array, " seqs"]
    target: Int[Array, " seqs"]

    @classmethod
    def of(cls, copy_from: Int[Array, " seqs"], seqs: Sequences, page_size: int, num_pages: int) -> "PageCopies":
        """The copies of a step. A sequence without rows copies nothing, nor does one whose first row has no place."""
        return cls.between(copy_from, first_pages(seqs, page_size), num_pages)

    @classmethod
    def between(cls, source: Int[Array, " seqs"], target: Int[Array, " seqs"], num_pages: int) -> "PageCopies":
        """The copies from pages to other pages, those that are pages of the pool."""
        is_page = (source >= 0) & (source < num_pages) & (target >= 0) & (target < num_pages)
        return cls(source, jnp.where(is_page & (source != target), target, -1))

    @property
    def rank(self) -> Int[Array, " seqs"]:
        """How many copies there are up to each sequence, with its own. The last number counts all."""
        return jnp.cumsum(self.target >= 0, dtype=jnp.int32)

    def at(self, rank: Int[Array, " seqs"], i: Array) -> tuple[Array, Array]:
        """The source and the target of copy number ``i``."""
        seq = jax.lax.argmax(rank > i, 0, jnp.int32)
        return self.source[seq], self.target[seq]


def first_pages(seqs: Sequences, page_size: int) -> Int[Array, " seqs"]:
    """The table's entry for the first row of each sequence; -1 where there is no row, or none for its position."""
    width = seqs.tables.shape[1]
    has_entry = (seqs.counts > 0) & (seqs.positions >= 0) & (seqs.positions < width * page_size)
    entry = jnp.where(has_entry, seqs.positions // page_size, 0)
    return jnp.where(has_entry, jnp.take_along_axis(seqs.tables, entry[:, None], axis=1)[:, 0], -1)
