"""What a batch brings for its query rows, as the prefill kernel reads it beside the queries."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from ...program import OwnRows
from ..chips import LANES


class OwnOperands(NamedTuple):
    """The positions of query rows, and the words of their ancestors.

    * ``rows`` i32[tokens, registers, lanes]: of each row its position, and then its words. In HBM.
    * ``lanes`` i32[tokens // lanes + 1, lanes]: the position of each row, one row after the other along the lanes, and
      zeros at the end. In vector memory. Rows are keys as well, and these lie along the lanes.
    """

    rows: Int[Array, "tokens registers lanes"]
    lanes: Int[Array, "rows lanes"]

    @classmethod
    def of(cls, own: OwnRows | None, has_ancestors: bool) -> "OwnOperands | None":
        """The operands of what a batch brings, with words where a term asks for ancestors."""
        if own is None:
            return None
        words = own.ancestors if has_ancestors else None
        columns = [own.positions[:, None], *(() if words is None else (words,))]
        registers, tokens = own_registers(num_words(own, has_ancestors)), own.positions.shape[0]
        rows = jnp.concatenate(columns, axis=1)
        rows = jnp.pad(rows, ((0, 0), (0, registers * LANES - rows.shape[1])))
        lanes = jnp.pad(own.positions, (0, -tokens % LANES + LANES)).reshape(-1, LANES)
        return cls(rows.reshape(tokens, registers, LANES), lanes)


_HBM: Any = pltpu.HBM
_VMEM: Any = pltpu.VMEM
# The memory of each operand.
OWN_MEMORY = OwnOperands(_HBM, _VMEM)


def num_words(own: OwnRows, has_ancestors: bool) -> int:
    """Words of ancestors of each row."""
    return own.ancestors.shape[1] if has_ancestors and own.ancestors is not None else 0


def own_registers(words: int) -> int:
    """Registers of a row's position and of so many words of ancestors."""
    return -(-(1 + words) // LANES)
