"""Work that needs no list: where visible pages are one run, the scalar core computes it from lengths and block tables.

Nothing then runs before the kernel. When the stream of pages comes to an item, the item's *facts* are computed and kept
in scalar memory: where its pages begin in its block table, how many there are, and how many are visible in full.

Blocks that are visible in full are worked on first, as in a `WorkList`. Under a window the blocks that need a mask are
the first and the last ones. So the blocks of an item are worked on in another order than they lie in:

    block            0        1      2      3      4
    needs a mask    yes       no     no     no    yes
    is worked on    fourth   first second third  fifth
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from paged.spec import LARGEST_INT32, Value

from ...program import LEAST_POSITION, PageIntervals, Sequences, floor_div
from ..references import Ref
from .brought import Brought, BroughtFor, least_and_most
from .views import Views

# The position of the first row of a slot without rows. Nothing is visible from there.
NO_ROWS = -(2**20)


class PageTables(NamedTuple):
    """What the scalar core computes the work from.

    * ``pages`` i32[seqs * pages_per_seq]: the block tables, one after the other: scalar memory pads rows of a matrix.
    * ``position`` i32[seqs]: the position of each sequence's first query row, or `NO_ROWS`.
    * ``row`` i32[seqs]: each sequence's first query row. None where the rows of every slot follow the slot before.
    * ``brought``: what the batch brings for the sequences, flat.
    """

    pages: Int[Array, " entries"]
    position: Int[Array, " seqs"]
    row: Int[Array, " seqs"] | None
    brought: Brought = Brought()

    @classmethod
    def of(cls, seqs: Sequences, brought: Brought, has_even_rows: bool = True) -> "PageTables":
        """The tables of a batch in which the slots have as many rows each, or none."""
        position = jnp.where(seqs.counts > 0, seqs.positions, NO_ROWS)
        return cls(seqs.tables.reshape(-1), position, None if has_even_rows else seqs.starts, brought.flat())


class Facts(NamedTuple):
    """What is known of each item that the stream has come to: i32[items] each, in scalar memory.

    * ``begin``: the entry of the block tables that holds its first page.
    * ``count``: its pages.
    * ``num_full``: so many of its pages, in whole blocks, are worked on first and need no mask.
    * ``masked``: the blocks before these, which need one; None where there are none in any item.
    * ``leading``: so many pages, in whole blocks, are worked on before those: ``num_full``, and the pages of the step's
      own tokens that would be among them if the batch brought nothing for its rows. So what it brings changes no result
      where it says the same. None where both numbers are equal.
    """

    begin: Ref
    count: Ref
    num_full: Ref
    masked: Ref | None
    leading: Ref | None = None

    @classmethod
    def scratch(cls, items: int, intervals: PageIntervals, has_own_rows: bool = False) -> "Facts":
        """Memory for the facts."""
        memory = pltpu.SMEM((items,), jnp.int32)
        if intervals.begin_at_0:
            return cls(memory, memory, memory, None)
        return cls(memory, memory, memory, memory, memory if has_own_rows else None)

    @staticmethod
    def per_item(has_own_rows: bool = False) -> int:
        """The most facts of an item."""
        return len(Facts._fields) - (0 if has_own_rows else 1)


@dataclasses.dataclass(frozen=True)
class Computed:
    """Entries of a list that are computed where they are read."""

    entry: Callable[[Any], Any]

    def __getitem__(self, i: Any) -> Any:
        return self.entry(i)


@dataclasses.dataclass(frozen=True)
class IntervalWork:
    """The work on page intervals, as a `WorkList` has it.

    * ``values``: the numbers that the batch brings.
    * ``width``: pages of a block table.
    * ``query_rows``: rows of each sequence.
    * ``splits``, ``pages_per_block``, ``cores``: as in `TileVisits.work_list`.
    """

    intervals: PageIntervals
    tables: PageTables
    facts: Facts
    values: tuple[Value, ...]
    width: int
    query_rows: int
    splits: int
    pages_per_block: int
    cores: int

    @property
    def items(self) -> int:
        """The number of items."""
        return self.tables.position.shape[0] * self.splits

    @property
    def page(self) -> Ref:
        """Where each page is in the pool, by its entry. It may be a hole, which is outside of the pool."""
        return self.tables.pages

    @property
    def count(self) -> Ref:
        """The pages of an item."""
        return self.facts.count

    @property
    def num_full(self) -> Ref:
        """The pages of an item that are worked on first, without a mask."""
        return self.facts.num_full

    @property
    def position(self) -> Computed:
        """The position of an item's first row."""
        return Computed(lambda item: self.tables.position[self._seq(item)])

    @property
    def own(self) -> Computed:
        """The place of the step's first token in an item's sequence."""
        return self.position

    @property
    def length(self) -> Computed:
        """The number of keys of an item's sequence that exist."""
        return Computed(lambda item: self._length(self.position[item]))

    @property
    def brought(self) -> Brought:
        """What the batch brings, flat."""
        return self.tables.brought

    def brought_for(self, item: Any) -> BroughtFor:
        """What the batch brings for an item."""
        return BroughtFor(self.brought, lambda: self._seq(item), self.tables.position.shape[0])

    @property
    def row(self) -> Computed:
        """An item's first query row."""
        row = self.tables.row
        return Computed(lambda item: self._seq(item) * self.query_rows if row is None else row[self._seq(item)])

    @property
    def rows(self) -> Computed:
        """The query rows of an item, 0 for a slot without rows."""
        return Computed(lambda item: jnp.where(self.position[item] == NO_ROWS, 0, self.query_rows))

    def index_of(self, item: Any, entry: Any) -> Any:
        """Which page of its sequence an entry is."""
        return entry - self._base(item)

    def entry(self, item: Any, i: Any, block: int) -> Any:
        """The entry of the first page of an item's block ``i``, of ``block`` pages, in the order of work."""
        begin, masked = self.facts.begin[item], self.facts.masked
        if masked is not None:
            leading = self.facts.num_full if self.facts.leading is None else self.facts.leading
            whole, before = floor_div(leading[item], block), masked[item]
            i = jnp.where(i < whole, i + before, jnp.where(i < whole + before, i - whole, i))
        return begin + i * block

    def key_positions(self, views: Views, item: Any, i: Any, block: int) -> Any:
        """The position of each column's key in an item's block ``i``. After the last page nothing is visible."""
        return views.positions_from(self.index_of(item, self.entry(item, i, block)))

    def end_of_keys(self, item: Any, page_size: int) -> Any:
        """The position after an item's last key. Its pages may end before its sequence does."""
        end = self.index_of(item, self.facts.begin[item] + self.facts.count[item])
        return jnp.minimum(self.length[item], end * page_size)

    def item_after(self, item: Any, is_done: Any) -> Any:
        """The next item with a page if this one is done, whose facts are then known; else this one."""

        def look(carry: tuple[Any, Any]) -> tuple[Any, Any]:
            return carry[0] + 1, self._note(carry[0] + 1)

        start = jnp.int32(item), jnp.where(is_done, 0, 1)
        found, count = jax.lax.while_loop(lambda carry: (carry[1] == 0) & (carry[0] < self.items - 1), look, start)
        return jnp.where(count == 0, self.items, found)

    def bounds_of(self, core: Any) -> tuple[Any, Any]:
        """The first item of a core, and the one after its last: every core has about as many blocks.

        An item counts as one block more, for what it costs by itself.
        """
        if self.cores == 1:
            return jnp.int32(0), jnp.int32(self.items)

        def cost(item: Any) -> Any:
            pages = self._pages(item)[1]
            return floor_div(pages + self.pages_per_block - 1, self.pages_per_block) + 1

        total = jax.lax.fori_loop(0, self.items, lambda item, total: total + cost(item), jnp.int32(0))

        def cut(item: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            done, first, end = carry
            done += cost(item)
            first, end = (
                bound + jnp.where(done * self.cores <= total * share, 1, 0)
                for bound, share in ((first, core), (end, core + 1))
            )
            return done, first, end

        return jax.lax.fori_loop(0, self.items, cut, (jnp.int32(0),) * 3)[1:]

    def _note(self, item: Any) -> Any:
        """Compute the facts of an item and keep them. Returns the number of its pages."""
        facts, block = self.facts, self.pages_per_block
        first, count, first_full, end_full = self._pages(item)
        facts.begin[item] = self._base(item) + first
        facts.count[item] = count
        if facts.masked is None:
            if self._has_own_rows:
                end_full = jnp.minimum(end_full, self._first_own(item))
            facts.num_full[item] = jnp.clip(end_full - first, 0, count)
            return count
        masked = floor_div(jnp.clip(first_full - first, 0, count) + block - 1, block)
        whole = floor_div(jnp.clip(end_full - first, 0, count), block) - masked
        facts.masked[item] = masked
        leading = facts.num_full if facts.leading is None else facts.leading
        leading[item] = jnp.maximum(whole, 0) * block
        if facts.leading is not None:
            whole = jnp.minimum(whole, floor_div(self._first_own(item) - first, block) - masked)
            facts.num_full[item] = jnp.maximum(whole, 0) * block
        return count

    def _pages(self, item: Any) -> tuple[Any, Any, Any, Any]:
        """The first page of an item and its number of pages, and the interval of pages that are visible in full.

        Of the step's own tokens nothing is known if the batch brings positions or ancestors of its rows. Their pages
        are visited, and are in the interval where they would be without.
        """
        numbers, p0 = self.brought_for(item).in_order(self.values), self.position[item]
        if self._has_own_rows:
            positions = least_and_most(self.brought_for(item).positions())
            first, end, *full = self._run_with_own(positions, self.own[item], self.length[item], numbers)
        else:
            rows = p0, p0 + self.query_rows, self._length(p0), self.width
            first, end = self.intervals.visible(*rows, numbers)
            full = self.intervals.visible_in_full(*rows, first, end, numbers)
        if self.splits == 1:
            return first, end - first, *full
        blocks = floor_div(end - first + self.pages_per_block - 1, self.pages_per_block)
        per_split = floor_div(blocks + self.splits - 1, self.splits) * self.pages_per_block
        begin = first + jax.lax.rem(item, self.splits) * per_split
        return begin, jnp.clip(end - begin, 0, per_split), *full

    def _run_with_own(
        self, positions: tuple[Any, Any], place: Any, length: Any, numbers: tuple[Any, ...]
    ) -> tuple[Any, Any, Any, Any]:
        """The pages that rows see of the tokens before the step's first one, at ``place``, up to the last own token's;
        and the interval of those that are visible in full. ``positions`` are the least and the greatest of the rows."""
        intervals, (p0, last) = self.intervals, positions
        rows, first_own = (p0, jnp.minimum(last, LARGEST_INT32 - 1) + 1), self._page_of_own(place, length)
        seen, end_seen = intervals.visible(*rows, jnp.clip(place, 0, length), self.width, numbers)
        first, end = jnp.where(seen < end_seen, seen, first_own), _pages_up_to(length, intervals.page_size)
        full, end_full = intervals.visible_in_full(*rows, length, self.width, first, end, numbers)
        # Edges are not known of such positions: every page is visited, with a mask.
        is_known = p0 >= LEAST_POSITION
        return jnp.where(is_known, first, 0), end, full, jnp.where(is_known, end_full, full)

    def _first_own(self, item: Any) -> Any:
        """The page of the first of the step's own tokens. All pages before hold none."""
        return self._page_of_own(self.own[item], self.length[item])

    def _page_of_own(self, place: Any, length: Any) -> Any:
        return floor_div(jnp.clip(place, 0, length), self.intervals.page_size, low=0)

    @property
    def _has_own_rows(self) -> bool:
        return self.brought.positions is not None

    def _length(self, p0: Any) -> Any:
        return jnp.clip(p0 + self.query_rows, 0, self.width * self.intervals.page_size)

    def _base(self, item: Any) -> Any:
        """The entry of the block tables that holds the first page of an item's sequence."""
        return self._seq(item) * self.width

    def _seq(self, item: Any) -> Any:
        return item if self.splits == 1 else jax.lax.div(item, self.splits)


def _pages_up_to(length: Any, page_size: int) -> Any:
    return floor_div(length + page_size - 1, page_size, low=0)
