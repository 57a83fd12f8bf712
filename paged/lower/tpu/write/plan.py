"""What the writing kernels have room for, and which pages they refuse."""

import math
from typing import Any, NamedTuple, assert_never

from jax.experimental.pallas import tpu as pltpu

from paged.spec import PageLayout

from ..chips import Chip
from ..pages import Pool, pools_of, refuses_layout
from ..references import Ref
from .granules import GRANULE, granule_at, granule_shape

# Blocks of whole granules that are read ahead, and as many that are being written; and the most granules of a block.
_BLOCKS_AHEAD, _MOST_IN_BLOCK = 4, 8
# The most partial granules that are read ahead, and as many that are being written back.
_MOST_AHEAD = 16
# Numbers in scalar memory per sequence, besides its block table: three of its own, and five for each of two granules.
_NUMBERS_PER_SLOT = 13
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


class Part(NamedTuple):
    """New rows as they lie, ``[tokens, *row_shape]``, and where a token's rows belong: in a part of a granule.

    ``row_shape`` is ``[heads, lanes]``. The part is ``index`` of a granule of the array number ``pool``. It is
    ``[8, heads, lanes]`` where ``is_token_first``, else ``[heads, 8, lanes]``.
    """

    pool: int
    index: tuple[int, ...]
    row_shape: tuple[int, int]
    dtype: Any
    is_token_first: bool = False


class Writer(NamedTuple):
    """The static facts of the writing kernels: the arrays that they write, and the rings of buffers that fit."""

    layout: PageLayout

    @property
    def pools(self) -> tuple[Pool, ...]:
        """The arrays of keys and values. Per-token scales are written by XLA."""
        return tuple(pool for pool in pools_of(self.layout) if not pool.is_scale)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of a token: keys and values apart where they lie apart in a granule, else together."""
        layout = self.layout
        k, v = (layout.num_kv_heads, layout.head_dim), (layout.num_kv_heads, layout.value_dim)
        match layout.order:
            case "packed":
                return Part(0, (0,), k, layout.dtype), Part(0, (1,), v, layout.dtype)
            case "split":
                return Part(0, (), k, layout.dtype), Part(1, (), v, layout.dtype)
            case "joined":
                lanes = self.pools[0].page_shape[-1]
                return (Part(0, (), (layout.num_kv_heads, lanes), layout.dtype),)
            case "interleaved":
                return (Part(0, (), (2 * layout.num_kv_heads, layout.head_dim), layout.dtype, is_token_first=True),)
            case _:
                assert_never(layout.order)

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

    def most_slots(self, chip: Chip, width: int) -> int:
        """The most sequences of which scalar memory holds ``width`` entries, and what a kernel notes; perhaps none."""
        return chip.smem_for_lists // (4 * (width + _NUMBERS_PER_SLOT))

    def vmem(self, *stages: int) -> tuple[Any, ...]:
        """Vector memory for so many granules of each array."""
        return tuple(pltpu.VMEM((*stages, *granule_shape(self.layout, pool)), pool.dtype) for pool in self.pools)


def granules_at(writer: Writer, pools: tuple[Ref, ...], page: Any, offset: Any) -> list[Ref]:
    """The granule at an offset in a page, in each array of the pages."""
    return [granule_at(writer.layout, pool, ref, page, offset) for pool, ref in zip(writer.pools, pools, strict=True)]
