"""Work lists: what a kernel has to do, as integers for its scalar memory, computed from the batch before it starts."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ...program import Program, Sequences, Visits, visits_by_sort
from ..chips import Chip
from .brought import Brought, BroughtFor
from .views import Views

# Bytes of scalar memory for each entry of a list of pages, and for each item.
_BYTES_PER_ENTRY, _BYTES_PER_ITEM = 8, 40


class WorkList(NamedTuple):
    """Items of work, and the pages of each.

    An item is one tile of query rows with its pages, or with one KV split of its pages. In decode a tile is the rows of
    one sequence. Pages are listed for every tile as in `Visits`: first those that are visible in full, then the others.
    A tile's list has ``width`` entries. All lists are one flat array, because scalar memory pads the rows of a matrix.
    Item ``i`` has the ``count[i]`` entries from entry ``begin[i]`` on, and the first ``num_full[i]`` of these need no
    mask.

    * ``page`` i32[tiles * width]: where each page is in the pool.
    * ``index`` i32[tiles * width + pages_per_block - 1]: which page of its sequence it is.
    * ``begin``, ``count``, ``num_full`` i32[items].
    * ``length`` i32[items]: the length of the item's sequence.
    * ``position`` i32[items]: the position of the item's first query row.
    * ``row``, ``rows`` i32[items]: the item's first query row, and the number of its rows (0 for an unused slot).
    * ``busy`` i32[items + 1]: the first item from ``i`` on that has a page; ``items`` if none has.
    * ``bounds`` i32[cores + 1]: core ``c`` does the items from ``bounds[c]`` to ``bounds[c + 1]``.
    * ``brought``: what the batch brings for each item, flat.
    * ``own`` i32[items]: the place of the step's first token in the item's sequence, of which the item's rows may be
      later ones; None where the batch brings nothing for rows, and in decode.

    A kernel reads it by the methods, which `IntervalWork` has too.
    """

    page: Int[Array, " entries"]
    index: Int[Array, " padded_entries"]
    begin: Int[Array, " items"]
    count: Int[Array, " items"]
    num_full: Int[Array, " items"]
    length: Int[Array, " items"]
    position: Int[Array, " items"]
    row: Int[Array, " items"]
    rows: Int[Array, " items"]
    busy: Int[Array, " items_plus_1"]
    bounds: Int[Array, " cores_plus_1"]
    brought: Brought = Brought()
    own: Int[Array, " items"] | None = None

    def bounds_of(self, core: Any) -> tuple[Any, Any]:
        """The first item of a core, and the one after its last."""
        return self.bounds[core], self.bounds[core + 1]

    def item_after(self, item: Any, is_done: Any) -> Any:
        """The next item with a page if this one is done; else this one."""
        return jnp.where(is_done, self.busy[item + 1], item)

    def entry(self, item: Any, i: Any, block: int) -> Any:
        """The entry of the first page of an item's block ``i``, of ``block`` pages."""
        return self.begin[item] + i * block

    def index_of(self, item: Any, entry: Any) -> Any:
        """Which page of its sequence an entry is."""
        del item
        return self.index[entry]

    def key_positions(self, views: Views, item: Any, i: Any, block: int) -> Any:
        """The position of each column's key in an item's block ``i``; past every length where there is no page."""
        first, pages = self.entry(item, i, block), self.count[item] - i * block
        return views.positions(lambda entry: jnp.where(entry < pages, self.index[first + entry], views.absent_index))

    def end_of_keys(self, item: Any, page_size: int) -> Any:
        """The position after an item's last key. `key_positions` are past it where an item has no page."""
        del page_size
        return self.length[item]

    def brought_for(self, item: Any) -> BroughtFor:
        """What the batch brings for an item."""
        return BroughtFor(self.brought, lambda: item, self.begin.shape[0])


