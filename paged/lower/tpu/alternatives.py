"""The schedules of the TPU lowerings that are worth timing: around what is planned, half and twice as much of each."""

import math
from collections.abc import Iterator

from paged.spec import PageLayout

from ..call import Call
from ..candidates import grid
from ..schedule import Schedule


def decode_alternatives(layout: PageLayout, call: Call, own: Schedule) -> Iterator[Schedule]:
    """Blocks and buffers together; then the other place for the loop over sequences, and more or fewer splits."""
    del layout
    pages = _around(own.pages_per_block)
    buffers = sorted({2, own.buffers, max(2, own.buffers // 2), min(8, 2 * own.buffers)})
    yield from grid(own, pages_per_block=pages, buffers=buffers)
    yield from grid(own, sequence=("inline", "grid"))
    yield from grid(own, kv_splits=[splits for splits in _around(own.kv_splits) if splits <= call.pages_per_seq])


def prefill_alternatives(layout: PageLayout, call: Call, own: Schedule) -> Iterator[Schedule]:
    """Tiles and blocks together, where a block is whole registers of 128 tokens; then the buffers."""
    del call
    whole = 128 // math.gcd(layout.page_size, 128)
    pages = sorted({max(whole, size // whole * whole) for size in _around(own.pages_per_block)})
    yield from grid(own, query_rows=[rows for rows in _around(own.query_rows) if rows >= 16], pages_per_block=pages)
    yield from grid(own, buffers=(2, 3, 4))


def _around(size: int) -> list[int]:
    return sorted({max(1, size // 2), size, 2 * size})
