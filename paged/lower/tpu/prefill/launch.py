"""From arrays to the prefill kernel and back: operands, scratch memory, and the state that comes out."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from paged.spec import AttentionState, PageLayout, Pages

from ...program import Program, Running, kernel_terms
from ..chips import Chip, padded_bytes
from ..pages import Stream, Transfers, Views, Work, pools_of
from .kernel import Prefill
from .refs import LANES, SUBLANES, Body, Refs, Strides
from .shape import TileShape
from .tile import MOST_UNROLLED, Tile

# Scores are in units of log 2, so that weights are powers of two.
_LOG2E = math.log2(math.e)
# Positions whose mask is computed at once.
_MASK_ROWS = 32
# Tiles of few rows have kernels of their own, each for a quarter of the rows of the next.
_FEWEST_POSITIONS, _SHRINK = 16, 4


@dataclasses.dataclass(frozen=True)
class PrefillLaunch:
    """One prefill kernel: its views, the most positions of a tile, and how its tiles are laid over cores."""

    program: Program
    layout: PageLayout
    compute_dtype: Any
    pages_per_block: int
    positions: int
    buffers: int
    cores: int
    chip: Chip
    interpret: Any

    @property
    def views(self) -> Views:
        """The views of a whole block."""
        return Views(self.layout, self.pages_per_block, 8, 1, self.compute_dtype, is_apart=self._is_apart)

    @property
    def strides(self) -> Strides:
        """How queries and results of one position lie next to each other."""
        return Strides(self.program.num_q_heads, self.views.key_lanes, self.views.result_lanes)

    def shapes(self) -> tuple[TileShape, ...]:
        """Tiles, those of fewest positions first."""
        positions = [self.positions]
        while positions[0] // _SHRINK >= _FEWEST_POSITIONS:
            positions.insert(0, positions[0] // _SHRINK)
        return tuple(TileShape(n, self.program.num_q_heads, self.program.group) for n in positions)

    def rows_of(self, q: Float[Array, "tokens q_heads dim"]) -> Float[Array, "rows lanes"]:
        """Queries as the kernel reads them."""
        tokens, heads, dim = q.shape
        columns, stride = self.strides.q_columns, self.strides.q
        x = jnp.pad(q.astype(jnp.float32), ((0, 0), (0, 0), (0, columns * LANES - dim))).reshape(tokens, -1, LANES)
        return jnp.pad(x, ((0, 0), (0, stride - heads * columns), (0, 0))).reshape(tokens * stride, LANES)

    def __call__(self, work: Work, rows: Array, pages: Pages, results: Array | None = None) -> Array:
        """Results of the work's rows as the kernel writes them, f32[tokens * out_stride, lanes]; in other rows those of
        ``results``, if given, which are overwritten in place, or anything."""
        kernel = Prefill(tuple(self._tile(shape) for shape in self.shapes()))
        arrays, scales = self._arrays(kernel.tiles[-1].bodies[-1]), self._head_scales(pages)[:1]
        pools: Any = (*pages.arrays, *(() if pages.layout.scales != "token" else (pages.k_scale, pages.v_scale)))
        scalars, operands = tuple(work), (*scales, *arrays, rows, *pools)
        in_memory = [pltpu.SMEM] * (len(scales) + len(arrays)) + [pltpu.HBM] * (1 + len(pools))
        aliases = {}
        if results is not None:
            aliases = {len(scalars) + len(operands): 0}
            operands, in_memory = (*operands, results), [*in_memory, pltpu.HBM]
        (out,) = pl.pallas_call(
            self._kernel(kernel, len(scales), len(arrays), len(pools), results is not None),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(self.cores,),
                in_specs=[pl.BlockSpec(memory_space=memory) for memory in in_memory],
                out_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
                scratch_shapes=self._scratch(),
            ),
            out_shape=[jax.eval_shape(self.empty, rows)],
            input_output_aliases=aliases,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",),
                disable_bounds_checks=True,
                vmem_limit_bytes=self.chip.vmem_bytes,
            ),
            interpret=self.interpret,
            name="paged_prefill",
        )(*scalars, *operands)
        return out

    def empty(self, rows: Array) -> Float[Array, "rows lanes"]:
        """Results that nothing was written to."""
        return jnp.zeros((rows.shape[0] // self.strides.q * self.strides.out, LANES), jnp.float32)

    def state_of(self, results: Float[Array, "rows lanes"], pages: Pages) -> AttentionState:
        """The state in results as the kernel writes them."""
        strides, views, heads = self.strides, self.views, self.program.num_q_heads
        x = results.reshape(-1, strides.out, LANES)
        values = x[:, : strides.first_sum].reshape(-1, heads, strides.out_columns * LANES)[..., views.value_lanes]
        sums = x[:, strides.first_sum : strides.first_sum + strides.sums].reshape(x.shape[0], -1, 1)
        total, top = sums[:, :heads], sums[:, heads : 2 * heads]
        out, lse = Running(top / _LOG2E, total, values).finish()
        for v_scale in self._head_scales(pages)[1:]:
            out = out * jnp.repeat(v_scale, self.program.group)[:, None]
        return AttentionState(out, lse[..., 0])

    def _kernel(self, prefill: Prefill, num_scales: int, num_arrays: int, num_pools: int, has_results: bool) -> Any:
        def kernel(*refs: Any) -> None:
            refs_left = list(refs)

            def take(count: int) -> tuple[Any, ...]:
                taken, refs_left[:] = refs_left[:count], refs_left[count:]
                return tuple(taken)

            work = Work(*take(len(Work._fields)))
            scales, arrays, (q,), pools = (take(n) for n in (num_scales, num_arrays, 1, num_pools))
            take(has_results)
            (out,), buffers, (arrived, cursor, is_clean) = take(1), take(num_pools), take(3)
            own = take(13)
            token_scales, apart = (take(flag)[0] if flag else None for flag in (self._scales_tokens, self._is_apart))
            (k_scale,) = scales or (None,)
            stream = Stream(work, Transfers(self.layout, pools, buffers, arrived), cursor, is_clean)
            bound = Refs(stream, k_scale, arrays, q, out, *own, token_scales, apart)  # pyright: ignore
            core = pl.program_id(0)
            prefill.run_items(bound, work.bounds[core], work.bounds[core + 1])

        return kernel

    def _tile(self, shape: TileShape) -> Tile:
        mask_rows = min(_MASK_ROWS, shape.positions)
        bodies = []
        for views in self._bodies():
            scores = kernel_terms(self.program, shape.rows, views.columns, unit=_LOG2E)
            mask = kernel_terms(self.program, mask_rows, views.columns)
            bodies.append(Body(views, scores, mask, mask_rows, bool(self.program.score_ops)))
        unrolled = MOST_UNROLLED if shape.positions == self.positions else MOST_UNROLLED // 4
        return Tile(shape, self.strides, tuple(bodies), unrolled, fetches_beside=not self._copies_by_strides)

    def _bodies(self) -> list[Views]:
        """Views of a block's first pages, quarter by quarter where these are whole lanes."""
        sizes = {self.pages_per_block * quarters // 4 for quarters in (1, 2, 3, 4)}
        parts = [dataclasses.replace(self.views, pages_per_block=pages) for pages in sorted(sizes - {0})]
        return [part for part in parts if part.columns % LANES == 0]

    def _arrays(self, body: Body) -> tuple[Array, ...]:
        """What the terms need, for every query head."""
        heads = jnp.arange(self.program.num_q_heads, dtype=jnp.int32)
        rows = self.shapes()[-1].rows
        found = jax.vmap(lambda head: body.scores.early(jnp.full((rows, 1), head, jnp.int32)))(heads)
        found = tuple(x.reshape(heads.shape[0], -1)[:, 0] for x in found)
        return tuple(x.astype(jnp.int32) if x.dtype == bool else x for x in found)

    def _head_scales(self, pages: Pages) -> tuple[Array, ...]:
        """Scales a tensor or head, as one factor for every KV head."""
        if self.layout.scales not in ("tensor", "head"):
            return ()
        shape = (self.layout.num_kv_heads,)
        return tuple(jnp.broadcast_to(jnp.asarray(scale), shape) for scale in (pages.k_scale, pages.v_scale))

    def _scratch(self) -> list[Any]:
        dma = pltpu.SemaphoreType.DMA
        pages, (q, out, *rest) = self._vmem()
        stream = [dma((self.buffers,)), pltpu.SMEM((2,), jnp.int32), pltpu.SMEM((self.buffers,), jnp.int32)]
        return [*pages, *stream, q, dma((2,)), out, dma, *rest]

    def _vmem(self) -> tuple[list[Any], list[Any]]:
        """Buffers of pages; and all others, in the order of `Refs`."""
        views, layout, strides, shapes, f32 = self.views, self.layout, self.strides, self.shapes(), jnp.float32
        keys, all_rows = views.columns, self.positions * self.program.num_q_heads
        rows = max(shape.rows for shape in shapes)
        block = (self.buffers, self.pages_per_block)
        pages = [pltpu.VMEM((*block, *pool.page_shape), pool.dtype) for pool in pools_of(layout)]
        others = [
            pltpu.VMEM((2, self.positions * strides.q, LANES), f32),
            pltpu.VMEM((self.positions * strides.out, LANES), f32),
            pltpu.VMEM((all_rows, views.key_lanes), self.compute_dtype),
            pltpu.VMEM((all_rows, LANES), f32),
            pltpu.VMEM((all_rows, LANES), f32),
            pltpu.VMEM((all_rows, strides.out_columns * LANES), f32),
            pltpu.VMEM((2, rows, keys), f32),
            pltpu.VMEM((2, rows, LANES), f32),
            pltpu.VMEM((self.positions, keys), jnp.int32),
            pltpu.VMEM((strides.sums, self.positions, LANES), f32),
            pltpu.VMEM((2, 8, keys), jnp.int32),
        ]
        if self._scales_tokens:
            others.append(pltpu.VMEM((2, 2 * layout.num_kv_heads * SUBLANES, keys), f32))
        if self._is_apart:
            others.append(pltpu.VMEM((2, *views.apart_shape()), f32))
        return pages, others

    @property
    def vmem_bytes(self) -> int:
        """Vector memory that the kernel's buffers take, with every tile padded as the chips lay it out."""
        pages, others = self._vmem()
        return sum(padded_bytes(x.shape, x.dtype) for x in (*pages, *others))

    @property
    def _copies_by_strides(self) -> bool:
        """Whether a page's copy has a descriptor of strides: products are not moved past the scalar stores that make it
        (compiled: at heads of 256 blocks took half as long again)."""
        return self.chip.has_tall_tiles and any(pool.page_shape[-1] > LANES for pool in pools_of(self.layout))

    @property
    def _is_apart(self) -> bool:
        return self.layout.order == "interleaved"

    @property
    def _scales_tokens(self) -> bool:
        return self.layout.scales == "token"
