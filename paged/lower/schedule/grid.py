"""`grid`: schedules that differ from a given one in some fields; candidates for tuning."""

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

from ..base import Schedule

AnySchedule = TypeVar("AnySchedule", bound=Schedule)


def grid(own: AnySchedule, **fields: Iterable[int | str]) -> Iterator[AnySchedule]:
    """The schedule ``own`` with every combination of these values in its fields.

    >>> own = paged.XlaSchedule(pages_per_block=8)
    >>> [str(one) for one in grid(own, pages_per_block=(4, 8), row_blocks_at_once=(2,))]
    ['xla-blocks(pages_per_block=4, row_blocks_at_once=2)', 'xla-blocks(pages_per_block=8, row_blocks_at_once=2)']
    """
    for values in itertools.product(*fields.values()):
        yield own.replace(**dict(zip(fields, values, strict=True)))


def powers_up_to(values: Iterable[int], most: int) -> list[int]:
    """The values, each cut to the power of two that holds ``most``; sorted, without repeats.

    >>> powers_up_to((2, 4, 8, 16), most=5)
    [2, 4, 8]
    """
    top = 2 ** max(0, most - 1).bit_length()
    return sorted({max(1, min(value, top)) for value in values})


def around(size: int) -> list[int]:
    """Half of a size, the size, and twice the size.

    >>> around(8), around(1)
    ([4, 8, 16], [1, 2])
    """
    return sorted({max(1, size // 2), size, 2 * size})


def halvings(size: int) -> list[int]:
    """A size, and what remains of it when it is halved again and again.

    >>> halvings(12)
    [12, 6, 3, 1]
    """
    return [size >> n for n in range(size.bit_length())]
