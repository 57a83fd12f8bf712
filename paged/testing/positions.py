"""Regions of positions on which masks and score operations are tried, and the truth of every rectangle in a region."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

_LARGEST = 2**31 - 1
# A region has this many positions on each side: enough for three pages of a few tokens, and for every rectangle of it
# to be tried, of which there are about 40,000.
_SIDE = 20
_BEFORE = 6  # of them before the position that the region is about


class Region(NamedTuple):
    """Query positions ``p0 .. p0 + side - 1`` and key positions ``j0 .. j0 + side - 1``."""

    p0: int
    j0: int

    @property
    def p(self) -> np.ndarray:
        """The query positions, int32[side, 1]."""
        return np.arange(self.p0, self.p0 + _SIDE, dtype=np.int64).astype(np.int32)[:, None]

    @property
    def j(self) -> np.ndarray:
        """The key positions, int32[1, side]."""
        return np.arange(self.j0, self.j0 + _SIDE, dtype=np.int64).astype(np.int32)[None, :]


class Rectangle(NamedTuple):
    """The pairs of positions ``[p0, p1) x [j0, j1)``."""

    p0: int
    p1: int
    j0: int
    j1: int

    def __str__(self) -> str:
        return f"[{self.p0}, {self.p1}) x [{self.j0}, {self.j1})"


def regions_about(subject: Any) -> list[Region]:
    """Regions where a mask or score operation may change its mind.

    They lie at the beginning of a sequence, with negative query positions; about every integer that ``subject`` holds
    and its double; at positions of thousands and millions; and at the end of int32. Keys lie beside the queries, at the
    beginning of the sequence, and one such integer behind.
    """
    numbers = sorted({n for n in integers_in(subject) if 1 < n <= _LARGEST // 4})[:6]
    last = _LARGEST - _SIDE
    queries = {0, 5000, 2**20 + 3, last, *numbers, *(2 * n for n in numbers)}
    found = []
    for q in sorted(queries):
        p0 = min(q, last) - (_BEFORE if q != last else 0)
        keys = {max(p0, 0), 0, *(max(p0 - n, 0) for n in numbers)}
        found += [Region(p0, j0) for j0 in sorted(keys)]
    return found


def integers_in(subject: Any) -> Iterator[int]:
    """Every Python integer in the fields of a dataclass, and in what its fields hold."""
    if isinstance(subject, bool):
        return
    if isinstance(subject, int):
        yield abs(subject)
    elif dataclasses.is_dataclass(subject):
        for field in dataclasses.fields(subject):
            yield from integers_in(getattr(subject, field.name))
    elif isinstance(subject, tuple | list | frozenset | set):
        for item in subject:
            yield from integers_in(item)


@functools.cache
def all_rectangles() -> np.ndarray:
    """Every rectangle of a region, int32[rectangles, 4] of offsets ``p0, p1, j0, j1``, the smallest first."""
    begin, end = np.triu_indices(_SIDE)
    spans = np.stack([begin, end + 1], axis=1)
    first, second = np.divmod(np.arange(len(spans) ** 2), len(spans))
    every = np.concatenate([spans[first], spans[second]], axis=1).astype(np.int32)
    area = (every[:, 1] - every[:, 0]) * (every[:, 3] - every[:, 2])
    return every[np.argsort(area, kind="stable")]


def some_and_full(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each of `all_rectangles` holds some visible pair, and whether it holds nothing else."""
    sums = np.zeros((_SIDE + 1, _SIDE + 1), np.int64)
    sums[1:, 1:] = values.astype(np.int64).cumsum(0).cumsum(1)
    p0, p1, j0, j1 = all_rectangles().T
    count = sums[p1, j1] - sums[p0, j1] - sums[p1, j0] + sums[p0, j0]
    return count > 0, count == (p1 - p0) * (j1 - j0)
