"""The schedules of the XLA lowering that are worth timing, by platform and by what the batch is."""

from collections.abc import Iterator

import jax

from paged.spec import PageLayout

from ..base import Schedule
from ..program import Call, Program, most_pages_seen
from ..schedule import grid, powers_up_to
from .walk import FEW_ROWS

# Sizes to try, where the first is the tokens of a block of pages. A core works on one block of rows at a time, and what
# it holds must fit its cache; a large machine is filled by lanes, and pays for every step.
_CPU = {
    "tokens": (64, 128, 256, 512),
    "blocks_per_step": (1, 2, 4, 8),
    "query_rows": (16, 32, 64, 128),
    "lanes": (1, 4),
}
_OTHER = {
    "tokens": (128, 256, 512, 1024),
    "blocks_per_step": (1, 4),
    "query_rows": (32, 64, 128, 256),
    "lanes": (8, 32, 128),
}


def alternatives(program: Program, layout: PageLayout, call: Call, own: Schedule) -> Iterator[Schedule]:
    """A grid of two fields that weigh most in the batch, and the others one at a time."""
    sizes = _CPU if jax.default_backend() == "cpu" else _OTHER
    seen = most_pages_seen(program, layout.page_size, call)
    pages = powers_up_to((tokens // layout.page_size for tokens in sizes["tokens"]), seen)
    steps = powers_up_to(sizes["blocks_per_step"], -(-seen // pages[0]))
    if call.query_rows is None:
        yield from grid(own, pages_per_block=pages)
        yield from grid(own, query_rows=powers_up_to(sizes["query_rows"], call.tokens))
        yield from grid(own, blocks_per_step=steps)
        blocks = call.tokens
    else:
        rows = min(call.query_rows, own.query_rows)
        is_few = program.group * rows <= FEW_ROWS
        if is_few:
            yield from grid(own, pages_per_block=pages, blocks_per_step=steps)
        else:
            yield from grid(own, pages_per_block=pages, query_rows=powers_up_to(sizes["query_rows"], call.query_rows))
        blocks = call.slots * -(-call.query_rows // rows)
    yield from grid(own, lanes=powers_up_to(sizes["lanes"], blocks))
