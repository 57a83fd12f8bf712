"""Pages between HBM and VMEM, for every page order: buffers of whole blocks, filled page by page, awaited at once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged.spec import PageLayout

from ..chips import SUBLANES
from ..references import Ref


class Pool(NamedTuple):
    """One array of the pages: which axis counts them, the shape and dtype of one page's part, and whether it is
    scales a token, ``[kv_heads, page_size]``."""

    page_axis: int
    page_shape: tuple[int, ...]
    dtype: Any
    is_scale: bool = False

    def page(self, ref: Ref, page: Any) -> Ref:
        """One page's part of the pool."""
        return ref.at[page] if self.page_axis == 0 else ref.at[:, page]


def pools_of(layout: PageLayout) -> tuple[Pool, ...]:
    """The pool's arrays, then its scales a token."""
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
    """Asynchronous copies of pages into ``buffers [slots, pages_per_block, *page]``; one semaphore a slot."""

    layout: PageLayout
    pools: tuple[Ref, ...]
    buffers: tuple[Ref, ...]
    arrived: Ref

    def start(self, page: Any, slot: Any, at: Any) -> None:
        """Begin to copy page ``page`` of the pool to place ``at`` of a slot."""
        for pool, ref, buffer in zip(pools_of(self.layout), self.pools, self.buffers, strict=True):
            pltpu.make_async_copy(pool.page(ref, page), buffer.at[slot, at], self.arrived.at[slot]).start()

    def wait(self, slot: Any, pages: int) -> None:
        """Wait until ``pages`` more pages have arrived in a slot: semaphores count bytes, whichever they are."""
        for buffer in self.buffers:
            landed = buffer.at[slot, pl.ds(0, pages)]
            pltpu.make_async_copy(landed, landed, self.arrived.at[slot]).wait()

    def wait_for(self, slot: Any, pages: Any) -> None:
        """Wait for a number of pages known when it runs, at most a block: for a part of one in powers of two, so in few
        waits."""
        block = self.buffers[0].shape[1]

        @pl.when(pages == block)
        def _():
            self.wait(slot, block)

        @pl.when(pages != block)
        def _():
            for power in (1 << bit for bit in range(block.bit_length())):
                pl.when((pages & power) != 0)(lambda power=power: self.wait(slot, power))

    def silence(self, slot: Any, at: Any, live: Any) -> None:
        """Make the values of a page's tokens from ``live`` on 0: they may be NaN, and a weight of 0 would not help."""
        if jnp.issubdtype(self.layout.dtype, jnp.integer):
            return
        ref, token_axis = self._values(slot, at)
        values = ref[...].astype(jnp.float32)
        token = jax.lax.broadcasted_iota(jnp.int32, values.shape, token_axis)
        ref[...] = jnp.where(token < live, values, 0.0).astype(ref.dtype)

    def _values(self, slot: Any, at: Any) -> tuple[Ref, int]:
        """The part of a page that holds its values (in joined and interleaved order the keys as well), and its token
        axis."""
        axes = [axis for axis in self.layout.array_axes[-1] if axis != "page"]
        buffer = self.buffers[len(self.layout.array_axes) - 1]
        if "kv" not in axes:
            return buffer.at[slot, at], axes.index("offset")
        values = [slice(None)] * axes.index("kv")
        axes.remove("kv")
        return buffer.at[(slot, at, *values, 1)], axes.index("offset")
