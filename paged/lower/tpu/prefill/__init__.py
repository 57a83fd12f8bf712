"""Attention for prompts, chunks of prompts and mixed batches: a kernel for tiles of rows, with the decode kernel."""

from .lowering import TPU_RAGGED as TPU_RAGGED
from .lowering import TpuRagged as TpuRagged
from .schedule import RaggedSchedule as RaggedSchedule
