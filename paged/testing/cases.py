"""`Case`: the static facts of one test, from which `build` makes its arrays; and the corners of a batch's values."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from paged.spec import AttentionSpec, PageLayout

Phase = Literal["decode", "ragged", "prefill"]

SLOTS = 5


@dataclasses.dataclass(frozen=True)
class Corner:
    """Lengths and row counts of five slots. A length ``(a, b)`` is ``a`` pages and ``b`` tokens, of any page size.

    A length is at most what a table holds; ``past`` gives the slots more tokens than that.
    """

    lengths: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    num_seqs: int = SLOTS
    past: tuple[int, ...] = (0,) * SLOTS


CORNERS = {
    "mixed": Corner(((2, 1), (0, 1), (0, 0), (1, 0), (4, -1)), (3, 1, 1, 2, 5)),
    "empty": Corner(((0, 0),) * 5, (1, 3, 1, 0, 2)),
    "one token": Corner(((0, 1),) * 5, (1, 1, 1, 1, 1)),
    "exact pages": Corner(((1, 0), (2, 0), (1, 0), (4, 0), (3, 0)), (1, 4, 2, 3, 1)),
    "one past a page": Corner(((1, 1), (2, 1), (3, 1), (1, 1), (2, 1)), (1, 3, 6, 2, 1)),
    "first page masked": Corner(((4, 0), (4, -1), (3, 1), (4, 0), (4, 0)), (1, 2, 3, 1, 8)),
    "more rows than tokens": Corner(((0, 2), (1, 0), (0, 1), (0, 0), (1, 1)), (5, 1, 3, 2, 4)),
    "no rows in the middle": Corner(((2, 0), (3, 1), (4, 0), (1, 1), (0, 1)), (4, 0, 0, 7, 1)),
    "few live": Corner(((3, 1), (0, 1), (2, 0), (2, 0), (2, 0)), (2, 1, 3, 3, 3), num_seqs=2),
    "one live": Corner(((4, 0), (1, 0), (1, 0), (1, 0), (1, 0)), (9, 1, 1, 1, 1), num_seqs=1),
    "all dead": Corner(((2, 0),) * 5, (3, 1, 1, 2, 5), num_seqs=0),
}
"""Lengths and rows where bugs hide, by name. A table has four pages per sequence, and a ragged batch has 16 rows: what
is left over is padding."""
PAST_THE_TABLE = Corner(((4, 0), (4, 0), (4, 0), (4, -1), (4, 0)), (2, 1, 4, 3, 5), past=(1, 2, 3, 0, 5))
"""Rows at positions that no table entry leads to: the first such position, a few behind it, and no row before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Everything static about a test. Two cases that differ in ``corner`` or ``seed`` alone share one trace.

    ``corner`` is a name in `CORNERS`, or a corner of the test's own. ``rows`` is what every slot has in a decode batch,
    and the chunk in a prefill; a ragged batch takes them from its corner and has ``tokens`` rows in all. ``sink_shape``
    is the shape that sinks are given in. The batch brings the values and ancestors that the spec asks for.
    ``has_positions`` says whether it brings positions too: None for a spec with a `Tree` alone, whose rows then are at
    their depths.
    """

    spec: AttentionSpec
    page_size: int = 4
    order: str = "packed"
    dtype: str = "float32"
    scales: str | None = None
    value_dim: int | None = None
    q_dtype: str = "float32"
    phase: Phase = "ragged"
    corner: str | Corner = "mixed"
    rows: int = 1
    tokens: int = 16
    pages_per_seq: int = 4
    sink_shape: tuple[int, ...] | None = None
    has_positions: bool | None = None
    seed: int = 0

    @property
    def layout(self) -> PageLayout:
        """The layout of the case's pages."""
        return PageLayout(
            page_size=self.page_size,
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_dim,
            dtype=jnp.dtype(self.dtype),
            order=self.order,  # pyright: ignore
            value_dim=self.value_dim,
            scales=self.scales,  # pyright: ignore
        )

    @property
    def brings_positions(self) -> bool:
        """Whether the batch says the positions of its rows."""
        return self.spec.has_ancestors if self.has_positions is None else self.has_positions

    @property
    def slots(self) -> int:
        """Sequence slots."""
        return 1 if self.phase == "prefill" else SLOTS

    @property
    def capacity(self) -> int:
        """The most tokens that a table leads to."""
        return self.pages_per_seq * self.page_size

    @property
    def num_pages(self) -> int:
        """Pages in the pool: all that the tables could map, and three that nobody does."""
        return self.slots * self.pages_per_seq + 3

    def replace(self, **changes) -> "Case":
        """This case with some facts changed."""
        return dataclasses.replace(self, **changes)

    def values(self) -> tuple[list[int], list[int], int]:
        """Lengths, row counts and live sequences of the case's corner in its phase."""
        corner = CORNERS[self.corner] if isinstance(self.corner, str) else self.corner
        lengths = [min(a * self.page_size + b, self.capacity) for a, b in corner.lengths]
        lengths = [length + past for length, past in zip(lengths, corner.past, strict=True)]
        if self.phase == "prefill":
            return lengths[:1], [self.rows], min(corner.num_seqs, 1)
        rows = list(corner.rows) if self.phase == "ragged" else [self.rows] * SLOTS
        return lengths, rows, corner.num_seqs
