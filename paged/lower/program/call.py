"""`Call`: the static shapes of one call, which a schedule may depend on."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from paged.spec import Pages, RaggedBatch


@dataclasses.dataclass(frozen=True)
class Call:
    """The static facts of one call, known when it is traced.

    * ``tokens``: query rows in all.
    * ``slots``: sequence slots of the batch, live or not.
    * ``pages_per_seq``: entries of a block table.
    * ``num_pages``: pages of the pool.
    * ``query_rows``: the number of rows that every slot has; None where it varies.
    * ``q_dtype``: the dtype of the queries.
    * ``has_even_starts``: whether the rows of every slot are known to be those that follow the slot before.
    * ``has_own_rows``: whether the batch brings positions or ancestors of its rows.
    * ``has_holes``: whether most table entries may be holes, as in a context whose pages several devices share.
    """

    tokens: int
    slots: int
    pages_per_seq: int
    num_pages: int
    query_rows: int | None
    q_dtype: Any
    has_even_starts: bool = True
    has_own_rows: bool = False
    has_holes: bool = False

    @property
    def has_even_rows(self) -> bool:
        """Whether every row is known to be one of a slot's, in order, and every slot to have as many rows."""
        return self.has_even_starts and self.query_rows is not None and self.tokens == self.slots * self.query_rows

    @classmethod
    def of(cls, q: Any, pages: Pages, batch: RaggedBatch, has_holes: bool = False) -> "Call":
        """The facts of a call with these arguments, of which only shapes and dtypes matter."""
        return cls(
            tokens=q.shape[0],
            slots=batch.num_slots,
            pages_per_seq=batch.pages_per_seq,
            num_pages=pages.num_pages,
            query_rows=batch.query_rows,
            q_dtype=jnp.dtype(q.dtype),
            has_even_starts=batch.has_even_starts,
            has_own_rows=batch.positions is not None or batch.ancestors is not None,
            has_holes=has_holes,
        )


# A common decode step: what is assumed where no call is known.
COMMON = Call(tokens=64, slots=64, pages_per_seq=256, num_pages=2**14, query_rows=1, q_dtype=jnp.dtype("bfloat16"))


def at_most(limit: int, size: Any) -> int:
    """``size``, if that is smaller than ``limit``. A symbolic size, as `jax.export` has it, may be larger."""
    return min(limit, size) if isinstance(size, int) else limit
