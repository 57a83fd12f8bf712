"""What the writing kernels have room for, and which pages they refuse."""

import math
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from paged.spec import PageLayout

from ..chips import LANES, SUBLANES, Chip, padded_bytes
from ..pages import Pool, pools_of, refuses_layout
from ..references import Ref
from .granules import GRANULE, granule_at, granule_shape

# The most blocks of whole granules that are read ahead, and as many that are being written; the most granules of one.
_BLOCKS_AHEAD, _MOST_IN_BLOCK = 4, 8
# The most partial granules that are read ahead, and as many that are being written back.
_MOST_AHEAD = 16
# Numbers in scalar memory per sequence, besides its block table: three of its own, and five for each of two granules.
_NUMBERS_PER_SLOT = 13
# Vector memory for blocks of whole granules, and for the ring of partial ones.
_BLOCKS_BYTES = _RING_BYTES = 2**22


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
    """A part of a granule that a token's rows belong to, ``row_shape [heads, lanes]``.

    The part is ``index`` of a granule of the array number ``pool``. It is ``[8, heads, lanes]`` where
    ``is_token_first``, else ``[heads, 8, lanes]``.
    """

    pool: int
    index: tuple[int, ...]
    row_shape: tuple[int, int]
    dtype: Any
    is_token_first: bool = False

    @property
    def stride(self) -> int:
        """Rows that a token's heads take where they are laid apart: an odd number of tiles of 8 rows.

        With an even number of tiles, a strided access would take all its rows from a few banks of memory, one by one.
        """
        return (-(-self.row_shape[0] // SUBLANES) | 1) * SUBLANES

    @property
    def apart_shape(self) -> tuple[int, int, int]:
        """The shape of a granule's rows that are laid apart: a register's lanes in each column."""
        return -(-self.row_shape[1] // LANES), GRANULE * self.stride, LANES


class Writer(NamedTuple):
    """The static facts of the writing kernels: the arrays that they read and write, and the rings that fit."""

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
    def new_shapes(self) -> tuple[tuple[int, int], ...]:
        """The shape of a token's rows in each array of `as_they_lie`."""
        layout = self.layout
        if layout.order == "interleaved":
            return tuple(part.row_shape for part in self.parts)
        return (layout.num_kv_heads, layout.head_dim), (layout.num_kv_heads, layout.value_dim)

    def as_they_lie(self, k: Array, v: Array) -> tuple[Array, ...]:
        """New keys and values as the kernels take them, ``[tokens, heads, lanes]``: as they lie, if their heads do not
        take turns."""
        return self.layout.stack(k, v) if self.layout.order == "interleaved" else (k, v)

    def stacked(self, rows: list[Array]) -> tuple[Array, ...]:
        """A token's rows for each of the `parts`, from those of `as_they_lie`."""
        return self.layout.stack(*rows) if self.layout.order == "joined" else tuple(rows)

    @property
    def _granule_bytes(self) -> int:
        # A tile of 8-bit values may occupy as much vector memory as one of 32-bit values.
        return 4 * sum(math.prod(granule_shape(self.layout, pool)) for pool in self.pools)

    @property
    def blocks_ahead(self) -> int:
        """Blocks of whole granules that are read ahead, and as many that may be on their way to the pages."""
        several = range(_BLOCKS_AHEAD, 1, -1)
        return next((ahead for ahead in several if self._whole_bytes(ahead, 1) <= _BLOCKS_BYTES), 1)

    @property
    def granules_per_block(self) -> int:
        """Whole granules of a block: a power of two."""
        fit = max(1, min(_MOST_IN_BLOCK, _BLOCKS_BYTES // self._whole_bytes(self.blocks_ahead, 1)))
        return 2 ** (fit.bit_length() - 1)

    @property
    def granules_ahead(self) -> int:
        """Partial granules that are read ahead. The ring has as many more stages for those being written back."""
        return max(1, min(_MOST_AHEAD, _RING_BYTES // (4 * self._granule_bytes)))

    @property
    def vmem_bytes(self) -> int:
        """Vector memory of the larger of the two kernels."""
        whole = self._whole_bytes(self.blocks_ahead, self.granules_per_block)
        return max(whole, 4 * self.granules_ahead * self._granule_bytes)

    def _whole_bytes(self, ahead: int, size: int) -> int:
        """Vector memory of the kernel of whole granules."""
        shapes: list[Any] = jax.tree.leaves(self.whole_vmem(ahead, size))
        return sum(padded_bytes(x.shape, x.dtype) for x in shapes)

    def whole_vmem(self, ahead: int, size: int) -> tuple[Any, Any, Any]:
        """Vector memory for blocks of ``size`` whole granules, of which ``ahead`` are read ahead: for new rows, for
        granules, and for rows between the two."""
        new = [pltpu.VMEM((ahead + 1, size, GRANULE, *shape), self.layout.dtype) for shape in self.new_shapes]
        apart = [pltpu.VMEM((size, *part.apart_shape), jnp.float32) for part in self.parts if not part.is_token_first]
        return tuple(new), self.vmem(ahead, size), tuple(apart)

    def most_slots(self, chip: Chip, width: int) -> int:
        """The most sequences of which scalar memory holds ``width`` entries, and what a kernel notes; perhaps none."""
        return chip.smem_for_lists // (4 * (width + _NUMBERS_PER_SLOT))

    def vmem(self, *stages: int) -> tuple[Any, ...]:
        """Vector memory for so many granules of each array."""
        return tuple(pltpu.VMEM((*stages, *granule_shape(self.layout, pool)), pool.dtype) for pool in self.pools)


def granules_at(writer: Writer, pools: tuple[Ref, ...], page: Any, offset: Any) -> list[Ref]:
    """The granule at an offset in a page, in each array of the pages."""
    return [granule_at(writer.layout, pool, ref, page, offset) for pool, ref in zip(writer.pools, pools, strict=True)]
