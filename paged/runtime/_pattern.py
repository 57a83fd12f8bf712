"""In which runs and repetitions the kinds of a model's layers follow one another."""

import itertools
from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """A part of a model that repeats: ``repeats`` times its runs, in order.

    ``runs`` holds for each run its number among all runs of the model, and how many layers it has in each repetition.
    """

    repeats: int
    runs: tuple[tuple[int, int], ...]

    @property
    def num_layers(self) -> int:
        """How many layers the segment has."""
        return self.repeats * sum(length for _, length in self.runs)


def segments_of(kinds: Sequence[Hashable]) -> tuple[Segment, ...]:
    """The shortest pattern that repeats in ``kinds`` from the first one, and what is left over at the end.

    >>> segments_of("aabaabaa")  # twice "aab", then "aa"
    (Segment(repeats=2, runs=((0, 2), (1, 1))), Segment(repeats=1, runs=((2, 2),)))
    """
    total = len(kinds)
    period = next(p for p in range(1, total + 1) if all(kinds[i] == kinds[i - p] for i in range(p, total)))
    repeats = total // period
    pattern, rest = _lengths(kinds[:period]), _lengths(kinds[repeats * period :])
    segments = [Segment(repeats, tuple(enumerate(pattern)))]
    if rest:
        segments.append(Segment(1, tuple(enumerate(rest, start=len(pattern)))))
    return tuple(segments)


def places_of(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """For each layer in order: its run, and its place among the layers of that run."""
    places, counts = [], {}
    for segment in segments:
        for _ in range(segment.repeats):
            for run, length in segment.runs:
                first = counts.get(run, 0)
                places += [(run, first + i) for i in range(length)]
                counts[run] = first + length
    return places


def _lengths(kinds: Sequence[Hashable]) -> list[int]:
    return [len(list(group)) for _, group in itertools.groupby(kinds)]
