"""A kernel for NVIDIA's Hopper GPUs, in Pallas Mosaic GPU: pages come to shared memory by TMA while others are used."""

from .chips import HOPPERS as HOPPERS
from .chips import shared_for_a_block as shared_for_a_block
from .lowering import GPU_DECODE as GPU_DECODE
from .lowering import GpuDecode as GpuDecode
from .schedule import GpuDecodeSchedule as GpuDecodeSchedule
