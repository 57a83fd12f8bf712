"""How the rows of a tile are laid out for products with one KV head."""

import dataclasses

# Positions of a strip, and query rows that meet a block of keys in one product: fewer, and keys enter the matrix unit
# too often; more, and their scores go to memory and back.
_MOST_SPAN, _MOST_ROWS = 256, 384


def most_tiles(tokens: int, slots: int, rows: int) -> int:
    """The most tiles of ``rows`` rows that ``tokens`` query rows of ``slots`` sequences can make."""
    return tokens // rows + min(slots, tokens)


@dataclasses.dataclass(frozen=True)
class TileShape:
    """How the rows of a tile are laid out: ``positions`` consecutive rows of one sequence, of all query heads.

    A *strip* is up to 256 positions of one query head. A *part* is one or more strips that share a KV head,
    and its rows meet a block of keys together. Strips are in the order of heads and positions, parts of their strips.
    """

    positions: int
    num_q_heads: int
    group: int

    @property
    def span(self) -> int:
        """Positions of a strip."""
        return min(self.positions, _MOST_SPAN)

    @property
    def spans(self) -> int:
        """Strips a query head."""
        return self.positions // self.span

    @property
    def strips(self) -> int:
        """Strips of a tile."""
        return self.num_q_heads * self.spans

    @property
    def strips_per_part(self) -> int:
        """Strips of a part: as many as divide a KV head's and are not too many rows."""
        of_head = self.group * self.spans
        return max(n for n in range(1, of_head + 1) if of_head % n == 0 and (n == 1 or n * self.span <= _MOST_ROWS))

    @property
    def rows(self) -> int:
        """Query rows of a part."""
        return self.strips_per_part * self.span

    @property
    def parts(self) -> int:
        """Parts of a tile."""
        return self.strips // self.strips_per_part

    @property
    def parts_per_head(self) -> int:
        """Parts a KV head."""
        return self.group * self.spans // self.strips_per_part
