"""The schedules of the XLA lowering that are worth timing, by platform and by call."""

from collections.abc import Iterator

import jax

from paged.spec import PageLayout

from ..program import Call, Program, most_pages_seen
from ..schedule import grid, powers_up_to
from .cpu import FEW_ROWS
from .schedule import XlaSchedule

# Sizes to try; "tokens" are those of a page block. A CPU's core works on one row block at a time, whose tiles must fit
# its cache. A large machine is filled by row blocks side by side, and every step costs it much.
_CPU = {
    "tokens": (64, 128, 256, 512),
    "blocks_per_step": (1, 2, 4, 8),
    "rows_per_tile": (16, 32, 64, 128),
    "row_blocks_at_once": (1, 4),
}
_OTHER = {
    "tokens": (128, 256, 512, 1024),
    "blocks_per_step": (1, 4),
    "rows_per_tile": (32, 64, 128, 256),
    "row_blocks_at_once": (8, 32, 128),
}


def alternatives(program: Program, layout: PageLayout, call: Call, own: XlaSchedule) -> Iterator[XlaSchedule]:
    """A grid over the two fields that matter most in this call, and the others one at a time."""
    sizes = _CPU if jax.default_backend() == "cpu" else _OTHER
    seen = most_pages_seen(program, layout.page_size, call)
    pages = powers_up_to((tokens // layout.page_size for tokens in sizes["tokens"]), seen)
    steps = powers_up_to(sizes["blocks_per_step"], -(-seen // pages[0]))
    if call.query_rows is None:
        yield from grid(own, pages_per_block=pages)
        yield from grid(own, rows_per_tile=powers_up_to(sizes["rows_per_tile"], call.tokens))
        yield from grid(own, blocks_per_step=steps)
        blocks = call.tokens
    else:
        rows = min(call.query_rows, own.rows_per_tile)
        is_few = program.group * rows <= FEW_ROWS
        if is_few:
            yield from grid(own, pages_per_block=pages, blocks_per_step=steps)
        else:
            yield from grid(
                own, pages_per_block=pages, rows_per_tile=powers_up_to(sizes["rows_per_tile"], call.query_rows)
            )
        blocks = call.slots * -(-call.query_rows // rows)
    yield from grid(own, row_blocks_at_once=powers_up_to(sizes["row_blocks_at_once"], blocks))
