"""`Row`: what the decode benchmark keeps of one candidate on one shape and generation."""

import dataclasses

from benchmarks import tpu


@dataclasses.dataclass
class Row(tpu.Row):
    """``tokens`` are the visible KV tokens; the needed bytes are those of the pages that hold one."""

    tokens: int = 0
