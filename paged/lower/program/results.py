"""What a caller wants of an attention's state, and how a state becomes that."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from paged.spec import AttentionState, add_sinks

from .sequences import Sequences


class Results(NamedTuple):
    """An attention's results with sinks. ``lse`` is None where the caller does not want it."""

    out: Float[Array, "tokens q_heads value_dim"]
    lse: Float[Array, "tokens q_heads"] | None

    @property
    def state(self) -> AttentionState:
        """The state, of results with their log-sum-exp."""
        assert self.lse is not None
        return AttentionState(self.out, self.lse)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The results that a caller wants.

    * ``dtype``: of the output. It is rounded once, from the float32 output with sinks.
    * ``has_lse``: whether the log-sum-exp is wanted. A kernel need not compute what nobody reads.
    """

    dtype: Any
    has_lse: bool = True

    def of(self, state: AttentionState, seqs: Sequences, sinks: Float[Array, " q_heads"] | None) -> Results:
        """The results in a float32 state without sinks. Sinks enter in the rows that sequences own."""
        if sinks is not None:
            is_row = seqs.owner(state.out.shape[0])[1]
            with_sinks = add_sinks(state, sinks)
            state = AttentionState(with_sinks.out, jnp.where(is_row[:, None], with_sinks.lse, state.lse))
        return Results(state.out.astype(self.dtype), state.lse if self.has_lse else None)
