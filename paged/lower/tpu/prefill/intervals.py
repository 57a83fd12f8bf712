"""The prefill kernel's work without lists: the scalar core cuts a batch into tiles, and computes the pages of each."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from paged.spec import PageLayout

from ...program import Call, PageIntervals, Program, Sequences, floor_div
from ..chips import Chip
from ..pages import Brought, Facts, IntervalWork, for_each, hole_sign
from ..references import Ref
from .tiles import most_tiles


class Batch(NamedTuple):
    """What the scalar core computes the work from: the batch's `Sequences`.

    ``pages`` i32[seqs * pages_per_seq] are the block tables, one after the other: scalar memory pads rows of a matrix.
    The others are i32[seqs].
    """

    pages: Int[Array, " entries"]
    starts: Int[Array, " seqs"]
    counts: Int[Array, " seqs"]
    positions: Int[Array, " seqs"]
    lengths: Int[Array, " seqs"]

    @classmethod
    def of(cls, seqs: Sequences) -> "Batch":
        """The batch of some sequences."""
        return cls(seqs.tables.reshape(-1), seqs.starts, seqs.counts, seqs.positions, seqs.lengths)


class Uncut(NamedTuple):
    """A batch that the kernel is to cut into tiles.

    * ``intervals``: the pages that rows see.
    * ``least_rows``: sequences of fewer rows have no tile.
    """

    intervals: PageIntervals
    batch: Batch
    least_rows: int


class Tiles(NamedTuple):
    """The tiles of a batch, as `tiles.cut` makes them, in scalar memory: i32[tiles] each.

    * ``base``: the entry of the block tables that holds the first page of the tile's sequence.
    * ``row``, ``rows``: the first query row, and the number of query rows.
    * ``position``: the position of the first query row.
    * ``length``: the length of the sequence; 0 for rows of no sequence.
    * ``holes``: negative if the sequence has a hole among the pages that its rows see.
    * ``number`` i32[1]: the number of tiles.
    """

    base: Ref
    row: Ref
    rows: Ref
    position: Ref
    length: Ref
    holes: Ref
    number: Ref

    @classmethod
    def scratch(cls, most: int) -> "Tiles":
        """Memory for at most so many tiles."""
        memory = pltpu.SMEM((most,), jnp.int32)
        return cls(memory, memory, memory, memory, memory, memory, pltpu.SMEM((1,), jnp.int32))


@dataclasses.dataclass(frozen=True)
class TileWork(IntervalWork):
    """The work on the tiles of a batch, where visible pages are intervals. An item is a tile.

    * ``tables``: the `Batch`.
    * ``query_rows``: the most rows of a tile.
    """

    tiles: Tiles

    @property
    def items(self) -> Any:
        """The number of tiles, once they are cut."""
        return self.tiles.number[0]

    @property
    def position(self) -> Ref:
        """The position of a tile's first row."""
        return self.tiles.position

    @property
    def length(self) -> Ref:
        """The number of keys of a tile's sequence that exist."""
        return self.tiles.length

    @property
    def row(self) -> Ref:
        """A tile's first query row."""
        return self.tiles.row

    @property
    def rows(self) -> Ref:
        """The query rows of a tile."""
        return self.tiles.rows

    @property
    def brought(self) -> Brought:
        """Nothing."""
        return Brought()

    def has_holes(self, item: Any) -> Any:
        """Whether a page of a tile may be a hole."""
        return self.tiles.holes[item] < 0

    def cut(self, least_rows: int, tokens: int, num_pages: int) -> None:
        """Cut the batch into tiles, as `tiles.cut` does. Nothing is known of any item before.

        Pages outside of the pool, which has ``num_pages``, are holes.
        """
        batch: Any = self.tables
        tiles, most = self.tiles, self.query_rows

        def add(n: Any, base: Any, start: Any, count: Any, position: Any, length: Any, holes: Any) -> Any:
            def tile(t: Any, n: Any) -> Any:
                first = t * most
                tiles.base[n], tiles.length[n], tiles.holes[n] = base, length, holes
                tiles.row[n], tiles.position[n] = start + first, position + first
                tiles.rows[n] = jnp.minimum(count - first, most)
                return n + 1

            return jax.lax.fori_loop(0, floor_div(count + most - 1, most), tile, n)

        def of_seq(seq: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            n, end = carry
            start, count = batch.starts[seq], batch.counts[seq]
            tiled = jnp.where(count >= least_rows, count, 0)
            base, position, length = seq * self.width, batch.positions[seq], batch.lengths[seq]
            n = add(n, base, start, tiled, position, length, self._holes(base, position, tiled, length, num_pages))
            # Slots of dead sequences say anything of where their rows would begin.
            return n, jnp.where(count > 0, start + count, end)

        n, end = jax.lax.fori_loop(0, batch.starts.shape[0], of_seq, (jnp.int32(0), jnp.int32(0)))
        # Rows of no sequence are those before the first sequence's and those after the last one's.
        zero = jnp.int32(0)
        n = add(n, zero, zero, jnp.minimum(batch.starts[0], end), zero, zero, zero)
        tiles.number[0] = add(n, zero, end, tokens - end, zero, zero, zero)

    def _holes(self, base: Any, position: Any, rows: Any, length: Any, num_pages: int) -> Any:
        """A number that is negative if a page that these rows of a sequence see is a hole.

        The pages of a sequence are looked at once, and not by each of its tiles. A test of each page between the
        products of a tile would take four times as long (modelled, with four tiles).
        """
        first, end = self.intervals.visible(position, position + rows, length, self.width)

        def look(page: Any, holes: Any) -> Any:
            return holes | hole_sign(self.page[base + first + page], num_pages)

        return for_each(jnp.where(rows > 0, end - first, 0), look, jnp.int32(0))

    def _base(self, item: Any) -> Any:
        return self.tiles.base[item]

    def _pages(self, item: Any) -> tuple[Any, Any, Any, Any]:
        p0 = self.tiles.position[item]
        rows = p0, p0 + self.tiles.rows[item], self.tiles.length[item], self.width
        first, end = self.intervals.visible(*rows)
        first_full, end_full = self.intervals.visible_in_full(*rows, first, end)
        # A block with a hole needs a mask. Which block has one is not known before it is fetched.
        return first, end - first, first_full, jnp.where(self.has_holes(item), first, end_full)


def intervals_of(program: Program, layout: PageLayout, call: Call, rows: int, chip: Chip) -> PageIntervals | None:
    """The page intervals that the scalar core computes the work from; None where it needs lists of pages.

    It does where visible pages are not proven to be one run, where most of that run may be holes, and where scalar
    memory cannot hold the block tables.
    """
    per_tile = 4 * (len(Tiles._fields) - 1 + Facts.per_item())
    taken = 4 * call.slots * (call.pages_per_seq + len(Batch._fields) - 1)
    taken += per_tile * most_tiles(call.tokens, call.slots, rows)
    if call.has_holes or not call.num_pages or taken > chip.smem_for_lists:
        return None
    return program.page_intervals(layout.page_size)
