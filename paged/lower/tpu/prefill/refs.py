"""What the prefill kernel reads, writes and works in, and where in it things lie."""

import dataclasses
from typing import Any, NamedTuple

from ...program import Terms
from ..pages import Stream, Views

Ref = Any
LANES, SUBLANES = 128, 8


class Refs(NamedTuple):
    """What the kernel reads, writes and works in. Arrays with a row for every position hold all heads' rows of one
    position next to each other, so that a head's are read by a stride."""

    stream: Stream
    k_scale: Ref | None  # f32[kv_heads]
    arrays: tuple[Ref, ...]  # what the terms need: [q_heads] each
    q: Ref  # f32[tokens * q_stride, lanes]
    out: Ref  # f32[tokens * out_stride, lanes]
    q_buffer: Ref  # f32[2, positions * q_stride, lanes]
    q_arrived: Ref
    out_buffer: Ref  # f32[positions * out_stride, lanes]
    out_left: Ref
    queries: Ref  # [parts * rows, key_lanes]
    top: Ref  # f32[parts * rows, lanes], the same in every lane
    total: Ref  # f32[parts * rows, lanes], to be summed over lanes
    values: Ref  # f32[parts * rows, result_lanes]
    scores: Ref  # f32[2, rows, keys]
    block_top: Ref  # f32[2, rows, lanes], the largest of each lane's scores
    seen: Ref  # i32[positions, keys], which pairs are visible
    sums: Ref  # f32[registers, positions, lanes]: see `Strides.first_sum`
    key_position: Ref  # i32[2, 8, keys], the same in every row
    token_scales: Ref | None  # f32[2, 2 * kv_heads * 8, keys], the same in 8 rows each
    apart: Ref | None  # f32[2, ...], see `Views.set_apart`


class Block(NamedTuple):
    """A block of keys: its slot in the stream's buffers, which of two places what was prepared of it is in, and where
    its pages begin in the list of them."""

    slot: Any
    place: Any
    base: Any


class Body(NamedTuple):
    """A block's first pages: their views, the program's scores at a part's shape, and its mask for ``mask_rows`` of a
    tile's positions at a time."""

    views: Views
    scores: Terms
    mask: Terms
    mask_rows: int
    has_score_ops: bool

    @property
    def keys(self) -> int:
        """Tokens of a block."""
        return self.views.columns


@dataclasses.dataclass(frozen=True)
class Strides:
    """Registers of a position's queries and results: some for every head, and after a result's its sums and maxima."""

    num_q_heads: int
    key_lanes: int
    result_lanes: int

    @property
    def q_columns(self) -> int:
        """Registers of a head's query."""
        return -(-self.key_lanes // LANES)

    @property
    def out_columns(self) -> int:
        """Registers of a head's result."""
        return -(-self.result_lanes // LANES)

    @property
    def q(self) -> int:
        """Rows a position of the queries."""
        return _stride(self.num_q_heads * self.q_columns)

    @property
    def first_sum(self) -> int:
        """Where the sums of weights begin, and after those of all heads their maxima: number ``i`` is lane ``i % 128``
        of row ``i // 128`` from here on."""
        return self.num_q_heads * self.out_columns

    @property
    def sums(self) -> int:
        """Registers of sums and maxima."""
        return -(-2 * self.num_q_heads // LANES)

    @property
    def out(self) -> int:
        """Rows a position of the results."""
        return _stride(self.first_sum + self.sums)


def _stride(rows: int) -> int:
    """At least so many rows, in whole tiles of 8 and an odd number of these: a stride of an even number makes all
    rows of a register come from a few banks of memory, one after the other."""
    return (-(-rows // 8) | 1) * 8
