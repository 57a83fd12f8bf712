"""A kernel for NVIDIA's Hopper GPUs, in Pallas Mosaic GPU: pages come to shared memory by TMA while others are used."""

from .chips import GPUS as GPUS
from .chips import Gpu as Gpu
from .lowering import GPU_DECODE as GPU_DECODE
from .lowering import GpuDecode as GpuDecode
from .schedule import GpuDecodeSchedule as GpuDecodeSchedule
