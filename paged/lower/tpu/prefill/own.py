"""What a batch brings for its query rows, as the prefill kernel reads it beside the queries."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from ...program import OwnRows
from ..chips import LANES


class OwnShape(NamedTuple):
    """How much a batch brings for its query rows: ``tokens`` rows, and for each ``words`` of ancestors."""

    tokens: int
    words: int

    @classmethod
    def of(cls, own: OwnRows | None, has_ancestors: bool) -> "OwnShape | None":
        """The shape of what a batch brings, with words if a term asks for ancestors; None if it brings nothing."""
        if own is None:
            return None
        words = 0 if not has_ancestors or own.ancestors is None else own.ancestors.shape[1]
        return cls(own.positions.shape[0], words)

    @property
    def registers(self) -> int:
        """Registers of a row's position and its words."""
        return -(-(1 + self.words) // LANES)

    @property
    def lanes(self) -> tuple[int, int]:
        """The shape of all positions along lanes, see `OwnOperands`."""
        return -(-self.tokens // LANES) + 1, LANES


class OwnOperands(NamedTuple):
    """The positions of query rows, and the words of their ancestors.

    * ``rows`` i32[tokens, registers, lanes]: of each row its position, and then its words. In HBM.
    * ``lanes`` i32[rows of lanes, lanes]: the position of each row, one row after the other along the lanes, and zeros
      at the end. In vector memory. Rows are keys as well, and these lie along the lanes.
    """

    rows: Int[Array, "tokens registers lanes"]
    lanes: Int[Array, "rows lanes"]

    @classmethod
    def of(cls, own: OwnRows | None, shape: OwnShape | None) -> "OwnOperands | None":
        """The operands of what a batch brings, of that shape."""
        if own is None or shape is None:
            return None
        columns = [own.positions[:, None]]
        if shape.words and own.ancestors is not None:
            columns.append(own.ancestors)
        rows = jnp.pad(jnp.concatenate(columns, axis=1), ((0, 0), (0, shape.registers * LANES - 1 - shape.words)))
        lanes = jnp.pad(own.positions, (0, shape.lanes[0] * LANES - shape.tokens))
        return cls(rows.reshape(shape.tokens, shape.registers, LANES), lanes.reshape(shape.lanes))


_HBM: Any = pltpu.HBM
_VMEM: Any = pltpu.VMEM
# The memory of each operand.
OWN_MEMORY = OwnOperands(_HBM, _VMEM)
