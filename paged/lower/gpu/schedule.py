"""`GpuDecodeSchedule`: the choices that the decode kernel for GPUs leaves open."""

import dataclasses

from ..base import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuDecodeSchedule(Schedule, lowering="gpu-decode"):
    """How the decode kernel for GPUs divides its work.

    * ``pages_per_block``: pages in one page block, which one step of the online softmax takes: 64 or 128 tokens.
    * ``stages``: tiles in shared memory at once, each the keys or the values of one page block. The kernel works on one
      while the others arrive.
    * ``kv_splits``: KV splits of each sequence. Each is worked on by a block of threads; their states are merged.

    >>> print(GpuDecodeSchedule(pages_per_block=4, stages=6))
    gpu-decode(pages_per_block=4, stages=6)
    """

    pages_per_block: int
    stages: int = dataclasses.field(default=4, metadata={"least": 3})
    kv_splits: int = 1
