"""Decode: one or a few query rows of every sequence, with the write fused into the kernel where that is safe."""

from .lowering import TPU_DECODE as TPU_DECODE
from .lowering import DecodeLists as DecodeLists
from .lowering import TpuDecode as TpuDecode
from .schedule import DecodeSchedule as DecodeSchedule
