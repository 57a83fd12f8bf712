"""Pages of 8-bit numbers: what the matrix unit multiplies in their place.

The matrix unit multiplies numbers of one width, and it reads the tile of values across its rows, which it does for
16-bit numbers alone.

* int8 keys are multiplied as they lie. A query is three int8 digits, of 256 each, so that sums of products are exact.
* float8 keys, and all values, are *widened*: threads load a tile of the ring, convert it, and store it for the matrix
  unit. Every 8-bit number is one of the wider dtype too.

No number of a page is multiplied by its scale. A head's scale of keys is a factor of its scores, and that of values a
factor of its results.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from paged.spec import PageLayout

from ..jax_version import plgpu
from .refs import WARPS, Ref

DIGITS = 3
# The largest number of three digits: its first is 127.
_LARGEST = 127 * 2.0**16
# The power of two that no query of float8 pages reaches: the largest float16 is 65504.
_POWER = 15
# Numbers of a row that one thread converts. It loads 8 bytes, and stores 16.
_BESIDE = 8
_LANES = 32
# The matrix unit reads tiles of 8 rows of so many bytes, which are swizzled.
_ROW_BYTES = 128


def is_multiplied_as_it_lies(layout: PageLayout, *, is_key: bool) -> bool:
    """Whether the matrix unit reads keys, or values, from the ring."""
    return not layout.is_quantised or (is_key and layout.dtype == jnp.int8)


def weights_dtype(layout: PageLayout) -> Any:
    """The dtype in which values and weights are multiplied."""
    if not layout.is_quantised:
        return layout.dtype
    return jnp.dtype("bfloat16" if layout.dtype == jnp.int8 else "float16")


def queries_dtype(layout: PageLayout) -> Any:
    """The dtype in which queries are multiplied."""
    return layout.dtype if layout.dtype == jnp.int8 else weights_dtype(layout)


def query_tile(layout: PageLayout, rows: int) -> tuple[int, int]:
    """The shape of the queries of a KV head, as they are multiplied."""
    return rows * (DIGITS if layout.dtype == jnp.int8 else 1), layout.head_dim


def swizzled(dtype: Any, dim: int) -> tuple[Any, Any]:
    """How a tile lies that the matrix unit or `widen` reads."""
    row = min(_ROW_BYTES, dim * jnp.dtype(dtype).itemsize)
    return plgpu.TilingTransform((8, row // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(row)


def queries_of(
    q: Float[Array, "seqs kv_heads rows dim"], layout: PageLayout
) -> tuple[Shaped[Array, "seqs kv_heads _ dim"], Float[Array, "seqs kv_heads rows"] | None]:
    """Queries as they are multiplied, and what products with them are multiplied by.

    For float8 pages each row is multiplied by a power of two, so that it fits float16. Numbers below 2^-39 of the
    row's largest one may become 0. For int8 pages a row is rounded to 2^-24 of its largest number.
    """
    if not layout.is_quantised:
        return q, None
    rows = q.astype(jnp.float32)
    most = jnp.max(jnp.abs(rows), axis=-1)
    most = jnp.where(most == 0, 1.0, most)
    if layout.dtype == jnp.int8:
        return _digits(jnp.round(rows / most[..., None] * _LARGEST).astype(jnp.int32)), most / _LARGEST
    exponent = jnp.frexp(most)[1] - _POWER
    return jnp.ldexp(rows, -exponent[..., None]).astype(jnp.float16), jnp.ldexp(jnp.ones_like(most), exponent)


def _digits(numbers: Array) -> Array:
    """Digits from -128 to 127 of whole numbers: first the highest digits of all rows, at last the lowest ones."""
    digits = []
    for _ in range(DIGITS):
        digit = (numbers + 128) % 256 - 128
        digits.append(digit.astype(jnp.int8))
        numbers = (numbers - digit) // 256
    return jnp.concatenate(digits[::-1], axis=-2)


def joined(products: Any, rows: int) -> Any:
    """The products [keys, rows] of whole queries, of products [keys, digits * rows] with their digits, if they have
    any. Float32 holds every product with one digit: 127 * 128 * 256 is below 2^24."""
    if products.shape[1] == rows:
        return products
    highest, *lower = (
        jax.lax.slice(products, (0, i * rows), (products.shape[0], (i + 1) * rows)).astype(jnp.float32)
        for i in range(DIGITS)
    )
    for digit in lower:
        highest = highest * 256.0 + digit
    return highest


def widen(tile: Ref, wide: Ref) -> None:
    """Convert a tile of 8-bit numbers into ``wide``. The caller calls `commit_smem` before a product reads it."""
    narrow = plgpu.load(tile, layout=_beside(tile.shape[1]))  # pyright: ignore
    wide[...] = narrow.astype(wide.dtype)


def silence(tile: Ref, seen: Ref) -> None:
    """Put 0 in the place of values that no row sees. Each thread stores what it loads itself, here and in `widen`."""
    layout: Any = _beside(tile.shape[1])
    narrow = plgpu.load(tile, layout=layout)
    bits = plgpu.load(seen, layout=layout.reduce(1), optimized=False)
    bits = jax.lax.bitcast_convert_type(narrow, jnp.int8) & jax.lax.broadcast_in_dim(bits, tile.shape, [0])
    tile[...] = jax.lax.bitcast_convert_type(bits, tile.dtype)


def _beside(dim: int) -> Any:
    """A layout of registers in which a warp has whole rows, of which each thread has `_BESIDE` numbers. So neither the
    loads nor the stores, twice as wide, of its threads meet in a bank of shared memory."""
    width = min(dim, _ROW_BYTES)
    rows = _LANES * _BESIDE // width
    tiling = plgpu.Tiling(((WARPS * rows, width), (rows, width), (_BESIDE,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
