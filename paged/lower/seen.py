"""How much of a sequence is seen, whatever its length: what sizes of blocks are worth having depends on it."""

import numpy as np

from .call import Call
from .program import Program


def most_pages_seen(program: Program, page_size: int, call: Call) -> int:
    """The most pages that one sequence's rows see, at a sample of lengths up to the table's capacity."""
    rows, capacity = call.query_rows or 1, call.pages_per_seq * page_size
    lengths = np.unique(np.concatenate([np.linspace(1, capacity, 16).astype(int), capacity - np.arange(page_size)]))
    first = np.arange(call.pages_per_seq) * page_size
    length = np.maximum(lengths, 1)[:, None]
    some = program.coverage(length - rows, length, first, first + page_size, length).some
    return max(1, int(np.max(np.sum(np.broadcast_to(some, (len(lengths), len(first))), axis=1))))
