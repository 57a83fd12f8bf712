"""From arrays to the decode kernel and back: its operands, its shared memory, and its results as a state."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paged.spec import AttentionState, Pages

from ..jax_version import plgpu, result_like, vary_alike
from ..program import PageIntervals, Program, Sequences, dtypes_of, in_order, kernel_terms, visits_by_scatter
from .kernel import Decode
from .narrow import is_multiplied_as_it_lies, queries_dtype, queries_of, query_tile, swizzled, weights_dtype
from .refs import PAGES_PER_WORD, Inputs, Outputs, Refs, Scratch
from .schedule import GpuDecodeSchedule
from .terms import compute, has_own_powers

# The position of the first row of a slot without rows. Nothing is visible from there.
_NO_ROWS = -(2**20)
_LOG2_E = math.log2(math.e)


class Visited(NamedTuple):
    """The pages that sequences visit: `Inputs` says what the first three are. An item's entries are those from
    ``first`` on, before ``end``."""

    pages: Int[Array, "seqs entries"]
    presence: Int[Array, "seqs words"] | None
    columns: Int[Array, "seqs entries"] | None
    first: Int[Array, " seqs"]
    end: Int[Array, " seqs"]

    def moved(self, first_page: Any) -> Self:
        """The same for pages that lie ``first_page`` pages further on in the pool."""
        return self._replace(pages=self.pages + first_page)


@dataclasses.dataclass(frozen=True)
class DecodeLaunch:
    """One decode kernel, ready to be called.

    * ``intervals``: the pages that a sequence's rows see, where they are one run; else None, and they are listed.
    * ``query_rows``: rows of each sequence.
    * ``interpret``: passed to Pallas.
    """

    program: Program
    intervals: PageIntervals | None
    query_rows: int
    schedule: GpuDecodeSchedule
    interpret: Any

    @property
    def used_rows(self) -> int:
        """Query rows of a KV head."""
        return self.query_rows * self.program.group

    @property
    def rows(self) -> int:
        """These rows, padded: the matrix unit multiplies multiples of 8."""
        return -(-self.used_rows // 8) * 8

    def __call__(self, q: Float[Array, "tokens q_heads dim"], pages: Pages, seqs: Sequences) -> AttentionState:
        """Run the kernel, and return the state of all rows in float32."""
        layout, schedule = pages.layout, self.schedule
        block = schedule.pages_per_block * layout.page_size
        terms = kernel_terms(self.program, self.rows, block, _LOG2_E, compute)
        decode = Decode(
            self.program, layout, terms, self.rows, schedule.pages_per_block, schedule.stages, schedule.kv_splits
        )
        visited = self.visited(seqs, layout.page_size, pages.num_pages)
        facts, floats = self._facts(seqs, visited)
        arrays = self._arrays(terms)
        queries, factors = queries_of(self._queries(q), layout)
        if factors is not None:
            factors = factors * terms.factor * _of_heads(pages.k_scale)
        operands = Inputs(queries, _pools(pages), *visited[:3], facts, floats, arrays, factors)
        # In a caller's `jax.shard_map`, a kernel's operands and results vary over the same mesh axes.
        inputs = vary_alike(operands)
        leaves, tree = jax.tree.flatten(inputs)
        slots, heads = seqs.starts.shape[0], layout.num_kv_heads
        shape = (slots, heads, schedule.kv_splits)
        results = (
            jax.ShapeDtypeStruct((*shape, layout.head_dim, self.rows), jnp.float32),
            jax.ShapeDtypeStruct((*shape, self.rows), jnp.float32),
        )

        memory = _in_turn(scratch_of(layout, self.rows, schedule))
        shared, shared_tree = jax.tree.flatten(memory, is_leaf=lambda x: x is memory.tiles)

        def paged_decode(*refs: Any) -> None:
            count = len(leaves)
            scratch = shared_tree.unflatten(refs[count + 2 :])
            tiles, out = scratch.tiles
            outputs = Outputs(*refs[count : count + 2])
            decode.run(Refs(tree.unflatten(refs[:count]), outputs, scratch._replace(tiles=tiles, out=out)))

        kernel = plgpu.kernel(
            paged_decode,
            out_type=[result_like(leaves[0], result) for result in results],
            grid=shape,
            grid_names=("seq", "head", "split"),
            scratch_types=shared,
            compiler_params=plgpu.CompilerParams(approx_math=has_own_powers(self.program)),
            interpret=self.interpret,
        )
        out, lse = kernel(*leaves)
        if layout.is_quantised:
            out = out * _of_heads(pages.v_scale)[..., None, None]
        return self._state(out, lse)

    def _queries(self, q: Array) -> Float[Array, "seqs kv_heads rows dim"]:
        """The query rows of each sequence and KV head, padded."""
        heads, group = self.program.num_kv_heads, self.program.group
        grouped = q.reshape(-1, self.query_rows, heads, group, q.shape[-1])
        rows = jnp.moveaxis(grouped, 2, 1).reshape(-1, heads, self.used_rows, q.shape[-1])
        return jnp.pad(rows, ((0, 0), (0, 0), (0, self.rows - self.used_rows), (0, 0)))

    def visited(self, seqs: Sequences, page_size: int, num_pages: int) -> Visited:
        """The pages that each sequence's rows visit: as they were listed for the step, or else found here."""
        if isinstance(seqs.planned, Visited):
            return seqs.planned
        if self.intervals is None:
            list_pages = functools.partial(visits_by_scatter, self.program, page_size=page_size, num_pages=num_pages)
            visits = jax.vmap(list_pages)(seqs.query_rows(), seqs.tables)
            return Visited(visits.page, None, visits.index, jnp.zeros_like(visits.count), visits.count)
        return Visited(seqs.tables, _presence(seqs.tables, num_pages), None, *self._runs(seqs, self.intervals))

    def _runs(self, seqs: Sequences, intervals: PageIntervals) -> tuple[Array, Array]:
        """For each sequence the first visible page, and the page after the last one."""
        numbers = [jnp.asarray(x) for x in in_order(self.program.values, seqs.numbers)]

        def seen(position: Array, length: Array, *numbers: Array) -> tuple[Any, Any]:
            width = seqs.tables.shape[1]
            first, end = intervals.visible(position, position + self.query_rows, length, width, numbers)
            return jnp.asarray(first, jnp.int32), jnp.asarray(end, jnp.int32)

        return jax.vmap(seen)(_positions(seqs), seqs.lengths, *numbers)

    def _facts(self, seqs: Sequences, visited: Visited) -> tuple[Array, Array | None]:
        """`Inputs.facts` and `Inputs.floats`."""
        numbers = [jnp.asarray(x) for x in in_order(self.program.values, seqs.numbers)]
        of_dtype = {
            dtype: [x for x, its in zip(numbers, dtypes_of(self.program.values), strict=True) if its == dtype]
            for dtype in (jnp.dtype("int32"), jnp.dtype("float32"))
        }
        floats = of_dtype[jnp.dtype("float32")]
        columns = visited.first, visited.end, _positions(seqs), seqs.lengths, *of_dtype[jnp.dtype("int32")]
        return jnp.stack(columns, axis=1), jnp.stack(floats, axis=1) if floats else None

    def _arrays(self, terms: Any) -> tuple[Array, ...]:
        """What the scores and the mask need of each query row of a KV head, such as the slopes of ALiBi."""
        heads, group = self.program.num_kv_heads, self.program.group
        h = jnp.arange(heads, dtype=jnp.int32)[:, None] * group + jnp.arange(self.rows, dtype=jnp.int32)[None] % group
        arrays = jax.vmap(terms.early)(h[..., None])
        whole = (jnp.broadcast_to(x.reshape(heads, -1), h.shape) for x in arrays)
        return tuple(x.astype(jnp.int32) if x.dtype == bool else x for x in whole)

    def _state(self, out: Array, lse: Array) -> AttentionState:
        """The kernel's results: KV splits merged, padding dropped, heads in the order of the queries."""
        slots, heads, splits, dim, _ = out.shape
        shape = (slots, heads, splits, self.query_rows, self.program.group)
        order = (2, 0, 3, 1, 4)
        out = jnp.moveaxis(out[..., : self.used_rows], 3, 4).reshape(*shape, dim)
        out = out.transpose(*order, 5).reshape(splits, -1, self.program.num_q_heads, dim)
        lse = lse[..., : self.used_rows].reshape(shape).transpose(order).reshape(splits, -1, self.program.num_q_heads)
        return AttentionState(out[0], lse[0]) if splits == 1 else _merged(out, lse)


