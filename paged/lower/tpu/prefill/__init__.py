"""Prompts, their chunks, and batches of any mix: many query rows by a kernel of tiles, single rows by decode's."""

from .lowering import TPU_RAGGED as TPU_RAGGED
from .lowering import TpuRagged as TpuRagged
from .schedule import RaggedSchedule as RaggedSchedule
