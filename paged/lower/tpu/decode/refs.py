"""The memory that the decode kernel reads, writes and works in."""

from typing import NamedTuple

from ..pages import Facts, Holes, IntervalWork, PageTables, Stream, WorkList
from ..references import Ref
from .update import Staging, Targets


class Scalars(NamedTuple):
    """What the kernel reads from scalar memory: a work list, or what the scalar core computes the work from.

    ``targets`` says where new rows go. It is None if nothing is written, and if the scalar core computes it.
    """

    work: WorkList | PageTables
    targets: Targets | None


class Inputs(NamedTuple):
    """The kernel's operands.

    * ``k_scale``, ``v_scale`` f32[tiles, tile_rows, 1]: the factor of each row's KV head; None without such scales.
    * ``sinks`` f32[tiles, tile_rows, 1]: the sink of each row's query head; None without sinks.
    * ``arrays``: a tuple of what the scores and the mask need of each row, [tiles, tile_rows, 1], or of each tile.
    * ``q`` [tokens, kv_heads, group, head_dim]: queries; [tokens, q_heads, head_dim] where they are laid `Apart`.
    * ``new``: for each array of pages the rows to write, f32[tokens, *row]; empty if nothing is written.
    * ``pools``: the arrays of pages, and then their per-token scales.
    """

    k_scale: Ref | None
    v_scale: Ref | None
    sinks: Ref | None
    arrays: tuple[Ref, ...]
    q: Ref
    new: tuple[Ref, ...]
    pools: tuple[Ref, ...]


class Outputs(NamedTuple):
    """The kernel's results. A KV split is one of the items that make a sequence.

    * ``out`` [splits, tokens, kv_heads, group, value_dim], or [splits, tokens, q_heads, value_dim], as queries.
    * ``lse`` f32[splits, tokens, heads_per_tile * group, lanes]: lane ``t`` holds the log-sum-exps of tile ``t``; None
      where nobody reads it.
    * ``pools``: the same memory as `Inputs.pools`; empty if nothing is written.
    """

    out: Ref
    lse: Ref | None
    pools: tuple[Ref, ...]


class Scratch(NamedTuple):
    """The kernel's scratch memory: shapes when the kernel is launched, references inside it.

    The stream of pages, see `Stream`:

    * ``pages``: for each array of pages [stages, pages_per_block, *page].
    * ``pages_arrived``: a semaphore for each stage.
    * ``cursor`` i32[2], ``filled`` i32[stages]: in scalar memory.
    * ``facts``, ``holes``: in scalar memory, for work that the scalar core computes; None for a work list.

    A ring for queries and results on their way. Item ``i`` is in stage ``i % ROWS_IN_FLIGHT``, and each stage has a
    semaphore for queries, ``q_arrived``, and one for results, ``out_left``:

    * ``q`` [ROWS_IN_FLIGHT, query_rows, kv_heads, group, head_dim], or [.., q_heads, head_dim], as in HBM.
    * ``out`` [ROWS_IN_FLIGHT, query_rows, kv_heads, group, value_dim], or [.., q_heads, value_dim].
    * ``apart`` f32[ROWS_IN_FLIGHT, query_rows, rows, lanes]: `Apart`; None where queries lie by KV head.
    * ``lse`` f32[ROWS_IN_FLIGHT, query_rows, heads_per_tile * group, lanes]; None where nobody reads it.

    Others:

    * ``next_stage`` i32[1]: the stage of the stream that the next item begins in, from one grid step to the next.
    * ``staging``: memory for new rows on their way into pages; None if nothing is written.
    """

    pages: tuple[Ref, ...]
    pages_arrived: Ref
    q: Ref
    q_arrived: Ref
    out: Ref
    apart: Ref | None
    lse: Ref | None
    out_left: Ref
    cursor: Ref
    filled: Ref
    facts: Facts | None
    holes: Holes | None
    next_stage: Ref
    staging: Staging | None


class Refs(NamedTuple):
    """All memory of the kernel, by references. The stream holds the pools and the buffers of pages."""

    work: WorkList | IntervalWork
    inputs: Inputs
    outputs: Outputs
    scratch: Scratch
    stream: Stream
