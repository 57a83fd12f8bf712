"""Copies of pages from HBM to vector memory, for every page order.

A stage of the ring of buffers holds one block of pages. It is filled page by page and awaited as a whole.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged.spec import PageLayout

from ..chips import SUBLANES
from ..references import Ref


class Pool(NamedTuple):
    """One array of the pages.

    ``page_axis`` counts the pages; ``page_shape`` is the shape of one page, without that axis. ``is_scale`` is True for
    per-token scales, whose pages are ``[kv_heads, page_size]``.
    """

    page_axis: int
    page_shape: tuple[int, ...]
    dtype: Any
    is_scale: bool = False

    def page(self, ref: Ref, page: Any) -> Ref:
        """One page's part of the pool."""
        return ref.at[page] if self.page_axis == 0 else ref.at[:, page]


def pools_of(layout: PageLayout) -> tuple[Pool, ...]:
    """The arrays of a layout's pages, and then its per-token scales."""
    page_axis, shapes = layout.page_axis, layout.array_shapes(1)
    pools = [Pool(page_axis, tuple(n for i, n in enumerate(s) if i != page_axis), layout.dtype) for s in shapes]
    if layout.scales == "token":
        pools += [Pool(0, (layout.num_kv_heads, layout.page_size), jnp.dtype("float32"), is_scale=True)] * 2
    return tuple(pools)


def refuses_layout(layout: PageLayout) -> str | None:
    """Why no kernel can copy pages of this layout, or None."""
    if layout.page_size % SUBLANES:
        return f"pages of {layout.page_size} tokens are no whole tiles: page_size must be a multiple of {SUBLANES}"
    if layout.dtype == jnp.float16:
        return "a TPU has no float16: pages must be bfloat16, float32, int8 or float8"
    return None


class Transfers(NamedTuple):
    """Asynchronous copies of pages into ``buffers``, one for each array: ``[stages, pages_per_block, *page]``.

    There is a semaphore for each stage in ``arrived``. With one semaphore for all, the bytes of a later block could be
    taken for those of the block that is waited for, since copies may finish in any order.
    """

    layout: PageLayout
    pools: tuple[Ref, ...]
    buffers: tuple[Ref, ...]
    arrived: Ref

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self.pools[0].shape[pools_of(self.layout)[0].page_axis]

    def start(self, page: Any, stage: Any, entry: Any) -> None:
        """Start to copy a page of the pool into an entry of a stage."""
        for pool, ref, buffer in zip(pools_of(self.layout), self.pools, self.buffers, strict=True):
            pltpu.make_async_copy(pool.page(ref, page), buffer.at[stage, entry], self.arrived.at[stage]).start()

    def wait(self, stage: Any, pages: int) -> None:
        """Wait until ``pages`` more pages have arrived in a stage.

        A semaphore counts bytes, and a wait takes as many from it as its copy would move. So one wait is enough for all
        copies, and it need not name the pages: any part of the stage that is as large will do.
        """
        for buffer in self.buffers:
            landed = buffer.at[stage, pl.ds(0, pages)]
            pltpu.make_async_copy(landed, landed, self.arrived.at[stage]).wait()

    def wait_for(self, stage: Any, pages: Any) -> None:
        """`wait` for a number of pages that is known only when the kernel runs, at most a block.

        A wait needs a static size. A number below a block is split into powers of two, so that few waits are enough.
        """
        block = self.buffers[0].shape[1]

        @pl.when(pages == block)
        def _():
            self.wait(stage, block)

        @pl.when(pages != block)
        def _():
            for power in (1 << bit for bit in range(block.bit_length())):
                pl.when((pages & power) != 0)(lambda power=power: self.wait(stage, power))

    def zero_dead_values(self, stage: Any, entry: Any, live: Any) -> None:
        """Set the values of a page's tokens from offset ``live`` on to 0. The page must have arrived, or it would
        arrive on top of the zeros."""
        if jnp.issubdtype(self.layout.dtype, jnp.integer):
            return  # No integer is NaN.
        ref, token_axis = self._values(stage, entry)
        values = ref[...].astype(jnp.float32)
        token = jax.lax.broadcasted_iota(jnp.int32, values.shape, token_axis)
        ref[...] = jnp.where(token < live, values, 0.0).astype(ref.dtype)

    def zero_values(self, stage: Any, entry: Any) -> None:
        """Set the values of an entry into which no page is on its way to 0."""
        if jnp.issubdtype(self.layout.dtype, jnp.integer):
            return  # No integer is NaN.
        ref, _ = self._values(stage, entry)
        ref[...] = jnp.zeros(ref.shape, ref.dtype)

    def _values(self, stage: Any, entry: Any) -> tuple[Ref, int]:
        """The part of a page that holds its values, and the token axis of that part. In joined and interleaved order
        the part holds the keys as well."""
        axes = [axis for axis in self.layout.array_axes[-1] if axis != "page"]
        buffer = self.buffers[len(self.layout.array_axes) - 1]
        if "kv" not in axes:
            return buffer.at[stage, entry], axes.index("offset")
        values = [slice(None)] * axes.index("kv")
        axes.remove("kv")
        return buffer.at[(stage, entry, *values, 1)], axes.index("offset")
