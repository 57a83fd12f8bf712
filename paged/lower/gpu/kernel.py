"""The decode kernel for Hopper: online softmax over the visible pages of one sequence and one KV head.

A block of threads, one warpgroup, has one KV split of one sequence and one KV head. It works on its page blocks in
order. The tokens of a block are the long side of both products, since the matrix unit multiplies at least 64 rows and
a group of query heads is far shorter:

    scores [keys, rows] = keys [keys, dim] @ queries.T [dim, rows]
    values [dim, rows] += values.T [dim, keys] @ weights [keys, rows]

Where pages have 8 bits, threads convert tiles before they are multiplied, as `narrow` says.

A ring of tiles in shared memory feeds it. Tile ``2i`` is the keys of block ``i``, tile ``2i + 1`` its values. A tile is
on its way from the moment that the tile in its place before it was used. Each of the four warps starts a fourth of a
tile's copies.
"""

import dataclasses
import math
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from paged.spec import Given, PageLayout

from ..jax_version import plgpu
from ..program import Program, Terms, by_name, dtypes_of, update_maximum
from .narrow import is_multiplied_as_it_lies, joined, silence, widen
from .refs import PAGES_PER_WORD, WARPS, Ref, Refs
from .terms import spread

KEYS, VALUES = 0, 1
# Columns of values that are selected at once: registers do not hold a tile of 256.
_COLUMNS = 64


