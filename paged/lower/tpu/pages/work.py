"""What a kernel has to do, as integers for its scalar memory, computed from the batch before it starts."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ...program import Program, Sequences, page_coverage
from ..chips import Chip

# Bytes of scalar memory for each entry and each item.
_BYTES_AN_ENTRY, _BYTES_AN_ITEM = 8, 40


class Work(NamedTuple):
    """Items of work, and the pages of each. An item is one tile of query rows (in decode, one sequence), or one of the
    parts that its pages are split into.

    Pages are listed for every tile as `Visits` lists them, ``width`` entries each, flat because scalar memory pads
    rows: first those visible in full, then the others, each in ascending order. Item ``i`` takes ``count[i]`` entries
    from ``begin[i]`` on, the first ``num_full[i]`` of which need no mask.

    * ``page`` i32[tiles * width]: where the page lies in the pool.
    * ``index`` i32[tiles * width + pages_per_block - 1]: which page of its sequence it is.
    * ``begin``, ``count``, ``num_full`` i32[items].
    * ``length`` i32[items]: of its sequence; ``position`` of the first of its query rows.
    * ``row``, ``rows`` i32[items]: its first query row, and how many there are (0 for a dead slot).
    * ``busy`` i32[items + 1]: the first item from ``i`` on that has a page; ``items`` where none has.
    * ``bounds`` i32[cores + 1]: core ``c`` does the items from ``bounds[c]`` to ``bounds[c + 1]``.
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


class Visited(NamedTuple):
    """The pages that each tile of query rows visits, in the order of `Visits`: those visible in full first."""

    tiles: Sequences
    page: Int[Array, "tiles width"]
    index: Int[Array, "tiles width"]
    num_full: Int[Array, " tiles"]
    count: Int[Array, " tiles"]

    @classmethod
    def of(cls, program: Program, tiles: Sequences, page_size: int, num_pages: int) -> "Visited":
        """`visible_pages` for all tiles at once, by one sort: a TPU has no fast scatter."""

        def coverage(position, rows, length, table):
            return page_coverage(program, position, position + rows, length, table, page_size, num_pages)

        some, full = jax.vmap(coverage)(tiles.positions, tiles.counts, tiles.lengths, tiles.tables)
        width = tiles.tables.shape[1]
        index = jnp.arange(width, dtype=jnp.int32)
        key = index + jnp.where(full, 0, jnp.where(some, width, 2 * width))
        key, page = jax.lax.sort((key, tiles.tables), dimension=1, num_keys=1)
        count = (jnp.sum(x, axis=1, dtype=jnp.int32) for x in (full, some))
        return cls(tiles, page, jax.lax.rem(key, width), *count)

    def part(self, first: Any, tiles: int) -> "Visited":
        """That many tiles from ``first`` on, which may be traced."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, tiles), self)

    def work(self, rows: slice, entries: slice, *, splits: int, pages_per_block: int, cores: int) -> Work:
        """The work of some tiles on a part of their entries, each split into ``splits`` parts of whole blocks."""

        def of_items(x: Array) -> Array:
            return jnp.repeat(x[rows], splits, total_repeat_length=x[rows].shape[0] * splits) if splits > 1 else x[rows]

        width = entries.stop - entries.start
        count, num_full = (jnp.clip(of_items(x) - entries.start, 0, width) for x in (self.count, self.num_full))
        items = count.shape[0]
        part = _ceil_div(_ceil_div(count, pages_per_block), splits) * pages_per_block
        item = jnp.arange(items, dtype=jnp.int32)
        offset = item % splits * part
        item_count = jnp.clip(count - offset, 0, part)
        return Work(
            page=self.page[rows, entries].reshape(-1),
            # A kernel looks up the positions of a whole block, also of places past the last list's end.
            index=jnp.pad(self.index[rows, entries].reshape(-1), (0, pages_per_block - 1)),
            begin=item // splits * width + offset,
            count=item_count,
            num_full=jnp.clip(num_full - offset, 0, item_count),
            length=of_items(self.tiles.lengths),
            position=of_items(self.tiles.positions),
            row=of_items(self.tiles.starts),
            rows=of_items(self.tiles.counts),
            busy=_next_busy(item_count),
            bounds=_bounds(_ceil_div(item_count, pages_per_block), cores),
        )


def _ceil_div(a: Array, b: int) -> Array:
    return (a + b - 1) // b


def _next_busy(count: Int[Array, " items"]) -> Int[Array, " items_plus_1"]:
    items = count.shape[0]
    own = jnp.where(count > 0, jnp.arange(items, dtype=jnp.int32), items)
    return jnp.append(jax.lax.cummin(own, reverse=True), items).astype(jnp.int32)


def _bounds(blocks: Int[Array, " items"], cores: int) -> Int[Array, " cores_plus_1"]:
    """Where to cut the items so that every core has about as many blocks; an item costs one more by itself."""
    items = blocks.shape[0]
    done = jnp.cumsum(blocks + 1)
    cuts = [jnp.sum(done * cores <= done[-1] * core, dtype=jnp.int32) for core in range(1, cores)]
    return jnp.stack([jnp.int32(0), *cuts, jnp.int32(items)])


def chunks(tables: tuple[int, ...], chip: Chip, splits: int = 1) -> Iterator[tuple[slice, slice]]:
    """Sequences and table entries of each kernel, so that its lists fit scalar memory: usually one kernel for all."""
    rows, entries = rows_and_entries((tables[0], tables[1]), chip, splits)
    for first_row in range(0, tables[0], rows):
        for first_entry in range(0, tables[1], entries):
            yield (
                slice(first_row, min(first_row + rows, tables[0])),
                slice(first_entry, min(first_entry + entries, tables[1])),
            )


def rows_and_entries(tables: tuple[int, int], chip: Chip, splits: int = 1) -> tuple[int, int]:
    """How many tables, and how many entries of each, one kernel can list in scalar memory."""
    seqs, width = tables
    budget = chip.smem_for_lists
    per_item = _BYTES_AN_ITEM * splits
    entries = max(1, min(width, (budget - per_item) // _BYTES_AN_ENTRY))
    return max(1, min(seqs, budget // (entries * _BYTES_AN_ENTRY + per_item))), entries
