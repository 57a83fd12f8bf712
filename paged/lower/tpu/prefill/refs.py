"""The memory that the prefill kernel reads, writes and works in, and the layout of its queries and results in HBM.

Several arrays of the scratch memory have a leading axis of 2. They are *double buffers*: one *half* is filled while the
other half is read. Then the halves change their roles: in the buffer of queries from tile to tile, in the buffers of
what is prepared for a block from block to block, and in the buffers of scores from strip group to strip group.
"""

import dataclasses
from typing import Any, NamedTuple

from ..chips import LANES
from ..pages import Stream


class Inputs(NamedTuple):
    """The kernel's operands, except for its work list: first the arrays in scalar memory, then the arrays in HBM.

    * ``k_scale`` f32[kv_heads]: the factor of each KV head's stored keys; None where keys have no such scales.
    * ``arrays``: a tuple of what the scores and masks need of each query head, [q_heads] each.
    * ``q`` f32[tokens * q_stride, lanes]: the queries, laid out as `Strides` says.
    * ``pools``: a tuple of the arrays of pages, and then of per-token scales.
    * ``results``: results that earlier kernels wrote, to be kept where this kernel writes nothing; None where there are
      none. It is the same memory as `Outputs.results`.
    """

    k_scale: Any
    arrays: Any
    q: Any
    pools: Any
    results: Any


class Outputs(NamedTuple):
    """``results`` f32[tokens * out_stride, lanes], laid out as `Strides` says."""

    results: Any


class Scratch(NamedTuple):
    """The kernel's scratch memory: shapes when the kernel is launched, references inside it.

    "All rows" are the rows of all strip groups, in the order of strips: see `TileShape`. Memory for the "rows of a
    strip group" is used by one strip group after the other.

    The stream of pages, see `Stream`:

    * ``page_buffers``: [stages, pages_per_block, ...] for every pool.
    * ``pages_arrived``: a DMA semaphore for every stage.
    * ``cursor`` i32[2], ``filled`` i32[stages]: in scalar memory.

    Queries and results on their way:

    * ``q_buffer`` f32[2, positions * q_stride, lanes], and a DMA semaphore for either half in ``q_arrived``.
    * ``out_buffer`` f32[positions * out_stride, lanes], and one DMA semaphore ``out_left``.

    The online softmax of one tile:

    * ``queries`` [all rows, key_lanes]: the queries by strip.
    * ``top`` f32[all rows, lanes]: the largest score so far, the same in every lane.
    * ``total`` f32[all rows, lanes]: sums of weights, which are still to be summed over lanes.
    * ``values`` f32[all rows, result_lanes]: sums of weighted values.
    * ``sums`` f32[registers, positions, lanes]: ``total`` and ``top`` of all heads of a position, side by side: see
      `Strides.first_sum`.

    One block of keys:

    * ``scores`` f32[2, rows of a strip group, keys].
    * ``block_top`` f32[2, rows of a strip group, lanes]: the largest of each lane's scores.
    * ``visible`` i32[positions, keys]: which pairs of a position and a key are visible.
    * ``key_position`` i32[2, 8, keys]: the same in every row.
    * ``token_scales`` f32[2, 2 * kv_heads * 8, keys]: scales of keys, then of values, each the same in 8 rows; None
      without per-token scales.
    * ``deinterleaved`` f32[2, ...]: the block with its heads apart, see `Views.deinterleave`; None in other orders.
    """

    page_buffers: tuple[Any, ...]
    pages_arrived: Any
    cursor: Any
    filled: Any
    q_buffer: Any
    q_arrived: Any
    out_buffer: Any
    out_left: Any
    queries: Any
    top: Any
    total: Any
    values: Any
    scores: Any
    block_top: Any
    visible: Any
    sums: Any
    key_position: Any
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
    """How the queries and the results of one position lie in HBM: as consecutive rows of 128 lanes.

    All heads of a position lie next to each other, so that one copy moves a range of positions. A head's rows are then
    read from VMEM with a stride, ``q`` or ``out``. In the results, the heads are followed by their sums of weights and
    their largest scores, one lane each::

        queries of a position              results of a position
        row 0   head 0                     row 0          weighted values of head 0
        row 1   head 1                     ...
        ...                                first_sum      sums of weights, and then largest scores
        row q   the next position          row out        the next position

    (for heads of up to 128 lanes; a wider head has several rows.)
    """

    num_q_heads: int
    key_lanes: int
    result_lanes: int

    @property
    def q_columns(self) -> int:
        """Rows of a head's query."""
        return -(-self.key_lanes // LANES)

    @property
    def out_columns(self) -> int:
        """Rows of a head's result."""
        return -(-self.result_lanes // LANES)

    @property
    def q(self) -> int:
        """Rows of a position's queries."""
        return _stride(self.num_q_heads * self.q_columns)

    @property
    def first_sum(self) -> int:
        """The first of the rows that hold sums and maxima.

        From this row on, number ``i`` is in lane ``i % 128`` of row ``i // 128``. Numbers 0 to ``num_q_heads - 1`` are
        the heads' sums of weights, and as many after these are their largest scores.
        """
        return self.num_q_heads * self.out_columns

    @property
    def sums(self) -> int:
        """Rows of sums and maxima."""
        return -(-2 * self.num_q_heads // LANES)

    @property
    def out(self) -> int:
        """Rows of a position's results."""
        return _stride(self.first_sum + self.sums)


def _stride(rows: int) -> int:
    """The smallest odd number of tiles of 8 rows that holds ``rows`` rows, in rows.

    With an even number of tiles, a strided read would take all its rows from a few banks of memory, one by one.
    """
    return (-(-rows // 8) | 1) * 8
