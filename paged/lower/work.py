"""`Work`: what a schedule makes of one step, as pictures and people read it."""

from typing import Any, NamedTuple

import numpy as np


class WorkItem(NamedTuple):
    """Query rows of one sequence, over all or some of the pages that they see.

    * ``row``, ``rows``: the first of the query rows, and how many there are.
    * ``pages``: how many pages are visited, of which the first ``full`` need no mask.
    * ``part``, ``parts``: which KV split of how many.
    """

    row: int
    rows: int
    pages: int
    full: int
    part: int = 0
    parts: int = 1


class Work(NamedTuple):
    """The work of one kernel or one loop.

    * ``words``: what an item is.
    * ``cores``: for each core its items, in the order in which they are worked on.
    * ``pages_per_block``: pages of a step of the online softmax.
    * ``buffers``: page blocks in fast memory at once: while one is worked on, the others arrive. 1 where nothing
      arrives beforehand.
    * ``bytes_per_second``: how fast pages arrive at a core at most, by the chip's published facts; None where that is
      not known.
    """

    words: str
    cores: tuple[tuple[WorkItem, ...], ...]
    pages_per_block: int
    buffers: int = 1
    bytes_per_second: float | None = None


def items_of(row: Any, rows: Any, pages: Any, full: Any, *, parts: int = 1) -> tuple[WorkItem, ...]:
    """Items of arrays that hold one entry for each, those of one sequence's parts one after the other."""
    columns = (np.asarray(x).tolist() for x in (row, rows, pages, full))
    return tuple(WorkItem(*item, part=i % parts, parts=parts) for i, item in enumerate(zip(*columns, strict=True)))


def with_pages(items: tuple[WorkItem, ...]) -> tuple[WorkItem, ...]:
    """The items that have something to do."""
    return tuple(item for item in items if item.pages)
