"""All memory of the decode kernel: its operands, its results, and what it has of shared memory."""

from typing import Any, NamedTuple

# A reference to memory, inside a kernel. Pallas has no public type for it.
Ref = Any
# A word of `Inputs.presence` begins so many pages after the word before it, and tells of twice as many. So the pages of
# one block, which are at most 16, are in one word.
PAGES_PER_WORD = 16
# Warps of a block of threads.
WARPS = 4


class Inputs(NamedTuple):
    """The kernel's operands, in global memory.

    * ``q`` [seqs, kv_heads, rows, dim]: query rows of each sequence and KV head.
    * ``pools``: the arrays of pages.
    * ``pages`` i32[seqs, entries]: pages of each sequence: its block table, or the list of the pages that it visits.
    * ``presence`` i32[seqs, words]: which entries of ``pages`` are no holes. Bit ``b`` of word ``w`` is of entry
      ``16 w + b``. None for lists, which have no holes.
    * ``columns`` i32[seqs, entries]: the place of each page of a list in its sequence. None for tables.
    * ``facts`` i32[seqs, 4 + n]: for each sequence the first entry to visit and the one after the last, the position of
      the first query row, the number of keys, and the integers that the batch brings.
    * ``floats`` f32[seqs, n]: the floats that the batch brings; None without any.
    * ``arrays``: what scores and mask need of each row, [kv_heads, rows] each.
    * ``factors`` f32[seqs, kv_heads, rows]: factors of each row's products with 8-bit keys; None for others.
    """

    q: Ref
    pools: tuple[Ref, ...]
    pages: Ref
    presence: Ref | None
    columns: Ref | None
    facts: Ref
    floats: Ref | None
    arrays: tuple[Ref, ...]
    factors: Ref | None


class Outputs(NamedTuple):
    """The kernel's results: out f32[seqs, kv_heads, splits, dim, rows] and lse f32[seqs, kv_heads, splits, rows]."""

    out: Ref
    lse: Ref


class Scratch(NamedTuple):
    """Shared memory and barriers.

    * ``q`` [rows, dim]; for int8 pages [digits * rows, dim], see `narrow`.
    * ``tiles`` [stages, keys, dim]: the ring.
    * ``out`` f32[dim, rows]: results on their way, in the memory of the ring.
    * ``weights`` [rows, keys].
    * ``lse`` f32[rows].
    * ``wide`` [keys, dim]: a tile of 8-bit pages that threads have converted. None for 16-bit pages.
    * ``seen`` i8[keys]: -1 for each key of a block that some row sees, and 0 for others. None unless pages are float8.
    * ``q_arrived``, ``arrived``: barriers, the latter one for each stage of the ring.
    """

    q: Ref
    tiles: Ref
    out: Ref
    weights: Ref
    lse: Ref
    wide: Ref | None
    seen: Ref | None
    q_arrived: Ref
    arrived: Ref


class Refs(NamedTuple):
    """All memory of the kernel."""

    inputs: Inputs
    outputs: Outputs
    scratch: Scratch