def _positions(seqs: Sequences) -> Array:
    return jnp.where(seqs.counts > 0, seqs.positions, _NO_ROWS)


def _presence(tables: Int[Array, "seqs pages_per_seq"], num_pages: int) -> Int[Array, "seqs words"]:
    """`Inputs.presence`: a bit for each page, in words that overlap by half. One operation on a GPU."""
    width, bit = tables.shape[1], jnp.arange(2 * PAGES_PER_WORD, dtype=jnp.int32)[None]
    word = jnp.arange(-(-width // PAGES_PER_WORD), dtype=jnp.int32)[:, None]
    entry = word * PAGES_PER_WORD + bit
    page = tables[:, jnp.minimum(entry, width - 1)]
    is_page = (page >= 0) & (page < num_pages) & (entry < width)[None]
    bits = jnp.where(is_page, jnp.left_shift(jnp.int32(1), bit)[None], 0)
    return jnp.sum(bits, axis=-1, dtype=jnp.int32)


def _pools(pages: Pages) -> tuple[Array, ...]:
    """The arrays of pages. Interleaved heads become parts of one long row, since a copy has five axes at most."""
    if pages.layout.order != "interleaved":
        return pages.arrays
    return tuple(pool.reshape(*pool.shape[:2], -1) for pool in pages.arrays)


def _merged(out: Float[Array, "splits tokens heads dim"], lse: Float[Array, "splits tokens heads"]) -> AttentionState:
    """The states of disjoint splits as one, like `paged.merge`; of all splits at once, in few passes."""
    top = jnp.max(lse, axis=0)
    # Where every split is empty its maximum is -inf, and -inf minus -inf would be NaN.
    origin = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp(lse - origin[None])
    total = jnp.sum(weights, axis=0)
    values = jnp.sum(weights[..., None] * out, axis=0)
    return AttentionState(values / jnp.where(total == 0, 1.0, total)[..., None], jnp.log(total) + origin)


def _of_heads(scale: Array) -> Array:
    """Per-tensor or per-head scales as a factor of arrays [seqs, kv_heads, _]."""
    return scale.reshape(1, -1, 1)


def scratch_of(layout: Any, rows: int, schedule: GpuDecodeSchedule) -> Scratch:
    """The shared memory and the barriers of a kernel."""
    dim, block = layout.head_dim, schedule.pages_per_block * layout.page_size
    of_queries, of_weights = queries_dtype(layout), weights_dtype(layout)
    is_widened = not is_multiplied_as_it_lies(layout, is_key=False)

    def tile(dtype: Any, *shape: int) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype, shape[-1]))

    return Scratch(
        q=tile(of_queries, *query_tile(layout, rows)),
        tiles=tile(layout.dtype, schedule.stages, block, dim),
        out=plgpu.SMEM((dim, rows), jnp.float32),
        weights=tile(of_weights, rows, block),
        lse=plgpu.SMEM((rows,), jnp.float32),
        wide=tile(of_weights, block, dim) if is_widened else None,
        seen=plgpu.SMEM((block,), jnp.int8) if is_widened and layout.dtype != jnp.int8 else None,
        q_arrived=plgpu.Barrier(),
        arrived=plgpu.Barrier(num_arrivals=schedule.pages_per_block, num_barriers=schedule.stages),
    )


def shared_bytes(layout: Any, rows: int, schedule: GpuDecodeSchedule) -> int:
    """Shared memory of a kernel, without what the compiler adds for barriers and exchanges between warps."""
    memory = scratch_of(layout, rows, schedule)._replace(q_arrived=None, arrived=None)._asdict()
    sizes = {name: math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for name, x in memory.items() if x is not None}
    if "seen" in sizes:
        sizes["seen"] = 2**10  # memory is given by the KiB
    return sum(sizes.values()) - min(sizes["tiles"], sizes["out"])


def _in_turn(scratch: Scratch) -> Scratch:
    """The same memory for the ring, and for the results when the last tile was used."""
    return scratch._replace(tiles=plgpu.RefUnion(scratch.tiles, scratch.out), out=None)
