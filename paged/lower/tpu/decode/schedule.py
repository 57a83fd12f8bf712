"""`DecodeSchedule`: the choices that the decode kernel leaves open."""

import dataclasses
from typing import Literal

from ...base import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeSchedule(Schedule, lowering="tpu-decode"):
    """How the decode kernel divides its work.

    * ``pages_per_block``: pages in one page block, which one step of the online softmax takes.
    * ``sequence``: where the loop over sequences is, ``"inline"`` in the kernel's body or on its ``"grid"``.
    * ``buffers``: page blocks in vector memory at once. The kernel works on one while the others arrive.
    * ``kv_splits``: KV splits of each sequence. Each is worked on as if it were a sequence; their states are merged.
    * ``cores``: cores of one device ("megacore") that share the sequences.

    >>> print(DecodeSchedule(pages_per_block=8, buffers=4))
    tpu-decode(pages_per_block=8, buffers=4)
    """

    pages_per_block: int
    sequence: Literal["inline", "grid"] = dataclasses.field(default="inline", metadata={"one_of": ("inline", "grid")})
    buffers: int = dataclasses.field(default=2, metadata={"least": 2})
    kv_splits: int = 1
    cores: int = 1
