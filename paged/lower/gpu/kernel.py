"""The decode kernel for Hopper: online softmax over the visible pages of one sequence and one KV head.

A block of threads, one warpgroup, has one KV split of one sequence and one KV head. It works on its page blocks in
order. The tokens of a block are the long side of both products, since the matrix unit multiplies at least 64 rows and
a group of query heads is far shorter:

    scores [keys, rows] = keys [keys, dim] @ queries.T [dim, rows]
    values [dim, rows] += values.T [dim, keys] @ weights [keys, rows]

A ring of tiles in shared memory feeds it. Tile ``2i`` is the keys of block ``i``, tile ``2i + 1`` its values. A tile is
on its way from the moment that the tile in its place before it was used.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from paged.spec import Given, PageLayout

from ..jax_version import plgpu
from ..program import Program, Terms, by_name, dtypes_of, update_maximum

# A reference to memory, inside a kernel. Pallas has no public type for it.
Ref = Any
KEYS, VALUES = 0, 1
# Columns of values that are selected at once: registers do not hold a tile of 256.
_COLUMNS = 64


class Inputs(NamedTuple):
    """The kernel's operands, in global memory.

    * ``q`` [seqs, kv_heads, rows, dim]: query rows of each sequence and KV head.
    * ``pools``: the arrays of pages.
    * ``tables`` i32[seqs, pages_per_seq].
    * ``facts`` i32[seqs, 4 + n]: for each sequence the first visible page and the page after the last one, the position
      of the first query row, the number of keys, and the integers that the batch brings.
    * ``floats`` f32[seqs, n]: the floats that the batch brings; None without any.
    * ``arrays``: what scores and mask need of each row, [kv_heads, rows] each.
    """

    q: Ref
    pools: tuple[Ref, ...]
    tables: Ref
    facts: Ref
    floats: Ref | None
    arrays: tuple[Ref, ...]


class Outputs(NamedTuple):
    """The kernel's results: out f32[seqs, kv_heads, splits, dim, rows] and lse f32[seqs, kv_heads, splits, rows]."""

    out: Ref
    lse: Ref


class Scratch(NamedTuple):
    """Shared memory and barriers.

    * ``q`` [rows, dim].
    * ``tiles`` [stages, keys, dim]: the ring.
    * ``out`` f32[dim, rows]: results on their way, in the memory of the ring.
    * ``weights`` [rows, keys].
    * ``lse`` f32[rows].
    * ``q_arrived``, ``arrived``: barriers, the latter one for each stage of the ring.
    """

    q: Ref
    tiles: Ref
    out: Ref
    weights: Ref
    lse: Ref
    q_arrived: Ref
    arrived: Ref


class Refs(NamedTuple):
    """All memory of the kernel."""

    inputs: Inputs
    outputs: Outputs
    scratch: Scratch


class Item(NamedTuple):
    """What one block of threads works on: ``blocks`` page blocks from page ``first`` on, before page ``end``.

    ``position`` is that of the first query row, ``length`` the number of keys, ``given`` what the batch brings.
    """

    seq: Any
    head: Any
    split: Any
    first: Any
    end: Any
    blocks: Any
    position: Any
    length: Any
    given: Given


class Sums(NamedTuple):
    """An online softmax over the blocks so far, all float32.

    ``top`` [rows] is the maximum of scores, ``total`` [keys, rows] sums weights, block upon block, and ``values``
    [dim, rows] sums weighted values. To add up the totals of all keys takes an exchange between warps, so it is left
    for the end.
    """

    top: Any
    total: Any
    values: Any


