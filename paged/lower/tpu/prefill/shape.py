r"""How the rows of a tile are laid out for products with one KV head.

A tile is a number of consecutive query rows of one sequence, with all their query heads. The matrix unit multiplies the
queries of one head with keys of that head. So inside the kernel a query row is called a *position*, and a *row* is one
query head at one position. A tile is cut into *strips* and *strip groups*:

* A strip is one query head at up to 256 consecutive positions.
* A strip group is one or more strips of the same KV head. Its rows meet a block of keys in one product.

A tile of 128 positions, with 4 query heads and 2 KV heads, has 4 strips in 2 strip groups::

                    positions 0 .. 127
    query head 0    [     strip 0    ]   \  strip group 0: 256 rows, which meet keys of KV head 0
    query head 1    [     strip 1    ]   /
    query head 2    [     strip 2    ]   \  strip group 1: 256 rows, which meet keys of KV head 1
    query head 3    [     strip 3    ]   /

A tile of 512 positions of the same heads has two strips for each query head. Two strips would be 512 rows, so every
strip is a strip group of its own::

                    positions 0 .. 255   positions 256 .. 511
    query head 0    [     strip 0    ]   [      strip 1     ]
    query head 1    [     strip 2    ]   [      strip 3     ]    strips 0 to 3 meet keys of KV head 0
    query head 2    [     strip 4    ]   [      strip 5     ]
    query head 3    [     strip 6    ]   [      strip 7     ]    strips 4 to 7 meet keys of KV head 1
"""

import dataclasses
from typing import Any

from jax.experimental import pallas as pl

from .loops import Index, div, multiple, rem

# The most positions of a strip, and the most rows of a strip group. With fewer rows, keys enter the matrix unit too
# often. With more, the scores of a strip group do not stay in registers and go to memory and back.
_MOST_POSITIONS, _MOST_ROWS = 256, 384


@dataclasses.dataclass(frozen=True)
class TileShape:
    """The strips and strip groups of a tile: see this module's drawing.

    Strips are numbered by query head, then by position. Strip groups are numbered in the order of their strips.

    * ``positions``: consecutive query rows of one sequence. It is a power of two, at least 16.
    * ``num_q_heads``: query heads of a position.
    * ``group``: query heads of a KV head.
    """

    positions: int
    num_q_heads: int
    group: int

    @property
    def strip_rows(self) -> int:
        """Rows of a strip, which are as many positions."""
        return min(self.positions, _MOST_POSITIONS)

    @property
    def strips_per_q_head(self) -> int:
        """Strips of a query head."""
        return self.positions // self.strip_rows

    @property
    def strips(self) -> int:
        """Strips of the tile."""
        return self.num_q_heads * self.strips_per_q_head

    @property
    def strips_per_kv_head(self) -> int:
        """Strips of a KV head."""
        return self.group * self.strips_per_q_head

    @property
    def strips_per_strip_group(self) -> int:
        """Strips of a strip group: as many as divide the strips of a KV head and have at most `_MOST_ROWS` rows."""
        sizes = [n for n in range(1, self.strips_per_kv_head + 1) if self.strips_per_kv_head % n == 0]
        return max(n for n in sizes if n == 1 or n * self.strip_rows <= _MOST_ROWS)

    @property
    def strip_group_rows(self) -> int:
        """Rows of a strip group."""
        return self.strips_per_strip_group * self.strip_rows

    @property
    def strip_groups(self) -> int:
        """Strip groups of the tile."""
        return self.strips // self.strips_per_strip_group

    @property
    def strip_groups_per_kv_head(self) -> int:
        """Strip groups of a KV head."""
        return self.strips_per_kv_head // self.strips_per_strip_group

    def strips_of(self, strip_group: Index) -> list[Index]:
        """The numbers of a strip group's strips."""
        return [strip_group * self.strips_per_strip_group + i for i in range(self.strips_per_strip_group)]

    def kv_head_of(self, strip_group: Index) -> Index:
        """The KV head whose keys a strip group meets."""
        return div(strip_group, self.strip_groups_per_kv_head)

    def q_head_of(self, strip: Index) -> Index:
        """The query head of a strip."""
        return div(strip, self.strips_per_q_head)

    def first_position_of(self, strip: Index) -> Index:
        """The first position of a strip, counted from the tile's first."""
        return rem(strip, self.strips_per_q_head) * self.strip_rows

    def rows_of_strip(self, strip: Index) -> Any:
        """Where a strip's rows lie in an array of all rows of the tile."""
        return pl.ds(multiple(strip, self.strip_rows), self.strip_rows)

    def rows_of_strip_group(self, strip_group: Index) -> Any:
        """Where a strip group's rows lie in an array of all rows of the tile."""
        return pl.ds(multiple(strip_group, self.strip_group_rows), self.strip_group_rows)
