"""`RaggedSchedule`: the choices that the prefill kernel, and the decode kernel beside it, leave open."""

import dataclasses

from ...base import Schedule
from ..decode import DecodeSchedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaggedSchedule(Schedule, lowering="tpu-ragged"):
    """How the prefill kernel divides its work, and how sequences of one query row are decoded beside it.

    * ``pages_per_block``: pages in one page block, which is one step of the online softmax.
    * ``rows_per_tile``: the most query rows of one sequence in one tile, a power of two of at least 16.
    * ``buffers``: page blocks in vector memory at once. The kernel works on one while the others arrive.
    * ``cores``: cores of one device ("megacore") that share the tiles.
    * ``single_rows``: the decode kernel's schedule for the sequences of one query row, in a batch whose rows vary. With
      None they are tiles like all others.

    >>> print(RaggedSchedule(pages_per_block=32, rows_per_tile=128, single_rows=DecodeSchedule(pages_per_block=8)))
    tpu-ragged(pages_per_block=32, rows_per_tile=128, single_rows=tpu-decode(pages_per_block=8))
    """

    pages_per_block: int
    rows_per_tile: int
    buffers: int = dataclasses.field(default=2, metadata={"least": 2})
    cores: int = 1
    single_rows: DecodeSchedule | None = dataclasses.field(default=None, metadata={"schedule": DecodeSchedule})