@dataclasses.dataclass(frozen=True)
class Decode:
    """The kernel's static facts.

    * ``terms``: of tiles ``[keys, rows]``. Scores are multiplied by log2(e): weights are powers of two.
    * ``rows``: query rows of a KV head, padded to a multiple of 8; ``group`` of them are of one query row.
    * ``pages_per_block``, ``stages``, ``splits``: the schedule.
    """

    program: Program
    layout: PageLayout
    terms: Terms
    rows: int
    pages_per_block: int
    stages: int
    splits: int

    @property
    def keys(self) -> int:
        """Tokens of a page block."""
        return self.pages_per_block * self.layout.page_size

    def run(self, refs: Refs) -> None:
        """Attend over one item, and store its state."""
        seq, head, split = (jax.lax.axis_index(name) for name in ("seq", "head", "split"))
        scratch, item = refs.scratch, self.item(refs, seq, head, split)
        plgpu.copy_gmem_to_smem(refs.inputs.q.at[seq, head], scratch.q, scratch.q_arrived)
        for tile in range(self.stages):
            block, kind = divmod(tile, 2)
            self.fetch(refs, item, jnp.int32(block), kind, tile)
        plgpu.barrier_wait(scratch.q_arrived)
        arrays = tuple(self._row_array(ref, head) for ref in refs.inputs.arrays)
        row = plgpu.layout_cast(jnp.full((self.rows,), -jnp.inf, jnp.float32), plgpu.Layout.WGMMA.reduce(0))
        start = Sums(row, self._zeros(self.keys), self._zeros(self.layout.head_dim))
        sums = jax.lax.fori_loop(
            jnp.int32(0), item.blocks, lambda i, sums: self.step(refs, item, arrays, i, sums), start
        )
        self.store(refs, item, sums)

    def item(self, refs: Refs, seq: Any, head: Any, split: Any) -> Item:
        """The item of a block of threads: every split has as many page blocks, the last ones perhaps fewer."""
        facts, values = refs.inputs.facts, self.program.values
        first, end, position, length = (facts[seq, i] for i in range(4))
        blocks = _ceil_div(end - first, self.pages_per_block)
        of_split = _ceil_div(blocks, self.splits)
        begin = jnp.minimum(split * of_split, blocks)
        ints, floats = iter(range(4, facts.shape[1])), iter(range(len(values)))
        numbers = [
            facts[seq, next(ints)] if dtype == jnp.int32 else refs.inputs.floats[seq, next(floats)]  # pyright: ignore
            for dtype in dtypes_of(values)
        ]
        blocks = jnp.minimum(of_split, blocks - begin)
        first = first + begin * self.pages_per_block
        return Item(seq, head, split, first, end, blocks, position, length, Given(by_name(values, numbers)))

    def fetch(self, refs: Refs, item: Item, block: Any, kind: int, stage: Any, pages: Any = None) -> None:
        """Start the copies of a page block's keys or values into a stage of the ring, if the item has that block."""

        @pl.when(block < item.blocks)
        def _():
            size, scratch = self.layout.page_size, refs.scratch
            for i, page in enumerate(self.pages(refs, item, block) if pages is None else pages):
                # A hole has no page. Page 0 comes in its place, so that as many bytes arrive, and is not looked at.
                page = jnp.where(self.is_page(refs, page), page, 0)
                target = scratch.tiles.at[stage, pl.ds(i * size, size)]
                source = self._in_pool(refs, page, item.head, kind)
                plgpu.copy_gmem_to_smem(source, target, scratch.arrived.at[stage])

    def pages(self, refs: Refs, item: Item, block: Any) -> list[Any]:
        """The table entries of a page block. Past the item's last page that page comes again: it is in the cache."""
        first = item.first + block * self.pages_per_block
        last = jnp.maximum(item.end - 1, 0)
        return [refs.inputs.tables[item.seq, jnp.minimum(first + i, last)] for i in range(self.pages_per_block)]

    def is_page(self, refs: Refs, page: Any) -> Any:
        """Whether a table entry is a page of the pool, and no hole."""
        axis = self.layout.page_axis
        return (page >= 0) & (page < refs.inputs.pools[0].shape[axis])

    def _in_pool(self, refs: Refs, page: Any, head: Any, kind: int) -> Ref:
        """The keys or the values of one head in a page, [page_size, dim]."""
        if self.layout.order == "packed":
            return refs.inputs.pools[0].at[page, kind, head]
        return refs.inputs.pools[kind].at[head, page]

    def step(self, refs: Refs, item: Item, arrays: tuple[Any, ...], i: Any, sums: Sums) -> Sums:
        """Take in page block ``i``: a step of the online softmax, as in `docs/semantics.md`, with data on its way."""
        scratch, tile = refs.scratch, 2 * i
        # Early: what is read here comes while keys are awaited and multiplied.
        here = self.pages(refs, item, i)
        later = [self.pages(refs, item, i + (kind + self.stages) // 2) for kind in (KEYS, VALUES)]

        stage = self._await(refs, tile)
        s = _product(scratch.tiles.at[stage], scratch.q.T) * self.terms.factor
        self._refill(refs, item, i, KEYS, stage, later)

        p, j = self._positions(item, i)
        s = self.terms.scores(arrays, item.given, s, p, j)
        present = self._present(refs, item, i, here)
        visible = self.terms.visible(arrays, item.given, p, j, item.length) & present.of_tile((self.keys, self.rows))
        s = jnp.where(visible, s, -jnp.inf)

        top, origin, decay = update_maximum(sums.top, jnp.max(s, axis=0), jnp.exp2)
        weights = jnp.exp2(s - self._of_rows(origin, self.keys))
        total = sums.total * self._of_rows(decay, self.keys) + weights
        scratch.weights.T[...] = plgpu.layout_cast(weights.astype(scratch.weights.dtype), plgpu.Layout.WGMMA)

        stage = self._await(refs, tile + 1)
        self._select_values(refs, stage, present, visible)
        # Weights and selected values were stored by threads, and the matrix unit reads them past the threads' caches:
        # without the fence it may read what was there before.
        plgpu.commit_smem()
        product = _product(scratch.tiles.at[stage].T, scratch.weights.T)
        values = sums.values * self._of_rows(decay, self.layout.head_dim) + product
        self._refill(refs, item, i, VALUES, stage, later)
        return Sums(top, total, values)

    def _await(self, refs: Refs, tile: Any) -> Any:
        """Wait for a tile. Returns its stage of the ring."""
        stage = jax.lax.rem(tile, jnp.int32(self.stages))
        plgpu.barrier_wait(refs.scratch.arrived.at[stage])
        return stage

    def _refill(self, refs: Refs, item: Item, i: Any, kind: int, stage: Any, later: list[list[Any]]) -> None:
        """Fetch the tile that comes next into a stage whose tile was used. Not earlier: the product must be done."""
        block = i + (kind + self.stages) // 2
        self.fetch(refs, item, block, (kind + self.stages) % 2, stage, later[kind])

    def _positions(self, item: Item, i: Any) -> tuple[Any, Any]:
        """The positions of each row's query and of each key, as tiles."""
        shape, group = (self.keys, self.rows), self.program.group
        row = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        first = (item.first + i * self.pages_per_block) * self.layout.page_size
        return item.position + (row if group == 1 else jax.lax.div(row, jnp.full(shape, group, jnp.int32))), first + key

    def _present(self, refs: Refs, item: Item, i: Any, pages: list[Any]) -> "Present":
        """Which pages of a block are there: within the item, and no holes."""
        bits = jnp.int32(0)
        first = item.first + i * self.pages_per_block
        for n, page in enumerate(pages):
            is_there = self.is_page(refs, page) & (first + n < item.end)
            bits = bits | jnp.where(is_there, jnp.int32(1 << n), 0)
        end = (first + self.pages_per_block) * self.layout.page_size
        is_whole = (bits == (1 << self.pages_per_block) - 1) & (end <= item.length)
        return Present(bits, is_whole, self.layout.page_size)

    def _select_values(self, refs: Refs, stage: Any, present: "Present", visible: Any) -> None:
        """Put 0 in the place of values that no row sees, where a block may have some that belong to nobody.

        They may be NaN, and a weight of 0 times NaN is NaN.
        """
        may_visit_unseen = self.program.may_visit_unseen(self.layout.page_size)

        @pl.when(True if may_visit_unseen else jnp.logical_not(present.is_whole))
        def _():
            seen = jnp.max(jnp.where(visible, 1.0, 0.0).astype(jnp.float32), axis=1)
            for column in range(0, self.layout.head_dim, _COLUMNS):
                part = refs.scratch.tiles.at[stage, :, pl.ds(column, _COLUMNS)]
                v = plgpu.load(part, layout=plgpu.Layout.WGMMA)  # pyright: ignore
                part[...] = jnp.where(jax.lax.broadcast_in_dim(seen, v.shape, [0]) > 0, v, jnp.zeros_like(v))

    def store(self, refs: Refs, item: Item, sums: Sums) -> None:
        """Store an item's normalised results. An item that has seen no key has ``(0, -inf)``."""
        scratch, outputs = refs.scratch, refs.outputs
        total = jnp.sum(sums.total, axis=0)
        safe = jnp.where(total == 0, jnp.ones_like(total), total)
        scratch.out[...] = sums.values / self._of_rows(safe, self.layout.head_dim)
        scratch.lse[...] = jnp.where(
            total == 0, jnp.full_like(total, -jnp.inf), (sums.top + jnp.log2(safe)) * math.log(2)
        )
        # Without the fence the copies may take what was in shared memory before.
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.out, outputs.out.at[item.seq, item.head, item.split])
        plgpu.copy_smem_to_gmem(scratch.lse, outputs.lse.at[item.seq, item.head, item.split])
        # A kernel must not end while a copy is on its way.
        plgpu.wait_smem_to_gmem(0)

    def _zeros(self, rows: int) -> Any:
        return plgpu.layout_cast(jnp.zeros((rows, self.rows), jnp.float32), plgpu.Layout.WGMMA)

    def _of_rows(self, x: Any, keys: int) -> Any:
        """A number of each row, as a tile."""
        return jax.lax.broadcast_in_dim(x, (keys, self.rows), [1])

    def _row_array(self, ref: Ref, head: Any) -> Any:
        # Rows are few, so that the load is no whole line of the cache. It comes once.
        layout: Any = plgpu.Layout.WGMMA.reduce(0)
        return self._of_rows(plgpu.load(ref.at[head], layout=layout, optimized=False), self.keys)  # pyright: ignore


class Present(NamedTuple):
    """Which pages of a block are there: a bit for each. ``is_whole``: all are, and no key is past the length."""

    bits: Any
    is_whole: Any
    page_size: int

    def of_tile(self, shape: tuple[int, int]) -> Any:
        """Which keys of a tile are in a page that is there."""
        key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        page = jax.lax.shift_right_logical(key, jnp.full(shape, self.page_size.bit_length() - 1, jnp.int32))
        return jnp.bitwise_and(jax.lax.shift_right_logical(jnp.full(shape, self.bits, jnp.int32), page), 1) == 1


def _product(a: Ref, b: Ref) -> Any:
    """The product of two tiles in shared memory, in float32. It is done when the result is there."""

    def multiply(accumulator: Any) -> Any:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))  # pyright: ignore


def _ceil_div(a: Any, b: int) -> Any:
    return jax.lax.div(a + jnp.int32(b - 1), jnp.int32(b))
