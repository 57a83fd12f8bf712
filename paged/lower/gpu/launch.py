"""From arrays to the decode kernel and back: its operands, its shared memory, and its results as a state."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged.spec import AttentionState, Pages

from ..jax_version import plgpu, result_like, vary_alike
from ..program import PageIntervals, Program, Sequences, dtypes_of, in_order, kernel_terms
from .kernel import Decode, Inputs, Outputs, Refs, Scratch
from .schedule import GpuDecodeSchedule
from .terms import compute

# The position of the first row of a slot without rows. Nothing is visible from there.
_NO_ROWS = -(2**20)
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class DecodeLaunch:
    """One decode kernel, ready to be called.

    * ``intervals``: the pages that a sequence's rows see.
    * ``query_rows``: rows of each sequence.
    * ``interpret``: passed to Pallas.
    """

    program: Program
    intervals: PageIntervals
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
        facts, floats = self._facts(seqs, layout.page_size)
        # In a caller's `jax.shard_map`, a kernel's operands and results vary over the same mesh axes.
        inputs = vary_alike(Inputs(self._queries(q), pages.arrays, seqs.tables, facts, floats, self._arrays(terms)))
        leaves, tree = jax.tree.flatten(inputs)
        slots, heads = seqs.starts.shape[0], layout.num_kv_heads
        shape = (slots, heads, schedule.kv_splits)
        results = (
            jax.ShapeDtypeStruct((*shape, layout.head_dim, self.rows), jnp.float32),
            jax.ShapeDtypeStruct((*shape, self.rows), jnp.float32),
        )

        def paged_decode(*refs: Any) -> None:
            count = len(leaves)
            q, (tiles, out), *others = refs[count + 2 :]
            scratch = Scratch(q, tiles, out, *others)
            decode.run(Refs(tree.unflatten(refs[:count]), Outputs(*refs[count : count + 2]), scratch))

        kernel = plgpu.kernel(
            paged_decode,
            out_type=[result_like(leaves[0], result) for result in results],
            grid=shape,
            grid_names=("seq", "head", "split"),
            scratch_types=_in_turn(scratch_of(layout, self.rows, schedule)),
            interpret=self.interpret,
        )
        return self._state(*kernel(*leaves))

    def _queries(self, q: Array) -> Float[Array, "seqs kv_heads rows dim"]:
        """The query rows of each sequence and KV head, padded."""
        heads, group = self.program.num_kv_heads, self.program.group
        grouped = q.reshape(-1, self.query_rows, heads, group, q.shape[-1])
        rows = jnp.moveaxis(grouped, 2, 1).reshape(-1, heads, self.used_rows, q.shape[-1])
        return jnp.pad(rows, ((0, 0), (0, 0), (0, self.rows - self.used_rows), (0, 0)))

    def _facts(self, seqs: Sequences, page_size: int) -> tuple[Array, Array | None]:
        """`Inputs.facts` and `Inputs.floats`."""
        values, width = self.program.values, seqs.tables.shape[1]
        numbers = [jnp.asarray(x) for x in in_order(values, seqs.numbers)]
        position = jnp.where(seqs.counts > 0, seqs.positions, _NO_ROWS)

        def seen(position: Array, length: Array, *numbers: Array) -> tuple[Any, Any]:
            first, end = self.intervals.visible(position, position + self.query_rows, length, width, numbers)
            return jnp.asarray(first, jnp.int32), jnp.asarray(end, jnp.int32)

        first, end = jax.vmap(seen)(position, seqs.lengths, *numbers)
        of_dtype = {
            dtype: [x for x, its in zip(numbers, dtypes_of(values), strict=True) if its == dtype]
            for dtype in (jnp.dtype("int32"), jnp.dtype("float32"))
        }
        floats = of_dtype[jnp.dtype("float32")]
        facts = jnp.stack([first, end, position, seqs.lengths, *of_dtype[jnp.dtype("int32")]], axis=1)
        return facts, jnp.stack(floats, axis=1) if floats else None

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


def _merged(out: Float[Array, "splits tokens heads dim"], lse: Float[Array, "splits tokens heads"]) -> AttentionState:
    """The states of disjoint splits as one, like `paged.merge`; of all splits at once, in few passes."""
    top = jnp.max(lse, axis=0)
    # Where every split is empty its maximum is -inf, and -inf minus -inf would be NaN.
    origin = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp(lse - origin[None])
    total = jnp.sum(weights, axis=0)
    values = jnp.sum(weights[..., None] * out, axis=0)
    return AttentionState(values / jnp.where(total == 0, 1.0, total)[..., None], jnp.log(total) + origin)


def scratch_of(layout: Any, rows: int, schedule: GpuDecodeSchedule) -> Scratch:
    """The shared memory and the barriers of a kernel."""
    dim, block = layout.head_dim, schedule.pages_per_block * layout.page_size
    # The matrix unit reads tiles of 8 rows of 128 bytes, which are swizzled.
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return Scratch(
        q=plgpu.SMEM((rows, dim), layout.dtype, transforms=swizzled),
        tiles=plgpu.SMEM((schedule.stages, block, dim), layout.dtype, transforms=swizzled),
        out=plgpu.SMEM((dim, rows), jnp.float32),
        weights=plgpu.SMEM((rows, block), layout.dtype, transforms=swizzled),
        lse=plgpu.SMEM((rows,), jnp.float32),
        q_arrived=plgpu.Barrier(),
        arrived=plgpu.Barrier(num_arrivals=schedule.pages_per_block, num_barriers=schedule.stages),
    )


def shared_bytes(layout: Any, rows: int, schedule: GpuDecodeSchedule) -> int:
    """Shared memory of a kernel, without what the compiler adds for barriers and exchanges between warps."""
    memory = scratch_of(layout, rows, schedule)
    q, tiles, out, *others = (math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in memory[:5])
    return sum((q, max(tiles, out), *others))


def _in_turn(scratch: Scratch) -> list[Any]:
    """The same memory for the ring, and for the results when the last tile was used."""
    return [scratch.q, plgpu.RefUnion(scratch.tiles, scratch.out), *scratch[3:]]
