"""`Row`: what the prefill benchmark keeps of one candidate on one shape and generation."""

import dataclasses

from benchmarks import tpu


@dataclasses.dataclass
class Row(tpu.Row):
    """``pairs`` are the visible (query row, KV token) pairs of all query heads; ``floor_cycles`` the matrix unit's
    for them, on one core. ``is_emulated`` is false where only compiling was tried, or ran too long: no cycles then.
    """

    pairs: int = 0
    floor_cycles: float = 0.0
    is_emulated: bool = True
