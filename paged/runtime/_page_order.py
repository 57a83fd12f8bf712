"""Pages in another order: the same keys and values in other arrays, on the host."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from paged.spec import PageLayout

_BLOCK = 2**26  # bytes that are moved at a time


def in_order(layout: PageLayout, stored: PageLayout, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The arrays of a pool in the order of ``layout``, from those in the order of ``stored``. Nothing is rounded.

    **Arguments:**

    - `layout`, `stored`: equal but for their order.
    - `arrays`: those of a pool of ``stored``, without leading axes.

    **Returns:** those of the same pool in ``layout``. Raises ``ValueError`` for leading axes.

    >>> packed = PageLayout(page_size=2, num_kv_heads=1, head_dim=4, dtype=jnp.float32)
    >>> split = packed.replace(order="split")
    >>> [x.shape for x in in_order(split, packed, [np.zeros((3, 2, 1, 2, 4), np.float32)])]
    [(1, 3, 2, 4), (1, 3, 2, 4)]
    """
    if arrays[0].ndim != len(stored.array_axes[0]):
        raise ValueError(
            f"Pages with leading axes, {arrays[0].shape}, are not put into another order: load them in {stored.order!r}"
            " order."
        )
    num_pages = arrays[0].shape[stored.page_axis]
    bits = f"uint{8 * layout.dtype.itemsize}"  # whose every value is moved as it is, where a NaN may be made another
    arrays = [x.view(bits) for x in arrays]
    new = [np.empty(shape, bits) for shape in layout.array_shapes(num_pages)]
    step = max(1, _BLOCK // stored.bytes_per_page)
    for first in range(0, num_pages, step):
        block = slice(first, first + step)
        rows = layout.stack(*stored.unstack(tuple(jnp.asarray(_by_token(stored, x, block)) for x in arrays)))
        for i, x in enumerate(new):
            _by_token(layout, x, block)[...] = np.asarray(rows[i])
    return [x.view(layout.dtype) for x in new]


def _by_token(layout: PageLayout, array: np.ndarray, block: slice) -> np.ndarray:
    """Some pages of an array as [pages, offsets, ...]: a view."""
    axes = (layout.page_axis, layout.offset_axis)
    return np.moveaxis(array[(slice(None),) * layout.page_axis + (block,)], axes, (0, 1))
