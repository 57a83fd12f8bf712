"""Where XLA:CPU makes a slow program of the plain formula: four findings, and what the XLA lowering does about each.

* *Narrow floats are converted with the whole pool* when a few pages are gathered or one token is written. `as_bits`
  moves them as integers.
* *A gather is given to several threads*, and starting and joining threads for each page block costs more than it gains.
  `Buffers` make an update in place of each gather, which stays on one thread.
* *A product repacks its right operand*. With few query rows that is the larger one, the keys. `dot_products_keys_left`
  turns the product round.
* *Each step of the softmax has a fixed cost.* With few query rows, several page blocks share one step: see
  `XlaSchedule.blocks_per_step` and `forward`.

Everything here is measured on x86-64; figures are in `benchmarks/xla_cpu`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged.spec import PageLayout

from ..jax_version import CONVERTED_WHOLE
from .walk import dot_products

# The most query rows per KV head that count as few: keys are then the left operand of the product, and the scores of
# several page blocks are cheap to keep.
FEW_ROWS = 32

Tile = Float[Array, "kv_heads tokens dim"]
_BITS = {1: jnp.uint8, 2: jnp.uint16}


def as_bits(x: Array, counter: Any = None) -> Array:
    """``x`` as unsigned integers, if this version of JAX would convert its dtype in order to move it.

    In a loop, pass the loop's ``counter``: the view depends on it then, so that XLA cannot move the view out of the
    loop, where it would be made of the whole pool.
    """
    if x.dtype not in CONVERTED_WHOLE:
        return x
    if counter is not None:
        x, _ = jax.lax.optimization_barrier((x, counter))
    return jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize])


def from_bits(bits: Array, dtype: Any) -> Array:
    """The inverse of `as_bits`."""
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)


@jax.custom_jvp
def at_index(x: Array, i: Any) -> Array:
    """``x[i]`` along the first axis, for an ``i`` in range that is a loop's counter or depends on it.

    On CPU narrow floats are moved as integers: XLA would convert all of ``x``, before the loop.
    """
    if x.dtype not in CONVERTED_WHOLE:
        return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)

    def of_bits(x: Array, i: Array) -> Array:
        return from_bits(jax.lax.dynamic_index_in_dim(as_bits(x, i), i, keepdims=False), x.dtype)

    plain = lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    return jax.lax.platform_dependent(x, i, cpu=of_bits, default=plain)


@at_index.defjvp
def _at_index_jvp(primals: Any, tangents: Any) -> Any:
    (x, i), (along, _) = primals, tangents
    return at_index(x, i), jax.lax.dynamic_index_in_dim(along, i, keepdims=False)


class Buffers(NamedTuple):
    """Where tiles of keys and of values are put, carried from page block to page block; None: each tile is made anew.

    One buffer serves both where they have one shape, so that the cache need hold only one.
    """

    keys: Tile | None
    values: Tile | None

    @classmethod
    def of(
        cls, layout: PageLayout, *, pages_per_block: int, blocks_per_step: int, row_blocks_at_once: int
    ) -> "Buffers":
        """Buffers on CPU, if a step takes several page blocks of several pages; else none.

        Where a step takes one page block, keys and values take turns, and a buffer is slower than a new tile.
        """
        is_several = blocks_per_step > 1 and pages_per_block > 1
        if not is_several or row_blocks_at_once > 1 or jax.default_backend() != "cpu":
            return cls(None, None)
        heads_keys = (layout.num_kv_heads, pages_per_block * layout.page_size)
        is_shared = layout.head_dim == layout.value_dim
        values = None if is_shared else jnp.zeros((*heads_keys, layout.value_dim), jnp.float32)
        return cls(jnp.zeros((*heads_keys, layout.head_dim), jnp.float32), values)

    def put_keys(self, take: Callable[[int, int], Tile], pages: int) -> tuple[Tile, "Buffers"]:
        """The tile of keys ``take(0, pages)``, in its buffer if there is one."""
        k = _fill(self.keys, take, pages)
        return k, self if self.keys is None else self._replace(keys=k)

    def put_values(self, take: Callable[[int, int], Tile], pages: int) -> tuple[Tile, "Buffers"]:
        """The tile of values ``take(0, pages)``, in its buffer, or in that of keys, if there is one."""
        if self.values is None:
            return self.put_keys(take, pages)
        v = _fill(self.values, take, pages)
        return v, self._replace(values=v)


def _fill(buffer: Tile | None, take: Callable[[int, int], Tile], pages: int) -> Tile:
    """``take(0, pages)``; with a buffer, one half after the other put into it.

    Halves, because XLA takes an update of the whole buffer for no update, and gathers on several threads again.
    """
    if buffer is None:
        return take(0, pages)
    first, second = take(0, pages // 2), take(pages // 2, pages)
    buffer = jax.lax.dynamic_update_slice_in_dim(buffer, first, 0, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(buffer, second, first.shape[1], axis=1)


def dot_products_keys_left(
    q: Float[Array, "kv_heads group_rows head_dim"], k: Float[Array, "kv_heads keys head_dim"]
) -> Float[Array, "kv_heads group_rows keys"]:
    """`dot_products`, with keys as the left operand where rows are few. Not for differentiation."""
    if q.shape[1] > FEW_ROWS:
        return dot_products(q, k)
    products = jnp.einsum("hkd,hrd->hkr", k, q, precision="highest")
    # Without the barrier XLA swaps the operands back.
    return jnp.swapaxes(jax.lax.optimization_barrier(products), 1, 2)
