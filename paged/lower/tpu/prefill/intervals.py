"""The prefill kernel's work without lists: the scalar core cuts a batch into tiles, and computes the pages of each."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from paged.spec import PageLayout

from ...program import Call, PageIntervals, Program, Sequences, dtypes_of, floor_div
from ..chips import Chip
from ..pages import Brought, BroughtFor, Computed, Facts, IntervalWork, for_each, hole_sign, least_and_most
from ..references import Ref
from .tiles import most_tiles

# Rows of a tile whose positions one turn of a loop compares.
_ROWS_AT_ONCE = 8


class Batch(NamedTuple):
    """What the scalar core computes the work from: the batch's `Sequences`.

    ``pages`` i32[seqs * pages_per_seq] are the block tables, one after the other: scalar memory pads rows of a matrix.
    ``brought`` are the numbers that the batch brings, flat, and ``row_positions`` i32[tokens] the positions of its
    rows; None if it brings none. The others are i32[seqs].
    """

    pages: Int[Array, " entries"]
    starts: Int[Array, " seqs"]
    counts: Int[Array, " seqs"]
    positions: Int[Array, " seqs"]
    lengths: Int[Array, " seqs"]
    brought: Brought = Brought()
    row_positions: Int[Array, " tokens"] | None = None

    @classmethod
    def of(cls, program: Program, seqs: Sequences) -> "Batch":
        """The batch of some sequences."""
        brought, own = Brought.of_numbers(program, seqs).flat(), None if seqs.own is None else seqs.own.positions
        places = seqs.tables.reshape(-1), seqs.starts, seqs.counts, seqs.positions, seqs.lengths
        return cls(*places, brought, own)

    @property
    def brings_something(self) -> bool:
        """Whether the batch brings numbers or positions."""
        return bool(jax.tree.leaves((self.brought, self.row_positions)))


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
    * ``slot``: the slot of the sequence; None where the batch brings nothing.
    """

    base: Ref
    row: Ref
    rows: Ref
    position: Ref
    length: Ref
    holes: Ref
    number: Ref
    slot: Ref | None

    @classmethod
    def scratch(cls, most: int, has_slots: bool) -> "Tiles":
        """Memory for at most so many tiles."""
        memory = pltpu.SMEM((most,), jnp.int32)
        number = pltpu.SMEM((1,), jnp.int32)
        return cls(memory, memory, memory, memory, memory, memory, number, memory if has_slots else None)


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
    def own(self) -> Computed:
        """The place of the step's first token in a tile's sequence."""
        batch: Any = self.tables
        return Computed(lambda item: batch.positions[self._slot(item)])

    def brought_for(self, item: Any) -> BroughtFor:
        """The numbers that the batch brings for a tile's sequence."""
        return self._brought_of(lambda: self._slot(item))

    @property
    def row(self) -> Ref:
        """A tile's first query row."""
        return self.tiles.row

    @property
    def rows(self) -> Ref:
        """The query rows of a tile."""
        return self.tiles.rows

    def has_holes(self, item: Any) -> Any:
        """Whether a page of a tile may be a hole."""
        return self.tiles.holes[item] < 0

    def cut(self, least_rows: int, tokens: int, num_pages: int) -> None:
        """Cut the batch into tiles, as `tiles.cut` does. Nothing is known of any item before.

        Pages outside of the pool, which has ``num_pages``, are holes.
        """
        batch: Any = self.tables
        tiles, most = self.tiles, self.query_rows

        def add(n: Any, seq: Any, base: Any, start: Any, count: Any, position: Any, length: Any, holes: Any) -> Any:
            def tile(t: Any, n: Any) -> Any:
                first = t * most
                tiles.base[n], tiles.length[n], tiles.holes[n] = base, length, holes
                if tiles.slot is not None:
                    tiles.slot[n] = seq
                tiles.row[n], tiles.position[n] = start + first, position + first
                tiles.rows[n] = jnp.minimum(count - first, most)
                return n + 1

            return jax.lax.fori_loop(0, floor_div(count + most - 1, most), tile, n)

        def of_seq(seq: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            n, end = carry
            start, count = batch.starts[seq], batch.counts[seq]
            tiled = jnp.where(count >= least_rows, count, 0)
            base, position, length = seq * self.width, batch.positions[seq], batch.lengths[seq]
            holes = self._holes(seq, base, start, tiled, position, length, num_pages)
            n = add(n, seq, base, start, tiled, position, length, holes)
            # Slots of dead sequences say anything of where their rows would begin.
            return n, jnp.where(count > 0, start + count, end)

        n, end = jax.lax.fori_loop(0, batch.starts.shape[0], of_seq, (jnp.int32(0), jnp.int32(0)))
        # Rows of no sequence are those before the first sequence's and those after the last one's.
        zero = jnp.int32(0)
        n = add(n, zero, zero, zero, jnp.minimum(batch.starts[0], end), zero, zero, zero)
        tiles.number[0] = add(n, zero, zero, end, tokens - end, zero, zero, zero)

    def _holes(self, seq: Any, base: Any, start: Any, rows: Any, position: Any, length: Any, num_pages: int) -> Any:
        """A number that is negative if a page that these rows of a sequence see is a hole.

        The pages of a sequence are looked at once, and not by each of its tiles. A test of each page between the
        products of a tile would take four times as long (modelled, with four tiles).
        """
        numbers = self._brought_of(lambda: seq).in_order(self.values)
        if self._has_own_rows:
            first, end, *_ = self._run_with_own(self._position_range(start, rows), position, length, numbers)
        else:
            first, end = self.intervals.visible(position, position + rows, length, self.width, numbers)

        def look(page: Any, holes: Any) -> Any:
            return holes | hole_sign(self.page[base + first + page], num_pages)

        return for_each(jnp.where(rows > 0, end - first, 0), look, jnp.int32(0))

    def _base(self, item: Any) -> Any:
        return self.tiles.base[item]

    def _pages(self, item: Any) -> tuple[Any, Any, Any, Any]:
        if self._has_own_rows:
            positions = self._position_range(self.tiles.row[item], self.tiles.rows[item])
            numbers = self.brought_for(item).in_order(self.values)
            found = self._run_with_own(positions, self.own[item], self.tiles.length[item], numbers)
            first, end, first_full, end_full = found
            return first, end - first, first_full, jnp.where(self.has_holes(item), first, end_full)
        p0 = self.tiles.position[item]
        rows = p0, p0 + self.tiles.rows[item], self.tiles.length[item], self.width
        numbers = self.brought_for(item).in_order(self.values)
        first, end = self.intervals.visible(*rows, numbers)
        first_full, end_full = self.intervals.visible_in_full(*rows, first, end, numbers)
        # A block with a hole needs a mask. Which block has one is not known before it is fetched.
        return first, end - first, first_full, jnp.where(self.has_holes(item), first, end_full)

    def _position_range(self, row: Any, rows: Any) -> tuple[Any, Any]:
        """The least and the greatest position of some rows of the batch, if it brings positions."""
        batch: Any = self.tables
        last = jnp.maximum(rows - 1, 0)

        def look(turn: Any, found: tuple[Any, Any]) -> tuple[Any, Any]:
            ahead = (row + jnp.minimum(turn * _ROWS_AT_ONCE + i, last) for i in range(_ROWS_AT_ONCE))
            least, most = least_and_most(batch.row_positions[row] for row in ahead)
            return jnp.minimum(found[0], least), jnp.maximum(found[1], most)

        start = (batch.row_positions[row],) * 2
        return jax.lax.fori_loop(0, floor_div(last, _ROWS_AT_ONCE, low=0) + 1, look, start)

    @property
    def _has_own_rows(self) -> bool:
        batch: Any = self.tables
        return batch.row_positions is not None

    def _brought_of(self, which: Callable[[], Any]) -> BroughtFor:
        """What the batch brings for the sequence in a slot."""
        batch: Any = self.tables
        return BroughtFor(batch.brought, which, batch.starts.shape[0])

    def _slot(self, item: Any) -> Any:
        """The slot of a tile's sequence."""
        assert self.tiles.slot is not None
        return self.tiles.slot[item]


def intervals_of(program: Program, layout: PageLayout, call: Call, rows: int, chip: Chip) -> PageIntervals | None:
    """The page intervals that the scalar core computes the work from; None where it needs lists of pages.

    It does where visible pages are not proven to be one run, where most of that run may be holes, and where scalar
    memory cannot hold the block tables.
    """
    numbers, has_slots = len(dtypes_of(program.values)), bool(program.values) or call.has_own_rows
    per_tile = 4 * (len(Tiles._fields) - (1 if has_slots else 2) + Facts.per_item(call.has_own_rows))
    taken = 4 * call.slots * (call.pages_per_seq + 4 + numbers)
    taken += per_tile * most_tiles(call.tokens, call.slots, rows)
    taken += 4 * call.tokens if call.has_own_rows else 0
    if call.has_holes or not call.num_pages or taken > chip.smem_for_lists:
        return None
    return program.page_intervals(layout.page_size)
