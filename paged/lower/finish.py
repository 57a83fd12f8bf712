"""What comes after a lowering's own state: sinks, once, and the queries' dtype."""

import jax.numpy as jnp
from jaxtyping import Array

from paged.spec import AttentionSpec, AttentionState, RaggedBatch, add_sinks, sinks_per_head

from .sequences import Sequences


def finish(
    spec: AttentionSpec, state: AttentionState, q: Array, page_size: int, batch: RaggedBatch, sinks: Array | None
) -> AttentionState:
    """The state in the queries' dtype, with sinks in the rows that sequences own."""
    if sinks is not None:
        is_row = Sequences.of(batch, q.shape[0], page_size).owner(q.shape[0])[1]
        with_sinks = add_sinks(state, sinks_per_head(spec, sinks))
        state = AttentionState(with_sinks.out, jnp.where(is_row[:, None], with_sinks.lse, state.lse))
    return AttentionState(state.out.astype(q.dtype), state.lse)
