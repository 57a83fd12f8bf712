"""What the writing kernels have room for, and which pages they refuse."""

import math
from typing import Any, NamedTuple

from jax.experimental.pallas import tpu as pltpu

from paged.spec import PageLayout

from ..chips import Chip
from ..pages import Pool, pools_of, refuses_layout
from .granules import GRANULE, granule_shape

# Blocks of whole granules that are read ahead, and as many that are being written; and the most granules of a block.
_BLOCKS_AHEAD, _MOST_IN_BLOCK = 4, 8
# The most partial granules that are read ahead, and as many that are being written back.
_MOST_AHEAD = 16
# Vector memory for the ring of either kernel.
_RING_BYTES = 2**22


def refuses_write(layout: PageLayout, chip: Chip) -> str | None:
    """Why no kernel writes pages of this layout, or None."""
    reason = refuses_layout(layout)
    if reason is not None:
        return reason
    needed, budget = Writer(layout).vmem_bytes, chip.vmem_for_buffers
    if needed > budget:
        return (
            f"{GRANULE} tokens are so large that buffers need {needed} bytes of vector memory, and there are {budget} "
            f"for them on {chip.words}"
        )
    return None


class Writer(NamedTuple):
    """The static facts of the writing kernels: the arrays that they write, and the rings of buffers that fit."""

    layout: PageLayout

    @property
    def pools(self) -> tuple[Pool, ...]:
        """The arrays of keys and values. Per-token scales are written by XLA."""
        return tuple(pool for pool in pools_of(self.layout) if not pool.is_scale)

    @property
    def _granule_bytes(self) -> int:
        # A tile of 8-bit values may occupy as much vector memory as one of 32-bit values.
        return 4 * sum(math.prod(granule_shape(self.layout, pool)) for pool in self.pools)

    @property
    def blocks_ahead(self) -> int:
        """Blocks of whole granules that are read ahead. The ring has as many more stages for blocks being written."""
        return _BLOCKS_AHEAD

    @property
    def granules_per_block(self) -> int:
        """Whole granules of a block: a power of two."""
        fit = max(1, min(_MOST_IN_BLOCK, _RING_BYTES // (2 * self.blocks_ahead * self._granule_bytes)))
        return 2 ** (fit.bit_length() - 1)

    @property
    def granules_ahead(self) -> int:
        """Partial granules that are read ahead. The ring has as many more stages for those being written back."""
        return max(1, min(_MOST_AHEAD, _RING_BYTES // (4 * self._granule_bytes)))

    @property
    def vmem_bytes(self) -> int:
        """Vector memory of the larger of the two kernels."""
        whole, partial = 2 * self.blocks_ahead * self.granules_per_block, 4 * self.granules_ahead
        return self._granule_bytes * max(whole, partial)

    def most_listed(self, chip: Chip, num_lists: int) -> int:
        """The most granules that one kernel can list in scalar memory: whole blocks of any size."""
        most = chip.smem_for_lists // (4 * num_lists)
        return most - most % _MOST_IN_BLOCK

    def vmem(self, *stages: int) -> tuple[Any, ...]:
        """Vector memory for so many granules of each array."""
        return tuple(pltpu.VMEM((*stages, *granule_shape(self.layout, pool)), pool.dtype) for pool in self.pools)
