"""The memory that the prefill kernel reads, writes and works in, and how rows lie on their way to strips.

Several arrays of the scratch memory have a leading axis of 2. They are *double buffers*: one *half* is filled while the
other half is read. Then the halves change their roles: in the buffer of queries from tile to tile, in the buffers of
what is prepared for a block from block to block, and in the buffers of scores from strip group to strip group.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..chips import LANES, SUBLANES
from ..pages import Stream
from .loops import Index, multiple


class Inputs(NamedTuple):
    """The kernel's operands, except for its work list: first the arrays in scalar memory, then the arrays in HBM.

    * ``k_scale``, ``v_scale`` f32[kv_heads]: the factors of each KV head's stored keys and values; None where these
      have no such scales.
    * ``sinks`` f32[q_heads]: the sink of each query head; None where there are none.
    * ``arrays``: a tuple of what the scores and masks need of each query head, [q_heads] each.
    * ``own``: `OwnOperands`; None where the batch brings nothing for its rows.
    * ``q`` [tokens, q_heads, head_dim]: the queries as they are.
    * ``pools``: a tuple of the arrays of pages, and then of per-token scales.
    * ``results``: results that earlier kernels wrote, to be kept where this kernel writes nothing; None where there are
      none. They are the same memory as `Outputs.results`.
    """

    k_scale: Any
    v_scale: Any
    sinks: Any
    arrays: Any
    own: Any
    q: Any
    pools: Any
    results: Any


class Rows(NamedTuple):
    """The results of query rows.

    * ``out`` [tokens, q_heads, value_dim]: normalised values, in the dtype that the caller wants.
    * ``lse`` f32[tokens, registers, lanes]: the log-sum-exp of query head ``h`` is in lane ``h % 128`` of register
      ``h // 128``. None where the caller does not want it.
    """

    out: Any
    lse: Any


class Outputs(NamedTuple):
    """``results``: the kernel's `Rows`."""

    results: Any


class Scratch(NamedTuple):
    """The kernel's scratch memory: shapes when the kernel is launched, references inside it.

    "All rows" are the rows of all strip groups, in the order of strips: see `TileShape`. Memory for the "rows of a
    strip group" is used by one strip group after the other.

    The stream of pages, see `Stream`:

    * ``page_buffers``: [stages, pages_per_block, ...] for every pool.
    * ``pages_arrived``: a DMA semaphore for every stage.
    * ``cursor`` i32[2], ``filled`` i32[stages]: in scalar memory.
    * ``tiles``, ``facts``, ``holes``: in scalar memory, for work that the scalar core computes; None for a work list.

    Queries and results on their way:

    * ``q_buffer`` [2, positions, q_heads, head_dim], and a DMA semaphore for either half in ``q_arrived``.
    * ``own_buffer`` i32[2, positions, registers, lanes]: ``rows`` of `OwnOperands`, which arrive with the queries;
      None without.
    * ``results``: `Rows` of a tile, and one DMA semaphore ``results_left``.
    * ``apart`` f32[positions * stride, lanes]: rows between these buffers and strips, see `Strides`.

    The online softmax of one tile:

    * ``queries`` [all rows, key_lanes]: the queries by strip.
    * ``own_rows`` i32[registers, positions, lanes]: ``rows`` of `OwnOperands`; None without.
    * ``top`` f32[all rows, lanes]: the largest score so far, the same in every lane.
    * ``total`` f32[all rows, lanes]: sums of weights, which are still to be summed over lanes.
    * ``values`` f32[all rows, result_lanes]: sums of weighted values.
    * ``lse`` f32[registers, positions, lanes]: as in `Rows`; None where the caller does not want it.

    One block of keys:

    * ``scores`` f32[2, rows of a strip group, keys].
    * ``block_top`` f32[2, rows of a strip group, lanes]: the largest of each lane's scores.
    * ``visible`` i32[words * positions, keys]: which pairs of a position and a key are visible; one bit for all heads,
      or one for each run of heads, see `visible_words`.
    * ``key_position`` i32[2, 8, keys]: the same in every row.
    * ``key_place`` i32[2, 8, keys]: places of keys, which differ from positions where the batch brings positions; None
      elsewhere.
    * ``token_scales`` f32[2, 2 * kv_heads * 8, keys]: scales of keys, then of values, each the same in 8 rows; None
      without per-token scales.
    * ``deinterleaved`` f32[2, ...]: the block with its heads apart, see `Views.deinterleave`; None in other orders.
    """

    page_buffers: tuple[Any, ...]
    pages_arrived: Any
    cursor: Any
    filled: Any
    tiles: Any
    facts: Any
    holes: Any
    q_buffer: Any
    q_arrived: Any
    own_buffer: Any
    results: Any
    results_left: Any
    apart: Any
    queries: Any
    own_rows: Any
    top: Any
    total: Any
    values: Any
    scores: Any
    block_top: Any
    visible: Any
    lse: Any
    key_position: Any
    key_place: Any
    token_scales: Any
    deinterleaved: Any


