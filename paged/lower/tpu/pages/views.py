"""How a block of pages is read: which query rows meet which keys in one product, and where these keys lie.

A *tile* of a block is the keys, and the values, that query rows meet in one product of matrices. Its *columns* are the
columns of the product's scores. What a tile holds depends on the page order. Here are two KV heads: ``q0`` are the
query rows of head 0, ``K0`` and ``V0`` are its keys and values, with one row for every token of the block, and ``0``
are zeros.

Packed and split order, and joined order with keys and values in registers of their own: a tile for each head. ::

    [ q0 ] x [ K0 ]              [ q1 ] x [ K1 ]

Two such tiles may be *paired*, side by side. A product then takes twice the lanes at a time, as the matrix unit of some
chips does. Queries are zero at the lanes of the other head, and each row of the result uses its own head's lanes. ::

    [ q0  0  ]  x  [ K0  K1 ]
    [ 0   q1 ]

Joined order with key and value in one register: the register serves as both. Queries are zero in the value's lanes, and
only the value's lanes of the result are used. ::

    [ q0  0 ] x [ K0  V0 ]       [ q1  0 ] x [ K1  V1 ]

Interleaved order: one tile is shared by all heads, whose keys and values take turns. Each query row ignores the scores
of what is no key of its own head. ::

    [ q0 ]  x  [ K0 of token 0 ]
    [ q1 ]     [ V0 of token 0 ]
               [ K1 of token 0 ]
               [ V1 of token 0 ]
               [ K0 of token 1 ] ...

That is cheap while query rows are few. For many query rows, a block is *deinterleaved* first: it is laid out anew, so
that every head's keys and values can be read with a stride, as a tile for each head.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from paged.spec import PageLayout

from ..chips import LANES
from ..references import Ref

# Entries of a block that one word of scalar memory has a bit for.
BITS = 32
# Pages that one word of `SeenPages` has a bit for.
_SEEN_BITS = 16


@dataclasses.dataclass(frozen=True)
class Views:
    """How a block of ``pages_per_block`` pages is read.

    * ``query_rows``, ``group``: query rows of a sequence, and query heads of a KV head, padded to whole registers.
    * ``compute_dtype``: the dtype of products' operands.
    * ``is_paired``: one tile serves two KV heads.
    * ``is_deinterleaved``: interleaved heads are read from where `deinterleave` has put them.
    """

    layout: PageLayout
    pages_per_block: int
    query_rows: int
    group: int
    compute_dtype: Any
    is_paired: bool = False
    is_deinterleaved: bool = False

    @property
    def is_shared(self) -> bool:
        """Whether one tile serves all heads."""
        return self.layout.order == "interleaved" and not self.is_deinterleaved

    @property
    def tiles(self) -> int:
        """Tiles of a block."""
        return 1 if self.is_shared else self.layout.num_kv_heads // (2 if self.is_paired else 1)

    @property
    def can_pair(self) -> bool:
        """Whether tiles can be paired.

        Heads must be even in number and fill one register each, and nothing else may be laid out by head.
        """
        is_even, is_flat = self.layout.num_kv_heads % 2 == 0, self.layout.scales != "token"
        return is_even and is_flat and not self.is_shared and self.key_lanes == self.result_lanes == LANES

    @property
    def heads_per_tile(self) -> int:
        """KV heads of a tile."""
        return self.layout.num_kv_heads // self.tiles

    @property
    def tile_rows(self) -> int:
        """Query rows that meet a tile: ``query_rows x heads_per_tile x group``, in that order."""
        return self.query_rows * self.heads_per_tile * self.group

    @property
    def absent_index(self) -> int:
        """The page index of entries of a block without a page.

        It is past every table, so the mask hides the tokens as being past every length. Their positions fit 32 bits.
        """
        return min(2**20, 2**30 // self.layout.page_size)

    @property
    def columns_per_token(self) -> int:
        """Columns of a tile for each token: one, or in a shared tile the keys and the values of all heads."""
        return 2 * self.heads_per_tile if self.is_shared else 1

    @property
    def columns(self) -> int:
        """Columns of a tile's scores."""
        return self.pages_per_block * self.layout.page_size * self.columns_per_token

    @property
    def key_lanes(self) -> int:
        """Lanes of a query and of a key as they are multiplied.

        That is the head dimension. A joined key has the lanes up to its value, or all lanes of the register that it
        shares with its value.
        """
        layout = self.layout
        if layout.order != "joined":
            return layout.head_dim
        return layout.value_lane if self._has_own_registers else 2 * layout.value_lane

    @property
    def value_lanes(self) -> slice:
        """The lanes of a result that are the value's."""
        first = 0 if self.layout.order != "joined" or self._has_own_registers else self.layout.value_lane
        return slice(first, first + self.layout.value_dim)

    @property
    def result_lanes(self) -> int:
        """Lanes of a result, including those that are not the value's."""
        return self.key_lanes if self.layout.order == "joined" else self.layout.value_dim

    @property
    def _has_own_registers(self) -> bool:
        """Whether joined keys and values are in registers of their own."""
        return self.layout.value_lane % LANES == 0

    def prefixes(self) -> tuple["Views", ...]:
        """Views of a block's first pages, fewest first: halves of halves down to one register of columns, and at last
        the whole block."""
        prefixes = [self]
        while prefixes[0].pages_per_block % 2 == 0 and prefixes[0].columns >= 2 * LANES:
            prefixes.insert(0, dataclasses.replace(self, pages_per_block=prefixes[0].pages_per_block // 2))
        return tuple(prefixes)

    def kv_head(self) -> Int[np.ndarray, "tiles tile_rows"]:
        """The KV head of each query row."""
        head = np.arange(self.tiles * self.heads_per_tile).reshape(self.tiles, 1, self.heads_per_tile, 1)
        shape = (self.tiles, self.query_rows, self.heads_per_tile, self.group)
        return np.broadcast_to(head, shape).reshape(self.tiles, -1)

    def q_head(self, group: int) -> Int[np.ndarray, "tiles tile_rows"]:
        """The query head of each row, where a KV head has ``group`` query heads. Rows of padding count as the last."""
        within = np.tile(np.minimum(np.arange(self.group), group - 1), self.query_rows * self.heads_per_tile)
        return self.kv_head() * group + within

    def query_row(self) -> Int[Array, "tile_rows columns"]:
        """The number of the sequence's query row that each row of a tile is."""
        row = jax.lax.broadcasted_iota(jnp.int32, (self.tile_rows, self.columns), 0)
        return jax.lax.div(row, self.heads_per_tile * self.group)

    def by_row(self, numbers: list[Any]) -> Array:
        """A number of each query row of the sequence, in every row of a tile that is it, ``[tile_rows, columns]``."""
        row = self.query_row()
        x = jnp.full(row.shape, numbers[0])
        for i, number in enumerate(numbers[1:], 1):
            x = jnp.where(row == i, number, x)
        return x

    def queries(self, ref: Ref, tile: int) -> Float[Array, "tile_rows dim"]:
        """The rows that meet a tile, from ``[query_rows, kv_heads, group, head_dim]``."""
        if self.query_rows == 1 and self.heads_per_tile == 1:
            return self._in_key_lanes(ref[0, tile]).astype(self.compute_dtype)
        return self.operand(ref[:, self._heads_of(tile)].astype(jnp.float32).reshape(self.tile_rows, -1))

    def operand(self, q: Float[Array, "tile_rows head_dim"]) -> Float[Array, "tile_rows dim"]:
        """A tile's rows as they are multiplied."""
        q = self._in_key_lanes(q)
        if self.is_paired:
            # Zero at the lanes of the other head, whose keys then add nothing to a score.
            head = self._head_of_row(q.shape)
            q = jnp.concatenate([jnp.where(head == i, q, 0.0) for i in range(2)], axis=1)
        return q.astype(self.compute_dtype)

    def _in_key_lanes(self, q: Float[Array, "tile_rows head_dim"]) -> Float[Array, "tile_rows key_lanes"]:
        """Queries with zeros in the lanes of a joined key's register that are not the key's."""
        missing = self.key_lanes - self.layout.head_dim if self.layout.order == "joined" else 0
        return jnp.pad(q, ((0, 0), (0, missing))) if missing else q

    def store(self, ref: Ref, tile: int, x: Float[Array, "tile_rows result_lanes"]) -> None:
        """Store a tile's results in the layout that `queries` reads."""
        x = self.in_value_lanes(x).reshape(self.query_rows, self.heads_per_tile, self.group, -1)
        ref[:, self._heads_of(tile)] = x.astype(ref.dtype)

    def in_value_lanes(self, x: Float[Array, "tile_rows result_lanes"]) -> Float[Array, "tile_rows value_dim"]:
        """The lanes of results that are the value's."""
        return x if self.result_lanes == self.layout.value_dim else x[:, self.value_lanes]

    def own_head(self, x: Float[Array, "tile_rows dims"]) -> Float[Array, "tile_rows dim"]:
        """Select each row's own head from weighted values of all heads of a tile."""
        if not self.is_paired:
            return x
        first, second = x[:, :LANES], x[:, LANES:]
        return jnp.where(self._head_of_row(first.shape) == 0, first, second)

    def _heads_of(self, tile: int) -> slice:
        return slice(tile * self.heads_per_tile, (tile + 1) * self.heads_per_tile)

    def _head_of_row(self, shape: tuple[int, ...]) -> Int[Array, "tile_rows lanes"]:
        """The head of each row, from 0 within its tile."""
        return jax.lax.rem(jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, shape, 0), self.group), self.heads_per_tile)

    def keys(self, buffers: tuple[Ref, ...], stage: Any, tile: int) -> Array:
        """A tile's keys, ``[columns, head_dim]``. The keys of a pair are side by side."""
        return self._side_by_side(buffers, stage, tile, 0)

    def values(self, buffers: tuple[Ref, ...], stage: Any, tile: int) -> Array:
        """A tile's values, ``[columns, value_dim]``. A shared tile has one array of keys and values."""
        return self._side_by_side(buffers, stage, tile, 1)

    def _side_by_side(self, buffers: tuple[Ref, ...], stage: Any, tile: int, which: int) -> Array:
        if not self.is_paired:
            return self._flat(self._stored(buffers, stage, tile, which))
        heads = (2 * tile, 2 * tile + 1)
        return jnp.concatenate([self._flat(self._stored(buffers, stage, head, which)) for head in heads], axis=1)

    def _stored(self, buffers: tuple[Ref, ...], stage: Any, tile: int, which: int) -> Array:
        pages = pl.ds(0, self.pages_per_block)
        match self.layout.order:
            case "packed":
                return buffers[0][stage, pages, which, tile]
            case "joined":
                first = which * self.layout.value_lane if self._has_own_registers else 0
                return buffers[0][stage, pages, tile, :, pl.ds(first, self.key_lanes)]
            case "split":
                return buffers[which][stage, pages, tile]
            case "interleaved":
                return buffers[0][stage, pages]
            case _:
                assert_never(self.layout.order)

    def _flat(self, x: Array) -> Array:
        """``[pages, .., dim]`` as ``[columns, dim]``."""
        # Free where the axis before the last fills whole tiles of memory. Tiles of float32 have the fewest rows.
        if x.dtype != self.compute_dtype or x.shape[-2] % (32 // x.dtype.itemsize):
            x = x.astype(jnp.float32)
        return x.reshape(-1, x.shape[-1]).astype(self.compute_dtype)

    def deinterleaved_shape(self) -> tuple[int, int, int]:
        """The shape of the float32 memory for a deinterleaved block: registers of a head, tokens x heads, lanes."""
        layout = self.layout
        tokens = self.pages_per_block * layout.page_size
        return (-(-layout.head_dim // LANES), tokens * 2 * layout.num_kv_heads, min(layout.head_dim, LANES))

    def deinterleave(self, buffers: tuple[Ref, ...], stage: Any, memory: Ref) -> None:
        """Lay an interleaved block out so that `read_deinterleaved` can read it."""
        x = buffers[0][stage, pl.ds(0, self.pages_per_block)].astype(jnp.float32)
        x = x.reshape(-1, x.shape[-1])
        for column in range(self.deinterleaved_shape()[0]):
            memory[column, pl.ds(0, x.shape[0])] = x[:, column * LANES : (column + 1) * LANES]

    def read_deinterleaved(self, memory: Ref, head: Any, which: int) -> Array:
        """A head's keys (``which`` 0) or values (1) of a deinterleaved block, ``[tokens, head_dim]``."""
        columns, _, _ = self.deinterleaved_shape()
        heads, tokens = self.layout.num_kv_heads, self.pages_per_block * self.layout.page_size
        rows = pl.ds(2 * head + which, tokens, stride=2 * heads)
        x = [memory[column, rows] for column in range(columns)]
        return (x[0] if columns == 1 else jnp.concatenate(x, axis=1)).astype(self.compute_dtype)

    def scales(self, buffer: Ref, stage: Any) -> Float[Array, "kv_heads columns"]:
        """Per-token scales, from ``[stages, pages, kv_heads, page_size]``: one row for each head's tile."""
        return jnp.concatenate([buffer[stage, entry] for entry in range(self.pages_per_block)], axis=1)

    def is_own_key(self) -> Bool[Array, "tile_rows columns"] | None:
        """Which columns of a shared tile are keys of the row's own head; None where every column is."""
        if not self.is_shared:
            return None
        shape = (self.tile_rows, self.columns)
        column = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, shape, 1), self.columns_per_token)
        return column == 2 * self._head_of_row(shape)

    def align(self, weights: Float[Array, "tile_rows columns"]) -> Float[Array, "tile_rows columns"]:
        """Move the weight of each key to the column of its value, which in a shared tile is the next one."""
        return pltpu.roll(weights, 1, axis=1) if self.is_shared else weights

    def positions(self, page_index: Any) -> Int[Array, "tile_rows columns"]:
        """The position of each column's token. ``page_index(entry)`` is the index of a page of the block."""
        page_columns = self.layout.page_size * self.columns_per_token
        width = LANES if LANES % page_columns == 0 else page_columns
        pieces = []
        for first in range(0, self.columns, width):
            lane = jax.lax.broadcasted_iota(jnp.int32, (self.tile_rows, min(width, self.columns - first)), 1)
            entry, pages = first // page_columns, lane.shape[1] // page_columns
            index = jnp.full(lane.shape, page_index(entry), jnp.int32)
            for i in range(1, pages):
                index = jnp.where(lane >= i * page_columns, page_index(entry + i), index)
            offset = jax.lax.div(jax.lax.rem(lane, page_columns), self.columns_per_token)
            pieces.append(index * self.layout.page_size + offset)
        return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)

    def positions_from(self, index: Any) -> Int[Array, "tile_rows columns"]:
        """`positions` where the pages of the block follow one another, the first one being page ``index``."""
        column = jax.lax.broadcasted_iota(jnp.int32, (self.tile_rows, self.columns), 1)
        return index * self.layout.page_size + jax.lax.div(column, self.columns_per_token)

    def present(self, words: list[Any]) -> Bool[Array, "tile_rows columns"]:
        """Which columns belong to an entry whose bit is set: entry ``i`` has bit ``i % 32`` of word ``i // 32``."""
        page_columns = self.layout.page_size * self.columns_per_token
        width = LANES if LANES % page_columns == 0 else page_columns
        pieces = []
        for first in range(0, self.columns, width):
            lane = jax.lax.broadcasted_iota(jnp.int32, (self.tile_rows, min(width, self.columns - first)), 1)
            # A piece has a power of two of entries, so that all of them are in one word.
            word, bit = divmod(first // page_columns, BITS)
            shifts = bit + jax.lax.div(lane, page_columns)
            pieces.append(jax.lax.shift_right_logical(jnp.full(lane.shape, words[word], jnp.int32), shifts) & 1)
        bits = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)
        return bits != 0

    def seen_pages(self, seen: Bool[Array, "rows columns"]) -> "SeenPages":
        """The pages of the block with a column that some row sees."""
        page_columns, pages = self.layout.page_size * self.columns_per_token, self.pages_per_block
        lanes = -(-pages // LANES) * LANES
        any_row = jnp.max(jnp.where(seen, 1.0, 0.0), axis=0, keepdims=True)
        # A product counts each page's columns at once. Zeros and ones are exact in bfloat16.
        any_row = jnp.broadcast_to(any_row, (16, self.columns)).astype(jnp.bfloat16)
        column = jax.lax.broadcasted_iota(jnp.int32, (self.columns, lanes), 0)
        page = jax.lax.broadcasted_iota(jnp.int32, (self.columns, lanes), 1)
        is_of_page = jnp.where(jax.lax.div(column, page_columns) == page, 1.0, 0.0).astype(jnp.bfloat16)
        count = dot(any_row, is_of_page, contract=0)[:1]
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
        bit = jax.lax.shift_left(jnp.ones_like(lane), jax.lax.rem(lane, _SEEN_BITS)).astype(jnp.float32)
        word_of_lane = jax.lax.div(lane, _SEEN_BITS)
        return SeenPages(
            [
                jnp.sum(jnp.where((word_of_lane == word) & (count > 0), bit, 0.0)).astype(jnp.int32)
                for word in range(-(-pages // _SEEN_BITS))
            ]
        )


class SeenPages(NamedTuple):
    """Which pages of a block hold a key that some query row sees, as bits: page ``i`` has bit ``i % 16`` of word
    ``i // 16``. A float32 sum of so many powers of two is exact."""

    words: list[Any]

    def has(self, page: Any) -> Any:
        """Whether some query row sees a key of this page."""
        at = jax.lax.div(page, _SEEN_BITS)
        word = functools.reduce(lambda word, w: jnp.where(at == w, self.words[w], word), range(len(self.words)), 0)
        return jax.lax.shift_right_logical(word, jax.lax.rem(page, _SEEN_BITS)) & 1 != 0

    def lack(self, pages: Any) -> Any:
        """Whether one of the first ``pages`` pages holds no key that some query row sees."""
        unseen = jnp.int32(0)
        for i, word in enumerate(self.words):
            bits = jnp.clip(pages - i * _SEEN_BITS, 0, _SEEN_BITS)
            unseen |= ~word & (jax.lax.shift_left(jnp.int32(1), bits) - 1)
        return unseen != 0


def dot(a: Any, b: Any, contract: int) -> Any:
    """The product of ``a [m, n]`` and ``b``, summed over axis ``contract`` of ``b``, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (contract,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def compute_dtype(layout: PageLayout, q_dtype: Any) -> Any:
    """The dtype of products' operands. Queries and stored values are exact in it: bfloat16 holds every 8-bit value."""
    stored = jnp.dtype("bfloat16") if layout.is_quantised else layout.dtype
    return jnp.dtype("bfloat16" if q_dtype == stored == jnp.bfloat16 else "float32")
