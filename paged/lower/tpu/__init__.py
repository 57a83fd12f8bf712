"""Kernels for TPUs, in Pallas: pages are streamed from HBM, some on their way while others are worked on.

There is a room for each kernel, `decode`, `prefill` and `write`, and one for what they share, `pages`.
"""

from .chips import CHIPS as CHIPS
from .chips import Chip as Chip
from .chips import chip_named as chip_named
from .decode import TPU_DECODE as TPU_DECODE
from .decode import DecodeSchedule as DecodeSchedule
from .decode import TpuDecode as TpuDecode
from .prefill import TPU_RAGGED as TPU_RAGGED
from .prefill import RaggedSchedule as RaggedSchedule
from .prefill import TpuRagged as TpuRagged