class Item(NamedTuple):
    """What one block of threads works on: ``blocks`` page blocks from entry ``first`` on, before entry ``end``.

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
        arrays = tuple(self._row_array(ref.at[head]) for ref in refs.inputs.arrays)
        factor = self.terms.factor
        if refs.inputs.factors is not None:
            factor = self._row_array(refs.inputs.factors.at[seq, head])
        row = plgpu.layout_cast(jnp.full((self.rows,), -jnp.inf, jnp.float32), plgpu.Layout.WGMMA.reduce(0))
        start = Sums(row, self._zeros(self.keys), self._zeros(self.layout.head_dim))
        sums = jax.lax.fori_loop(
            jnp.int32(0), item.blocks, lambda i, sums: self.step(refs, item, factor, arrays, i, sums), start
        )
        self.store(refs, item, sums)

    def item(self, refs: Refs, seq: Any, head: Any, split: Any) -> Item:
        """The item of a block of threads."""
        facts, values = refs.inputs.facts, self.program.values
        first, end, position, length = (facts[seq, i] for i in range(4))
        ints, floats = iter(range(4, facts.shape[1])), iter(range(len(values)))
        numbers = [
            facts[seq, next(ints)] if dtype == jnp.int32 else refs.inputs.floats[seq, next(floats)]  # pyright: ignore
            for dtype in dtypes_of(values)
        ]
        first, blocks = split_of(first, end, split, self.splits, self.pages_per_block)
        return Item(seq, head, split, first, end, blocks, position, length, Given(by_name(values, numbers)))

    def fetch(self, refs: Refs, item: Item, block: Any, kind: int, stage: Any) -> None:
        """Start the copies of a page block's keys or values into a stage of the ring, if the item has that block.

        Every warp starts as many copies. What one warp issues, the scheduler of another one does not wait for.
        """
        per_warp = -(-self.pages_per_block // WARPS)

        @pl.when(block < item.blocks)
        def _():
            @plgpu.warp_map
            def _(warp: Any):
                for n in range(per_warp):
                    place = warp * per_warp + n

                    @pl.when(True if self.pages_per_block % WARPS == 0 else place < self.pages_per_block)
                    def _(place: Any = place):
                        self._copy(refs, item, block, kind, stage, place)

    def _copy(self, refs: Refs, item: Item, block: Any, kind: int, stage: Any, place: Any) -> None:
        """Start the copy of one page: number ``place`` of its block. Past the item's last page that page comes again:
        it is in the cache, and as many bytes must arrive for every block."""
        size, scratch = self.layout.page_size, refs.scratch
        page = refs.inputs.pages[item.seq, jnp.minimum(item.first + block * self.pages_per_block + place, item.end - 1)]
        if refs.inputs.presence is not None:
            # A hole has no page. Page 0 comes in its place, so that as many bytes arrive, and is not looked at.
            num_pages = refs.inputs.pools[0].shape[self.layout.page_axis]
            page = jnp.where((page >= 0) & (page < num_pages), page, 0)
        target = scratch.tiles.at[stage, pl.ds(place * size, size)]
        plgpu.copy_gmem_to_smem(self._in_pool(refs, page, item.head, kind), target, scratch.arrived.at[stage])

    def _in_pool(self, refs: Refs, page: Any, head: Any, kind: int) -> Ref:
        """The keys or the values of one head in a page, [page_size, dim]."""
        pools, dim = refs.inputs.pools, self.layout.head_dim
        match self.layout.order:
            case "packed":
                return pools[0].at[page, kind, head]
            case "joined":
                return pools[0].at[page, head, :, pl.ds(kind * self.layout.value_lane, dim)]
            case "interleaved":  # heads side by side in one row: see `DecodeLaunch`
                return pools[0].at[page, :, pl.ds((2 * head + kind) * dim, dim)]
            case "split":
                return pools[kind].at[head, page]
            case _:
                assert_never(self.layout.order)

    def step(self, refs: Refs, item: Item, factor: Any, arrays: tuple[Any, ...], i: Any, sums: Sums) -> Sums:
        """Take in page block ``i``: a step of the online softmax, as in `docs/semantics.md`, with data on its way.

        The products of queries and keys are multiplied by ``factor``, which is a number or a tile.
        """
        scratch, tile = refs.scratch, 2 * i
        # Early: what is read here comes while keys are awaited and multiplied.
        present, columns = self._present(refs, item, i), self._columns(refs, item, i)

        stage = self._await(refs, tile)
        keys = self._multiplied(refs, KEYS, stage)
        if keys is scratch.wide:
            plgpu.commit_smem()  # stored by threads: see below
        s = joined(_product(keys, scratch.q.T), self.rows) * factor
        self._refill(refs, item, i, KEYS, stage)

        p, j = self._positions(item, i, columns)
        s = self.terms.scores(arrays, item.given, s, p, j)
        visible = self.terms.visible(arrays, item.given, p, j, item.length) & present.of_tile((self.keys, self.rows))
        s = jnp.where(visible, s, -jnp.inf)

        top, origin, decay = update_maximum(sums.top, jnp.max(s, axis=0), jnp.exp2)
        weights = jnp.exp2(s - self._of_rows(origin, self.keys))
        total = sums.total * self._of_rows(decay, self.keys) + weights
        scratch.weights.T[...] = plgpu.layout_cast(weights.astype(scratch.weights.dtype), plgpu.Layout.WGMMA)

        stage = self._await(refs, tile + 1)
        self._select_values(refs, stage, present, visible)
        values = self._multiplied(refs, VALUES, stage)
        # Weights and selected or converted values were stored by threads, and the matrix unit reads them past the
        # threads' caches: without the fence it may read what was there before.
        plgpu.commit_smem()
        product = _product(values.T, scratch.weights.T)
        values = sums.values * self._of_rows(decay, self.layout.head_dim) + product
        self._refill(refs, item, i, VALUES, stage)
        return Sums(top, total, values)

    def _multiplied(self, refs: Refs, kind: int, stage: Any) -> Ref:
        """A tile as the matrix unit reads it: from the ring, or converted. The latter needs a fence."""
        scratch = refs.scratch
        if is_multiplied_as_it_lies(self.layout, is_key=kind == KEYS):
            return scratch.tiles.at[stage]
        widen(scratch.tiles.at[stage], scratch.wide)
        return scratch.wide

    def _await(self, refs: Refs, tile: Any) -> Any:
        """Wait for a tile. Returns its stage of the ring."""
        stage = jax.lax.rem(tile, jnp.int32(self.stages))
        plgpu.barrier_wait(refs.scratch.arrived.at[stage])
        return stage

    def _refill(self, refs: Refs, item: Item, i: Any, kind: int, stage: Any) -> None:
        """Fetch the tile that comes next into a stage whose tile was used. Not earlier: the product must be done."""
        self.fetch(refs, item, i + (kind + self.stages) // 2, (kind + self.stages) % 2, stage)

    def _columns(self, refs: Refs, item: Item, i: Any) -> list[Any] | None:
        """The places of a block's pages in their sequence, for lists. None for tables, where pages are in order."""
        if refs.inputs.columns is None:
            return None
        first = item.first + i * self.pages_per_block
        return [
            refs.inputs.columns[item.seq, jnp.minimum(first + n, item.end - 1)] for n in range(self.pages_per_block)
        ]

    def _positions(self, item: Item, i: Any, columns: list[Any] | None) -> tuple[Any, Any]:
        """The positions of each row's query and of each key, as tiles."""
        shape, group, size = (self.keys, self.rows), self.program.group, self.layout.page_size
        row = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        if columns is None:
            j = (item.first + i * self.pages_per_block) * size + key
        else:
            page, first = _page_of(key, size), spread(columns[0], shape, jnp.int32)
            for n, column in enumerate(columns[1:], 1):
                first = jnp.where(page == n, spread(column, shape, jnp.int32), first)
            j = first * size + jnp.bitwise_and(key, size - 1)
        return item.position + (row if group == 1 else jax.lax.div(row, jnp.full(shape, group, jnp.int32))), j

    def _present(self, refs: Refs, item: Item, i: Any) -> "Present":
        """Which pages of a block are there: within the item, and no holes."""
        first = item.first + i * self.pages_per_block
        within = jnp.clip(item.end - first, 0, self.pages_per_block)
        bits = jax.lax.shift_left(jnp.int32(1), within) - 1
        if refs.inputs.presence is not None:
            word = refs.inputs.presence[item.seq, jax.lax.div(first, jnp.int32(PAGES_PER_WORD))]
            bits = bits & jax.lax.shift_right_logical(word, jax.lax.rem(first, jnp.int32(PAGES_PER_WORD)))
        end = (first + self.pages_per_block) * self.layout.page_size
        is_whole = (bits == (1 << self.pages_per_block) - 1) & (end <= item.length)
        return Present(bits, is_whole, self.layout.page_size)

    def _select_values(self, refs: Refs, stage: Any, present: "Present", visible: Any) -> None:
        """Put 0 in the place of values that no row sees, where a block may have some that belong to nobody.

        They may be NaN, and a weight of 0 times NaN is NaN.
        """
        if self.layout.dtype == jnp.int8:
            return  # no int8 is NaN
        may_visit_unseen = self.program.may_visit_unseen(self.layout.page_size)

        @pl.when(True if may_visit_unseen else jnp.logical_not(present.is_whole))
        def _():
            seen = jnp.max(jnp.where(visible, 1.0, 0.0).astype(jnp.float32), axis=1)
            # All bits of a value that is seen, and none of another: two values are masked by one instruction.
            seen = jnp.where(seen > 0, -1, 0)
            if refs.scratch.seen is not None:
                refs.scratch.seen[...] = seen.astype(jnp.int8)
                plgpu.commit_smem()  # Other warps read it. The fence waits for all of them.
                return silence(refs.scratch.tiles.at[stage], refs.scratch.seen)
            seen = seen.astype(jnp.int16)
            for column in range(0, self.layout.head_dim, _COLUMNS):
                part = refs.scratch.tiles.at[stage, :, pl.ds(column, _COLUMNS)]
                v = plgpu.load(part, layout=plgpu.Layout.WGMMA)  # pyright: ignore
                bits = jax.lax.bitcast_convert_type(v, jnp.int16) & jax.lax.broadcast_in_dim(seen, v.shape, [0])
                part[...] = jax.lax.bitcast_convert_type(bits, v.dtype)

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

    def _row_array(self, ref: Ref) -> Any:
        # Rows are few, so that the load is no whole line of the cache. It comes once.
        layout: Any = plgpu.Layout.WGMMA.reduce(0)
        return self._of_rows(plgpu.load(ref, layout=layout, optimized=False), self.keys)  # pyright: ignore


