"""`XlaSchedule`: the choices that the XLA lowering leaves open."""

import dataclasses

from ..base import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaSchedule(Schedule, lowering="xla-blocks"):
    """How the XLA lowering divides its work.

    * ``pages_per_block``: pages in one page block, which one step of the online softmax takes.
    * ``rows_per_tile``: the most query rows of one sequence in one row block.
    * ``row_blocks_at_once``: row blocks that the forward pass works on side by side. The gradient takes one at a time.
    * ``blocks_per_step``: page blocks that one step of the forward pass takes where query rows are few.

    >>> print(XlaSchedule(pages_per_block=8, rows_per_tile=64))
    xla-blocks(pages_per_block=8, rows_per_tile=64)
    """

    pages_per_block: int
    rows_per_tile: int = 1
    row_blocks_at_once: int = 1
    blocks_per_step: int = 1
