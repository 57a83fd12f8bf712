"""`XlaSchedule`: the choices that the XLA lowering leaves open."""

import dataclasses

from ..base import Schedule

# How the work is told to XLA: in loops whose turns follow the batch, or in few operations on many tiles at once.
IN_TURN, AT_ONCE = "in_turn", "at_once"


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaSchedule(Schedule, lowering="xla-blocks"):
    """How the XLA lowering divides its work.

    * ``pages_per_block``: pages in one page block, which one step of the online softmax takes.
    * ``rows_per_tile``: the most query rows of one sequence in one row block.
    * ``row_blocks_at_once``: row blocks that the forward pass works on side by side. The gradient takes one at a time
      in the form ``"in_turn"``, and as many as fit in the forward pass's memory in the other.
    * ``blocks_per_step``: page blocks that one step of the forward pass takes where query rows are few. In the form
      ``"at_once"`` it is 1.
    * ``form``: ``"in_turn"`` runs a loop over row blocks and, for each of them, a loop over the page blocks that it
      sees. ``"at_once"`` works on a page block of every row block in one operation, without a loop where one such
      step covers the call: for GPUs, where a loop's condition is read by the host.

    >>> print(XlaSchedule(pages_per_block=8, rows_per_tile=64))
    xla-blocks(pages_per_block=8, rows_per_tile=64)
    """

    pages_per_block: int
    rows_per_tile: int = 1
    row_blocks_at_once: int = 1
    blocks_per_step: int = 1
    form: str = dataclasses.field(default=IN_TURN, metadata={"one_of": (IN_TURN, AT_ONCE)})