class Refs(NamedTuple):
    """All memory of the kernel, by references. The stream holds the work list, the pools and the page buffers."""

    stream: Stream
    inputs: Inputs
    outputs: Outputs
    scratch: Scratch


@dataclasses.dataclass(frozen=True)
class Strides:
    """How the rows of a tile lie in `Scratch.apart`.

    A caller's rows have all heads of a position next to each other, in 16-bit numbers perhaps. A strip has one head of
    many positions. Only rows of 32-bit numbers can be read and written with a stride. So every row passes through
    ``apart``, where each head of a position has a row of 128 lanes of its own (a wider head has several, each in a
    *column* of rows of all heads)::

        row 0                   column 0 of head 0
        row 1                   column 0 of head 1
        ...
        row heads               column 1 of head 0
        ...
        row stride              the next position

    * ``num_q_heads``: query heads of a position.
    * ``key_lanes``, ``result_lanes``: see `Views`.
    """

    num_q_heads: int
    key_lanes: int
    result_lanes: int

    @property
    def q_columns(self) -> int:
        """Columns of a head's query."""
        return -(-self.key_lanes // LANES)

    @property
    def out_columns(self) -> int:
        """Columns of a head's result."""
        return -(-self.result_lanes // LANES)

    @property
    def heads(self) -> int:
        """Rows of a column: one for each head, in whole tiles of 8 rows."""
        return -(-self.num_q_heads // SUBLANES) * SUBLANES

    @property
    def stride(self) -> int:
        """Rows of a position: an odd number of tiles of 8 rows.

        With an even number of tiles, a strided access would take all its rows from a few banks of memory, one by one.
        """
        return (self.heads // SUBLANES * max(self.q_columns, self.out_columns) | 1) * SUBLANES

    @property
    def lse_registers(self) -> int:
        """Registers that hold one number for each head of a position."""
        return -(-self.num_q_heads // LANES)

    def positions_of(self, turn: Index, positions: int) -> Any:
        """Where the rows of the ``turn``-th so many positions lie."""
        return pl.ds(multiple(turn, positions * self.stride), positions * self.stride)

    def apart(self, x: Any) -> Any:
        """The rows of some positions, from their queries ``[positions, q_heads, head_dim]``.

        Lanes past the head dimension are 0: keys have values there, or anything.
        """
        positions, q_heads, dim = x.shape
        columns = []
        for first in range(0, dim, LANES):
            part = x[..., first : first + LANES]
            columns.append(jnp.pad(part, ((0, 0), (0, self.heads - q_heads), (0, LANES - part.shape[-1]))))
        rest = self.stride - len(columns) * self.heads
        if rest:
            columns.append(jnp.zeros((positions, rest, LANES), x.dtype))
        return jnp.concatenate(columns, axis=1).reshape(positions * self.stride, LANES)

    def together(self, rows: Any) -> Any:
        """The results ``[positions, q_heads, result_lanes]`` of some positions, from their rows."""
        x = rows.reshape(-1, self.stride, LANES)
        firsts = range(0, self.out_columns * self.heads, self.heads)
        return jnp.concatenate([x[:, first : first + self.num_q_heads] for first in firsts], axis=-1)

    def head_of(self, head: Index, column: int, first: Index, positions: int) -> Any:
        """Where a column of a head of some positions lies, from position ``first`` on."""
        return pl.ds(first * self.stride + column * self.heads + head, positions, stride=self.stride)
