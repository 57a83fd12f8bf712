"""`Call`: the static shapes of one call, which a schedule may depend on."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from paged.spec import Pages, RaggedBatch


@dataclasses.dataclass(frozen=True)
class Call:
    """What is known of a call when it is traced. ``query_rows`` is the batch's, None where rows vary."""

    tokens: int
    slots: int
    pages_per_seq: int
    num_pages: int
    query_rows: int | None
    q_dtype: Any

    @classmethod
    def of(cls, q: Any, pages: Pages, batch: RaggedBatch) -> "Call":
        """The shapes of these arguments."""
        return cls(
            q.shape[0], batch.num_slots, batch.pages_per_seq, pages.num_pages, batch.query_rows, jnp.dtype(q.dtype)
        )


# The call that is assumed where nothing is known of one: a common decode step.
COMMON = Call(tokens=64, slots=64, pages_per_seq=256, num_pages=2**14, query_rows=1, q_dtype=jnp.dtype("bfloat16"))