class Present(NamedTuple):
    """Which pages of a block are there: a bit for each. ``is_whole``: all are, and no key is past the length."""

    bits: Any
    is_whole: Any
    page_size: int

    def of_tile(self, shape: tuple[int, int]) -> Any:
        """Which keys of a tile are in a page that is there."""
        page = _page_of(plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA), self.page_size)
        return jnp.bitwise_and(jax.lax.shift_right_logical(jnp.full(shape, self.bits, jnp.int32), page), 1) == 1


def split_of(first: Any, end: Any, split: Any, splits: int, pages_per_block: int) -> tuple[Any, Any]:
    """The first entry of a KV split of ``[first, end)``, and its page blocks: every split has as many, the last ones
    perhaps fewer."""
    blocks = _ceil_div(end - first, pages_per_block)
    of_split = _ceil_div(blocks, splits)
    begin = jnp.minimum(split * of_split, blocks)
    return first + begin * pages_per_block, jnp.minimum(of_split, blocks - begin)


def _page_of(key: Any, page_size: int) -> Any:
    """Which page of its block each key of a tile is in."""
    return jax.lax.shift_right_logical(key, jnp.full(key.shape, page_size.bit_length() - 1, jnp.int32))


def _product(a: Ref, b: Ref) -> Any:
    """The product of two tiles in shared memory. It is done when the result is there: in float32; of int8, in int32."""
    dtype = jnp.int32 if a.dtype == jnp.int8 else jnp.float32

    def multiply(accumulator: Any) -> Any:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), dtype))  # pyright: ignore


def _ceil_div(a: Any, b: int) -> Any:
    return jax.lax.div(a + jnp.int32(b - 1), jnp.int32(b))