class TileVisits(NamedTuple):
    """Tiles of query rows, and the pages that each tile visits.

    A tile is some consecutive query rows of one sequence: all of its rows in decode, or what `Sequences.cut` gives.
    ``brought`` has a row for each tile.
    """

    tiles: Sequences
    visits: Visits
    brought: Brought = Brought()

    @classmethod
    def of(
        cls, program: Program, tiles: Sequences, page_size: int, num_pages: int, brought: Brought | None = None
    ) -> "TileVisits":
        """The pages that the program cannot rule out for any row of a tile.

        ``brought`` is what the batch brings for each tile: the numbers of its sequence, if nothing else is given.
        """
        visits = visits_by_sort(program, tiles.query_rows(), tiles.tables, page_size, num_pages)
        brought = Brought.of_numbers(program, tiles) if brought is None else brought
        return cls(tiles._replace(numbers={}, own=None), visits, brought)

    def sliced(self, first: Any, tiles: int) -> "TileVisits":
        """So many tiles from tile ``first`` on, which may be traced."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, tiles), self)

    def work_list(self, rows: slice, entries: slice, *, splits: int, pages_per_block: int, cores: int) -> WorkList:
        """The work list of some tiles, ``rows``, on some entries of their lists of pages.

        Each tile's pages are split into ``splits`` items of whole blocks, the last block perhaps excepted.
        """

        def for_items(x: Array) -> Array:
            length = x[rows].shape[0] * splits
            return jnp.repeat(x[rows], splits, axis=0, total_repeat_length=length) if splits > 1 else x[rows]

        visits, width = self.visits, entries.stop - entries.start
        count, num_full = (jnp.clip(for_items(x) - entries.start, 0, width) for x in (visits.count, visits.num_full))
        items = count.shape[0]
        per_split = _ceil_div(_ceil_div(count, pages_per_block), splits) * pages_per_block
        item = jnp.arange(items, dtype=jnp.int32)
        first = item % splits * per_split
        item_count = jnp.clip(count - first, 0, per_split)
        return WorkList(
            page=visits.page[rows, entries].reshape(-1),
            # A kernel looks up the indices of a whole block, also of entries past the end of the last list.
            index=jnp.pad(visits.index[rows, entries].reshape(-1), (0, pages_per_block - 1)),
            begin=item // splits * width + first,
            count=item_count,
            num_full=jnp.clip(num_full - first, 0, item_count),
            length=for_items(self.tiles.lengths),
            position=for_items(self.tiles.positions),
            row=for_items(self.tiles.starts),
            rows=for_items(self.tiles.counts),
            busy=_next_busy(item_count),
            bounds=_bounds(_ceil_div(item_count, pages_per_block), cores),
            brought=jax.tree.map(for_items, self.brought).flat(),
        )


def _ceil_div(a: Array, b: int) -> Array:
    return (a + b - 1) // b


def _next_busy(count: Int[Array, " items"]) -> Int[Array, " items_plus_1"]:
    items = count.shape[0]
    busy = jnp.where(count > 0, jnp.arange(items, dtype=jnp.int32), items)
    return jnp.append(jax.lax.cummin(busy, reverse=True), items).astype(jnp.int32)


def _bounds(blocks: Int[Array, " items"], cores: int) -> Int[Array, " cores_plus_1"]:
    """Where to cut the items so that every core has about as many blocks. An item counts as one block more, for what it
    costs by itself."""
    items = blocks.shape[0]
    done = jnp.cumsum(blocks + 1)
    cuts = [jnp.sum(done * cores <= done[-1] * core, dtype=jnp.int32) for core in range(1, cores)]
    return jnp.stack([jnp.int32(0), *cuts, jnp.int32(items)])


def kernel_slices(
    tables: tuple[int, ...], chip: Chip, splits: int = 1, brought: int = 0
) -> Iterator[tuple[slice, slice]]:
    """The block tables of each kernel, and the entries of these: usually one kernel has all of them.

    There are several kernels where scalar memory cannot hold the work list. ``brought`` are the numbers that the batch
    brings for each table.
    """
    rows, entries = rows_and_entries((tables[0], tables[1]), chip, splits, brought)
    for first_row in range(0, tables[0], rows):
        for first_entry in range(0, tables[1], entries):
            yield (
                slice(first_row, min(first_row + rows, tables[0])),
                slice(first_entry, min(first_entry + entries, tables[1])),
            )


def rows_and_entries(tables: tuple[int, int], chip: Chip, splits: int = 1, brought: int = 0) -> tuple[int, int]:
    """How many block tables one kernel can list in scalar memory, and how many entries of each."""
    num_tables, width = tables
    budget = chip.smem_for_lists
    per_item = (_BYTES_PER_ITEM + 4 * brought) * splits
    entries = max(1, min(width, (budget - per_item) // _BYTES_PER_ENTRY))
    return max(1, min(num_tables, budget // (entries * _BYTES_PER_ENTRY + per_item))), entries
