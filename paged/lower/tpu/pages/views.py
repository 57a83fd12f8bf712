"""How the tiles of a page order serve the heads: which query rows meet which keys, and where a tile's keys lie.

In packed and split order every KV head has a tile of keys and one of values, and meets them with its own query rows.
In joined order with both in one register, that tile is its keys as well as its values: queries are 0 at the lanes of
values, and of the result only those lanes are read.
Two such tiles may be *paired*, side by side: products then take twice the lanes at a time, which are 256 on some chips.
Queries are 0 at the lanes of the other head, and of the result a row reads its own head's lanes.
In interleaved order the heads of a token lie next to each other. With few query rows, to part them costs more than it
saves: all query rows meet one tile of everything, and a row takes no notice of what is not a key of its own head.
With many, a block is `set_apart`: laid out anew, so that every head's keys and values can be read by a stride.
"""

import dataclasses
from typing import Any, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from paged.spec import PageLayout

Ref = Any

_LANES = 128


@dataclasses.dataclass(frozen=True)
class Views:
    """The tiles of a block of ``pages_per_block`` pages. Query rows of a KV head come in ``rows`` of ``group`` heads,
    padded from ``program.group``; ``compute_dtype`` is what products take. ``is_paired``: a tile serves two heads. With
    ``is_apart`` interleaved heads are read from where `set_apart` put them."""

    layout: PageLayout
    pages_per_block: int
    rows: int
    group: int
    compute_dtype: Any
    is_paired: bool = False
    is_apart: bool = False

    @property
    def is_shared(self) -> bool:
        """Whether one tile serves all heads."""
        return self.layout.order == "interleaved" and not self.is_apart

    @property
    def tiles(self) -> int:
        """Tiles a block."""
        return 1 if self.is_shared else self.layout.num_kv_heads // (2 if self.is_paired else 1)

    @property
    def can_pair(self) -> bool:
        """Whether the heads come in pairs of tiles that fill whole registers, and nothing else is laid out by head."""
        is_even, is_flat = self.layout.num_kv_heads % 2 == 0, self.layout.scales != "token"
        return is_even and is_flat and not self.is_shared and self.key_lanes == self.result_lanes == _LANES

    @property
    def heads(self) -> int:
        """KV heads a tile."""
        return self.layout.num_kv_heads // self.tiles

    @property
    def tile_rows(self) -> int:
        """Query rows that meet a tile: ``rows x heads x group``, in that order."""
        return self.rows * self.heads * self.group

    @property
    def nowhere(self) -> int:
        """The page index of places in a block where no page has been put: past every table, and its tokens past every
        length, but within 32 bits."""
        return min(2**20, 2**30 // self.layout.page_size)

    @property
    def columns_per_token(self) -> int:
        """Columns of a tile for each token: its keys, and in a shared tile its values too."""
        return 2 * self.heads if self.is_shared else 1

    @property
    def columns(self) -> int:
        """Columns of a tile's scores."""
        return self.pages_per_block * self.layout.page_size * self.columns_per_token

    @property
    def key_lanes(self) -> int:
        """Lanes of a query and of a key as they are multiplied: the head dimension, and where keys are joined to values
        the lanes up to these, or all if they share a register."""
        layout = self.layout
        if layout.order != "joined":
            return layout.head_dim
        return layout.value_lane if self._is_parted else 2 * layout.value_lane

    @property
    def value_lanes(self) -> slice:
        """Which lanes of a result are the value's."""
        first = 0 if self.layout.order != "joined" or self._is_parted else self.layout.value_lane
        return slice(first, first + self.layout.value_dim)

    @property
    def result_lanes(self) -> int:
        """Lanes of a result, with those that are not the value's."""
        return self.key_lanes if self.layout.order == "joined" else self.layout.value_dim

    @property
    def _is_parted(self) -> bool:
        """Whether joined keys and values are in registers of their own."""
        return self.layout.value_lane % _LANES == 0

    def parts(self) -> tuple["Views", ...]:
        """Views of the first pages of a block, smallest first: halves of halves, down to a row of a register, and the
        block as a whole."""
        parts = [self]
        while parts[0].pages_per_block % 2 == 0 and parts[0].columns >= 2 * _LANES:
            parts.insert(0, dataclasses.replace(self, pages_per_block=parts[0].pages_per_block // 2))
        return tuple(parts)

    def kv_head(self) -> Int[np.ndarray, "tiles tile_rows"]:
        """The KV head of each query row."""
        head = np.arange(self.tiles * self.heads).reshape(self.tiles, 1, self.heads, 1)
        shape = (self.tiles, self.rows, self.heads, self.group)
        return np.broadcast_to(head, shape).reshape(self.tiles, -1)

    def q_head(self, group: int) -> Int[np.ndarray, "tiles tile_rows"]:
        """The query head of each row, of ``group`` real ones a KV head; padding rows count as the last of theirs."""
        within = np.tile(np.minimum(np.arange(self.group), group - 1), self.rows * self.heads)
        return self.kv_head() * group + within

    def row(self) -> Int[Array, "tile_rows columns"]:
        """Which of the sequence's query rows each row of a tile is."""
        row = jax.lax.broadcasted_iota(jnp.int32, (self.tile_rows, self.columns), 0)
        return jax.lax.div(row, self.heads * self.group)

    def queries(self, ref: Ref, tile: int) -> Float[Array, "tile_rows dim"]:
        """The rows that meet a tile, from ``[rows, kv_heads, group, dim]``."""
        if self.rows == 1 and self.heads == 1:
            return ref[0, tile].astype(self.compute_dtype)
        q = ref[:, self._heads_of(tile)].astype(jnp.float32).reshape(self.tile_rows, -1)
        if self.is_paired:
            head = self._head_of_row(q.shape)
            q = jnp.concatenate([jnp.where(head == i, q, 0.0) for i in range(2)], axis=1)
        return q.astype(self.compute_dtype)

    def store(self, ref: Ref, tile: int, x: Float[Array, "tile_rows dim"]) -> None:
        """Put a tile's rows where `queries` would find them."""
        ref[:, self._heads_of(tile)] = x.reshape(self.rows, self.heads, self.group, -1)

    def own(self, x: Float[Array, "tile_rows dims"]) -> Float[Array, "tile_rows dim"]:
        """Weighted values of a tile's heads, those of each row's own head."""
        if not self.is_paired:
            return x
        first, second = x[:, :_LANES], x[:, _LANES:]
        return jnp.where(self._head_of_row(first.shape) == 0, first, second)

    def _heads_of(self, tile: int) -> slice:
        return slice(tile * self.heads, (tile + 1) * self.heads)

    def _head_of_row(self, shape: tuple[int, ...]) -> Int[Array, "tile_rows lanes"]:
        """Which of its tile's heads each row is of."""
        return jax.lax.rem(jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, shape, 0), self.group), self.heads)

    def keys(self, buffers: tuple[Ref, ...], slot: Any, tile: int) -> Array:
        """A tile's keys ``[columns, head_dim]``, a pair's side by side."""
        return self._side_by_side(buffers, slot, tile, 0)

    def values(self, buffers: tuple[Ref, ...], slot: Any, tile: int) -> Array:
        """A tile's values ``[columns, value_dim]``; in a shared tile the same array as its keys."""
        return self._side_by_side(buffers, slot, tile, 1)

    def _side_by_side(self, buffers: tuple[Ref, ...], slot: Any, tile: int, which: int) -> Array:
        if not self.is_paired:
            return self._flat(self._part(buffers, slot, tile, which))
        heads = (2 * tile, 2 * tile + 1)
        return jnp.concatenate([self._flat(self._part(buffers, slot, head, which)) for head in heads], axis=1)

    def _part(self, buffers: tuple[Ref, ...], slot: Any, tile: int, which: int) -> Array:
        pages = pl.ds(0, self.pages_per_block)
        match self.layout.order:
            case "packed":
                return buffers[0][slot, pages, which, tile]
            case "joined":
                first = which * self.layout.value_lane if self._is_parted else 0
                return buffers[0][slot, pages, tile, :, pl.ds(first, self.key_lanes)]
            case "split":
                return buffers[which][slot, pages, tile]
            case "interleaved":
                return buffers[0][slot, pages]
            case _:
                assert_never(self.layout.order)

    def _flat(self, x: Array) -> Array:
        """``[pages, .., dim]`` as ``[columns, dim]``: free where the axis before the last fills whole tiles."""
        if x.dtype != self.compute_dtype or x.shape[-2] % (32 // x.dtype.itemsize):
            x = x.astype(jnp.float32)
        return x.reshape(-1, x.shape[-1]).astype(self.compute_dtype)

    def apart_shape(self) -> tuple[int, int, int]:
        """The shape of the float32 memory that a block is set apart in: registers of lanes, tokens x heads, lanes."""
        layout = self.layout
        tokens = self.pages_per_block * layout.page_size
        return (-(-layout.head_dim // _LANES), tokens * 2 * layout.num_kv_heads, min(layout.head_dim, _LANES))

    def set_apart(self, buffers: tuple[Ref, ...], slot: Any, apart: Ref) -> None:
        """Lay an interleaved block out so that `read_apart` can read it."""
        x = buffers[0][slot, pl.ds(0, self.pages_per_block)].astype(jnp.float32)
        x = x.reshape(-1, x.shape[-1])
        for column in range(self.apart_shape()[0]):
            apart[column, pl.ds(0, x.shape[0])] = x[:, column * _LANES : (column + 1) * _LANES]

    def read_apart(self, apart: Ref, tile: Any, which: int) -> Array:
        """A head's keys (``which`` 0) or values (1) of a block that was set apart, ``[tokens, head_dim]``."""
        columns, _, _ = self.apart_shape()
        heads, tokens = self.layout.num_kv_heads, self.pages_per_block * self.layout.page_size
        at = pl.ds(2 * tile + which, tokens, stride=2 * heads)
        x = [apart[column, at] for column in range(columns)]
        return (x[0] if columns == 1 else jnp.concatenate(x, axis=1)).astype(self.compute_dtype)

    def scales(self, buffer: Ref, slot: Any) -> Float[Array, "kv_heads columns"]:
        """Scales a token, from ``[slots, pages, kv_heads, page_size]``, along the columns of each head's tile."""
        return jnp.concatenate([buffer[slot, at] for at in range(self.pages_per_block)], axis=1)

    def is_own_key(self) -> Bool[Array, "tile_rows columns"] | None:
        """Which columns of a shared tile are keys of the row's head; None where all columns are."""
        if not self.is_shared:
            return None
        shape = (self.tile_rows, self.columns)
        column = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, shape, 1), self.columns_per_token)
        return column == 2 * self._head_of_row(shape)

    def align(self, weights: Float[Array, "tile_rows columns"]) -> Float[Array, "tile_rows columns"]:
        """Weights of keys, at the columns of their values."""
        return pltpu.roll(weights, 1, axis=1) if self.is_shared else weights

    def positions(self, page_index: Any) -> Int[Array, "tile_rows columns"]:
        """The position of each column's token, from ``page_index(at)``, the index of the page at each place."""
        page_columns = self.layout.page_size * self.columns_per_token
        width = _LANES if _LANES % page_columns == 0 else page_columns
        pieces = []
        for first in range(0, self.columns, width):
            lane = jax.lax.broadcasted_iota(jnp.int32, (self.tile_rows, min(width, self.columns - first)), 1)
            at, places = first // page_columns, lane.shape[1] // page_columns
            index = jnp.full(lane.shape, page_index(at), jnp.int32)
            for i in range(1, places):
                index = jnp.where(lane >= i * page_columns, page_index(at + i), index)
            offset = jax.lax.div(jax.lax.rem(lane, page_columns), self.columns_per_token)
            pieces.append(index * self.layout.page_size + offset)
        return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)


def dot(a: Any, b: Any, contract: int) -> Any:
    """``a [m, n]`` times ``b``, which is summed over its axis ``contract``, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (contract,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def compute_dtype(layout: PageLayout, q_dtype: Any) -> Any:
    """What products take: exact for queries and pages alike; stored 8-bit values are exact in bfloat16."""
    stored = jnp.dtype("bfloat16") if layout.is_quantised else layout.dtype
    return jnp.promote_types(jnp.promote_types(q_dtype, stored), jnp.bfloat16)
