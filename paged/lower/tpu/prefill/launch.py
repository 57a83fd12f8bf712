"""From arrays to the prefill kernel and back: its code, operands and scratch memory, and its results as a state."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from paged.spec import AttentionState, PageLayout, Pages

from ...program import Program, Running, kernel_terms
from ..chips import LANES, SUBLANES, Chip, padded_bytes
from ..pages import Stream, Transfers, Views, WorkList, pools_of
from ..references import call_kernel
from .block import BlockKernel
from .kernel import PrefillKernel
from .refs import Inputs, Outputs, Refs, Scratch, Strides
from .schedule import RaggedSchedule
from .shape import TileShape
from .tile import MOST_UNROLLED, TileKernel

# Scores are in units of log 2: powers of two are what a TPU computes, and every other base costs a multiplication.
_LOG2E = math.log2(math.e)
# The mask is evaluated for this many positions at a time.
_MASK_ROWS = 32
# The last tile of a sequence may have few rows. There is code for tiles of a quarter of the positions, a quarter of
# these, and so on, down to 16 at least.
_FEWEST_POSITIONS, _SHRINK = 16, 4


@dataclasses.dataclass(frozen=True)
class PrefillLaunch:
    """One prefill kernel, ready to be called on a work list.

    * ``compute_dtype``: what the matrix unit multiplies.
    * ``schedule``: its ``pages_per_block`` fill a stage of the stream's ring, which has ``buffers`` stages.
    * ``interpret``: passed to Pallas.
    """

    program: Program
    layout: PageLayout
    compute_dtype: Any
    schedule: RaggedSchedule
    chip: Chip
    interpret: Any

    @property
    def views(self) -> Views:
        """How a whole block of pages is read."""
        # Positions of keys fill registers of 8 equal rows, so the views have 8 rows. Query rows are laid out by strips.
        return Views(
            self.layout,
            self.schedule.pages_per_block,
            query_rows=SUBLANES,
            group=1,
            compute_dtype=self.compute_dtype,
            is_deinterleaved=self._is_deinterleaved,
        )

    @property
    def strides(self) -> Strides:
        """How queries and results lie in HBM."""
        return Strides(self.program.num_q_heads, self.views.key_lanes, self.views.result_lanes)

    def shapes(self) -> tuple[TileShape, ...]:
        """The shapes of tiles that there is code for, fewest positions first."""
        positions = [self.schedule.rows_per_tile]
        while positions[0] // _SHRINK >= _FEWEST_POSITIONS:
            positions.insert(0, positions[0] // _SHRINK)
        return tuple(TileShape(n, self.program.num_q_heads, self.program.group) for n in positions)

    def lay_out(self, q: Float[Array, "tokens q_heads dim"]) -> Float[Array, "rows lanes"]:
        """Queries as the kernel reads them: see `Strides`."""
        tokens, heads, dim = q.shape
        columns, stride = self.strides.q_columns, self.strides.q
        x = jnp.pad(q.astype(jnp.float32), ((0, 0), (0, 0), (0, columns * LANES - dim))).reshape(tokens, -1, LANES)
        return jnp.pad(x, ((0, 0), (0, stride - heads * columns), (0, 0))).reshape(tokens * stride, LANES)

    def __call__(
        self, work: WorkList, q: Float[Array, "rows lanes"], pages: Pages, results: Array | None = None
    ) -> Float[Array, "rows_of_results lanes"]:
        """Run the kernel on a work list, and return results as the kernel writes them: see `Strides`.

        ``q`` are queries that `lay_out` made. Given ``results``, the kernel writes into that memory, and rows that the
        work list does not name keep their results. Without it these rows hold anything.
        """
        kernel = PrefillKernel(tuple(self._tile(shape) for shape in self.shapes()))
        arrays, (k_scale, _) = self._arrays(kernel.tiles[-1].blocks[-1]), self._head_scales(pages)
        pools: Any = (*pages.arrays, *((pages.k_scale, pages.v_scale) if self._has_token_scales else ()))

        def run(work: WorkList, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
            transfers = Transfers(self.layout, inputs.pools, scratch.page_buffers, scratch.pages_arrived)
            refs = Refs(Stream(work, transfers, scratch.cursor, scratch.filled), inputs, outputs, scratch)
            core = pl.program_id(0)
            kernel.run_items(refs, work.bounds[core], work.bounds[core + 1])

        return call_kernel(
            run,
            name="paged_prefill",
            chip=self.chip,
            interpret=self.interpret,
            grid=(self.schedule.cores,),
            scalars=work,
            inputs=Inputs(k_scale, arrays, q, pools, results),
            memory=Inputs(k_scale=pltpu.SMEM, arrays=pltpu.SMEM, q=pltpu.HBM, pools=pltpu.HBM, results=pltpu.HBM),
            outputs=Outputs(jax.eval_shape(self.empty_results, q)),
            scratch=self._scratch(),
            in_place=lambda tree: None if results is None else tree.results,
        ).results

    def empty_results(self, q: Float[Array, "rows lanes"]) -> Float[Array, "rows_of_results lanes"]:
        """Memory for the results of queries that `lay_out` made."""
        return jnp.zeros((q.shape[0] // self.strides.q * self.strides.out, LANES), jnp.float32)

    def state_of(self, results: Float[Array, "rows lanes"], pages: Pages) -> AttentionState:
        """The attention state of all rows, from results as the kernel writes them.

        The kernel stores unnormalised values, sums of weights, and maxima. Here values are normalised, and maxima are
        converted from units of log 2 to the natural logarithm. A row that saw no key gets the empty state.
        """
        strides, views, heads = self.strides, self.views, self.program.num_q_heads
        x = results.reshape(-1, strides.out, LANES)
        values = x[:, : strides.first_sum].reshape(-1, heads, strides.out_columns * LANES)[..., views.value_lanes]
        sums = x[:, strides.first_sum : strides.first_sum + strides.sums].reshape(x.shape[0], -1, 1)
        total, top = sums[:, :heads], sums[:, heads : 2 * heads]
        out, lse = Running(top / _LOG2E, total, values).finish()
        _, v_scale = self._head_scales(pages)
        if v_scale is not None:
            out = out * jnp.repeat(v_scale, self.program.group)[None, :, None]
        return AttentionState(out, lse[..., 0])

    def _tile(self, shape: TileShape) -> TileKernel:
        mask_rows = min(_MASK_ROWS, shape.positions)
        blocks = []
        for views in self._prefixes():
            scores = kernel_terms(self.program, shape.strip_group_rows, views.columns, unit=_LOG2E)
            mask = kernel_terms(self.program, mask_rows, views.columns)
            blocks.append(BlockKernel(shape, views, scores, mask, mask_rows, bool(self.program.score_ops)))
        # Smaller tiles are for the last rows of a sequence. They take little time, and long lines take long to compile.
        unrolled = MOST_UNROLLED if shape.positions == self.schedule.rows_per_tile else MOST_UNROLLED // 4
        return TileKernel(shape, self.strides, tuple(blocks), unrolled, fetches_beside=not self._copies_by_strides)

    def _prefixes(self) -> list[Views]:
        """Views of a block's first quarter, half, three quarters, and the whole block, where they fill whole registers.

        So a block that has few pages does not cost as much as a whole one.
        """
        sizes = {self.schedule.pages_per_block * quarters // 4 for quarters in (1, 2, 3, 4)}
        prefixes = [dataclasses.replace(self.views, pages_per_block=pages) for pages in sorted(sizes - {0})]
        return [prefix for prefix in prefixes if prefix.columns % LANES == 0]

    def _arrays(self, block: BlockKernel) -> tuple[Array, ...]:
        """What the scores and the mask need of each query head, ``[q_heads]`` each, such as the slopes of ALiBi."""
        heads = jnp.arange(self.program.num_q_heads, dtype=jnp.int32)
        rows = block.shape.strip_group_rows
        found = jax.vmap(lambda head: block.scores.early(jnp.full((rows, 1), head, jnp.int32)))(heads)
        # All rows are of one head, so one number stands for all of them.
        found = tuple(x.reshape(heads.shape[0], -1)[:, 0] for x in found)
        return tuple(x.astype(jnp.int32) if x.dtype == bool else x for x in found)

    def _head_scales(self, pages: Pages) -> tuple[Array, Array] | tuple[None, None]:
        """The scales of keys and of values, one for every KV head; None without per-tensor or per-head scales."""
        if self.layout.scales not in ("tensor", "head"):
            return None, None
        k_scale, v_scale = (
            jnp.broadcast_to(jnp.asarray(scale), (self.layout.num_kv_heads,))
            for scale in (pages.k_scale, pages.v_scale)
        )
        return k_scale, v_scale

    def _scratch(self) -> Scratch:
        """The shapes of the kernel's scratch memory."""
        views, layout, strides, shapes = self.views, self.layout, self.strides, self.shapes()
        keys, all_rows = views.columns, self.schedule.rows_per_tile * self.program.num_q_heads
        rows = max(shape.strip_group_rows for shape in shapes)
        dma, smem = pltpu.SemaphoreType.DMA, functools.partial(pltpu.SMEM, dtype=jnp.int32)

        def vmem(*shape: int, dtype: Any = jnp.float32) -> Any:
            return pltpu.VMEM(shape, dtype)

        return Scratch(
            page_buffers=tuple(
                vmem(self.schedule.buffers, self.schedule.pages_per_block, *pool.page_shape, dtype=pool.dtype)
                for pool in pools_of(layout)
            ),
            pages_arrived=dma((self.schedule.buffers,)),
            cursor=smem((2,)),
            filled=smem((self.schedule.buffers,)),
            q_buffer=vmem(2, self.schedule.rows_per_tile * strides.q, LANES),
            q_arrived=dma((2,)),
            out_buffer=vmem(self.schedule.rows_per_tile * strides.out, LANES),
            out_left=dma,
            queries=vmem(all_rows, views.key_lanes, dtype=self.compute_dtype),
            top=vmem(all_rows, LANES),
            total=vmem(all_rows, LANES),
            values=vmem(all_rows, strides.out_columns * LANES),
            scores=vmem(2, rows, keys),
            block_top=vmem(2, rows, LANES),
            visible=vmem(self.schedule.rows_per_tile, keys, dtype=jnp.int32),
            sums=vmem(strides.sums, self.schedule.rows_per_tile, LANES),
            key_position=vmem(2, SUBLANES, keys, dtype=jnp.int32),
            token_scales=vmem(2, 2 * layout.num_kv_heads * SUBLANES, keys) if self._has_token_scales else None,
            deinterleaved=vmem(2, *views.deinterleaved_shape()) if self._is_deinterleaved else None,
        )

    @property
    def vmem_bytes(self) -> int:
        """Vector memory that the kernel's scratch takes, with every tile padded as the chips lay it out."""
        shapes: list[Any] = jax.tree.leaves(self._scratch())
        in_vmem = [x for x in shapes if getattr(x, "memory_space", None) == pltpu.VMEM]
        return sum(padded_bytes(x.shape, x.dtype) for x in in_vmem)

    @property
    def _copies_by_strides(self) -> bool:
        """Whether copying a page needs a strided descriptor.

        If so the compiler keeps products behind the scalar stores that build it, so copies do not start beside products
        (compiled: 1.5x per block at heads of 256).
        """
        return self.chip.has_tall_tiles and any(pool.page_shape[-1] > LANES for pool in pools_of(self.layout))

    @property
    def _is_deinterleaved(self) -> bool:
        return self.layout.order == "interleaved"

    @property
    def _has_token_scales(self) -> bool:
        return self.layout.scales == "token"
