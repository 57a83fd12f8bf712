"""From arrays to the prefill kernel and back: its code, operands and scratch memory, and its results as a state."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from paged.spec import PageLayout, Pages

from ...program import PageIntervals, Program, Results, Wanted, kernel_terms
from ..chips import LANES, SUBLANES, Chip, padded_bytes
from ..pages import Facts, Holes, Stream, Transfers, Views, WorkList, compute_dtype, pools_of
from ..references import call_kernel
from .block import BlockKernel, visible_words
from .intervals import Batch, Tiles, TileWork, Uncut
from .kernel import PrefillKernel
from .own import OWN_MEMORY, OwnOperands, OwnShape
from .refs import Inputs, Outputs, Refs, Rows, Scratch, Strides
from .schedule import RaggedSchedule
from .shape import TileShape
from .tile import LOG2E, MOST_UNROLLED, TileKernel
from .tiles import most_tiles

# The mask is evaluated for this many positions at a time.
_MASK_ROWS = 32
# The last tile of a sequence may have few rows. There is code for tiles of a quarter of the positions, a quarter of
# these, and so on, down to 16 at least.
_FEWEST_POSITIONS, _SHRINK = 16, 4


@dataclasses.dataclass(frozen=True)
class PrefillLaunch:
    """One prefill kernel, ready to be called on a work list.

    * ``q_dtype``: the dtype of the queries.
    * ``wanted``: the results that the caller wants.
    * ``schedule``: its ``pages_per_block`` fill a stage of the stream's ring, which has ``buffers`` stages.
    * ``interpret``: passed to Pallas.
    * ``own_shape``: how much the batch brings for its rows; None if nothing.
    """

    program: Program
    layout: PageLayout
    q_dtype: Any
    wanted: Wanted
    schedule: RaggedSchedule
    chip: Chip
    interpret: Any
    own_shape: OwnShape | None = None

    @property
    def compute_dtype(self) -> Any:
        """What the matrix unit multiplies."""
        return compute_dtype(self.layout, self.q_dtype)

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
        """How the rows of a tile lie between the caller's arrays and strips."""
        return Strides(self.program.num_q_heads, self.views.key_lanes, self.views.result_lanes)

    def shapes(self) -> tuple[TileShape, ...]:
        """The shapes of tiles that there is code for, fewest positions first."""
        positions = [self.schedule.rows_per_tile]
        while positions[0] // _SHRINK >= _FEWEST_POSITIONS:
            positions.insert(0, positions[0] // _SHRINK)
        return tuple(TileShape(n, self.program.num_q_heads, self.program.group) for n in positions)

    def __call__(
        self,
        work: WorkList | Uncut,
        q: Float[Array, "tokens q_heads dim"],
        pages: Pages,
        sinks: Float[Array, " q_heads"] | None,
        results: Rows | None = None,
        own: OwnOperands | None = None,
    ) -> Rows:
        """Run the kernel on a work list, or on a batch that it is to cut, and return the results of its tiles' rows.

        ``own`` is what the batch brings for its rows.

        Given ``results``, the kernel writes into that memory, and rows of no tile keep their results. Without it these
        rows hold anything.
        """
        kernel = PrefillKernel(tuple(self._tile(shape) for shape in self.shapes()))
        arrays, (k_scale, v_scale) = self._arrays(kernel.tiles[-1].blocks[-1]), self._head_scales(pages)
        smem: Any = pltpu.SMEM
        hbm: Any = pltpu.HBM
        pools: Any = (*pages.arrays, *((pages.k_scale, pages.v_scale) if self._has_token_scales else ()))

        def run(scalars: WorkList | Batch, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
            transfers = Transfers(self.layout, inputs.pools, scratch.page_buffers, scratch.pages_arrived)
            items = scalars
            if isinstance(work, Uncut):
                items = self._tile_work(work.intervals, scalars, scratch)
                items.cut(work.least_rows, q.shape[0], transfers.num_pages)
            stream = Stream(items, transfers, scratch.cursor, scratch.filled, scratch.holes)  # pyright: ignore
            kernel.run_items(Refs(stream, inputs, outputs, scratch), *stream.work.bounds_of(pl.program_id(0)))

        return call_kernel(
            run,
            name="paged_prefill",
            chip=self.chip,
            interpret=self.interpret,
            grid=(self.schedule.cores,),
            scalars=work.batch if isinstance(work, Uncut) else work,
            inputs=Inputs(k_scale, v_scale, sinks, arrays, own, q.astype(dtype_in_kernels(q.dtype)), pools, results),
            memory=Inputs(smem, smem, smem, arrays=smem, own=own and OWN_MEMORY, q=hbm, pools=hbm, results=hbm),
            outputs=Outputs(self.rows(q.shape[0])),
            scratch=self._scratch(work, q.shape[0]),
            in_place=lambda tree: None if results is None else tree.results,
        ).results

    def _tile_work(self, intervals: PageIntervals, batch: Any, scratch: Scratch) -> TileWork:
        """The work on a batch, which the scalar core computes."""
        assert scratch.facts is not None and scratch.tiles is not None
        width, schedule = batch.pages.shape[0] // batch.starts.shape[0], self.schedule
        division = schedule.rows_per_tile, 1, schedule.pages_per_block, schedule.cores
        values = self.program.values
        return TileWork(intervals, batch, scratch.facts, values, width, *division, scratch.tiles)

    def rows(self, tokens: int) -> Rows:
        """The shapes of the kernel's results for so many query rows."""
        out = (tokens, self.program.num_q_heads, self.layout.value_dim)
        lse = (tokens, self.strides.lse_registers, LANES)
        return Rows(
            jax.ShapeDtypeStruct(out, dtype_in_kernels(self.wanted.dtype)),
            jax.ShapeDtypeStruct(lse, jnp.float32) if self.wanted.has_lse else None,
        )

    def results_of(self, rows: Rows) -> Results:
        """The caller's results, from those of the kernel."""
        lse = None if rows.lse is None else rows.lse.reshape(rows.lse.shape[0], -1)[:, : self.program.num_q_heads]
        return Results(rows.out.astype(self.wanted.dtype), lse)

    def _tile(self, shape: TileShape) -> TileKernel:
        mask_rows = min(_MASK_ROWS, shape.positions)
        # Nothing is known of pages with tokens of the step, if the batch brings positions.
        hides_unseen = self.own_shape is not None or self.program.may_visit_unseen(self.views.layout.page_size)
        blocks = []
        for views in self._prefixes():
            scores = kernel_terms(self.program, shape.strip_group_rows, views.columns, unit=LOG2E)
            mask = kernel_terms(self.program, mask_rows, views.columns)
            own_words = 0 if self.own_shape is None else self.own_shape.words
            blocks.append(BlockKernel(self.program, shape, views, scores, mask, mask_rows, hides_unseen, own_words))
        # Smaller tiles are for the last rows of a sequence. They take little time, and long lines take long to compile.
        unrolled = MOST_UNROLLED if shape.positions == self.schedule.rows_per_tile else MOST_UNROLLED // 4
        return TileKernel(
            shape, self.strides, self.views.value_lanes, tuple(blocks), unrolled, not self._copies_by_strides
        )

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

    def _scratch(self, work: WorkList | Uncut | None = None, tokens: int = 0) -> Scratch:
        """The shapes of the kernel's scratch memory. Vector memory is the same whatever the work."""
        uncut = work if isinstance(work, Uncut) else None
        most = most_tiles(tokens, uncut.batch.starts.shape[0], self.schedule.rows_per_tile) if uncut else 0
        views, layout, strides, shapes = self.views, self.layout, self.strides, self.shapes()
        positions = self.schedule.rows_per_tile
        keys, all_rows, q_heads = views.columns, positions * self.program.num_q_heads, self.program.num_q_heads
        rows = max(shape.strip_group_rows for shape in shapes)
        registers = 0 if self.own_shape is None else self.own_shape.registers
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
            tiles=Tiles.scratch(most, uncut.batch.brings_something) if uncut else None,
            facts=Facts.scratch(most, uncut.intervals, self.own_shape is not None) if uncut else None,
            holes=Holes.scratch(self.schedule.buffers, self.schedule.pages_per_block) if uncut else None,
            q_buffer=vmem(2, positions, q_heads, self.program.head_dim, dtype=dtype_in_kernels(self.q_dtype)),
            q_arrived=dma((2,)),
            own_buffer=vmem(2, positions, registers, LANES, dtype=jnp.int32) if registers else None,
            results=jax.tree.map(lambda x: vmem(*x.shape, dtype=x.dtype), self.rows(positions)),
            results_left=dma,
            apart=vmem(positions * strides.stride, LANES),
            queries=vmem(all_rows, views.key_lanes, dtype=self.compute_dtype),
            own_rows=vmem(registers, positions, LANES, dtype=jnp.int32) if registers else None,
            top=vmem(all_rows, LANES),
            total=vmem(all_rows, LANES),
            values=vmem(all_rows, strides.out_columns * LANES),
            scores=vmem(2, rows, keys),
            block_top=vmem(2, rows, LANES),
            visible=vmem(visible_words(self.program) * positions, keys, dtype=jnp.int32),
            lse=vmem(strides.lse_registers, positions, LANES) if self.wanted.has_lse else None,
            key_position=vmem(2, SUBLANES, keys, dtype=jnp.int32),
            key_place=vmem(2, SUBLANES, keys, dtype=jnp.int32) if registers else None,
            token_scales=vmem(2, 2 * layout.num_kv_heads * SUBLANES, keys) if self._has_token_scales else None,
            deinterleaved=vmem(2, *views.deinterleaved_shape()) if self._is_deinterleaved else None,
        )

    @property
    def vmem_bytes(self) -> int:
        """Vector memory that the kernel's scratch and operands take, with every tile padded as the chips lay it out."""
        shapes: list[Any] = jax.tree.leaves(self._scratch())
        in_vmem = [x for x in shapes if getattr(x, "memory_space", None) == pltpu.VMEM]
        # Pallas keeps two buffers of an operand in vector memory.
        lanes = 0 if self.own_shape is None else 2 * padded_bytes(self.own_shape.lanes, jnp.int32)
        return lanes + sum(padded_bytes(x.shape, x.dtype) for x in in_vmem)

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


def dtype_in_kernels(dtype: Any) -> Any:
    """The dtype that a kernel reads or writes instead of the caller's: a TPU has no float16."""
    return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)
