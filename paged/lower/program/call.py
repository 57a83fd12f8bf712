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
    """

    tokens: int
    slots: int
    pages_per_seq: int
    num_pages: int
    query_rows: int | None
    q_dtype: Any

    @classmethod
    def of(cls, q: Any, pages: Pages, batch: RaggedBatch) -> "Call":
        """The facts of a call with these arguments, of which only shapes and dtypes matter."""
        return cls(
            q.shape[0], batch.num_slots, batch.pages_per_seq, pages.num_pages, batch.query_rows, jnp.dtype(q.dtype)
        )


# A common decode step: what is assumed where no call is known.
COMMON = Call(tokens=64, slots=64, pages_per_seq=256, num_pages=2**14, query_rows=1, q_dtype=jnp.dtype("bfloat16"))


def at_most(limit: int, size: Any) -> int:
    """``size``, if that is smaller than ``limit``. A symbolic size, as `jax.export` has it, may be larger."""
    return min(limit, size) if isinstance(size, int) else limit
