"""From arrays to a kernel and back: operands, scratch memory, grid, and the state that comes out."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from paged.spec import AttentionState, Pages, merge

from ...program import Program, kernel_terms
from ..chips import LANES, Chip, padded_bytes
from ..pages import Stream, Transfers, Views, WorkList, pools_of
from ..references import call_kernel
from .kernel import ROWS_IN_FLIGHT, Decode
from .refs import Inputs, Outputs, Refs, Scalars, Scratch
from .update import Targets, Write, WriteRefs


class New(NamedTuple):
    """New rows to write: where they go, and each array's part of every query row's token, float32."""

    targets: Targets
    rows: tuple[Float[Array, "tokens ..."], ...]


@dataclasses.dataclass(frozen=True)
class Launch:
    """One decode kernel: its views, and how its items are laid over cores and grid."""

    program: Program
    views: Views
    sequence: str
    buffers: int
    splits: int
    cores: int
    items_at_once: int
    chip: Chip
    interpret: Any

    def __call__(
        self, work: WorkList, q: Float[Array, "tokens q_heads dim"], pages: Pages, new: New | None = None
    ) -> tuple[AttentionState, Pages]:
        """The state of the work's rows, float32; other rows hold anything. With ``new`` rows these are written first,
        in place where the pages are donated; there must be one item a sequence then."""
        views = self.views
        bodies = tuple((part, kernel_terms(self.program, part.tile_rows, part.columns)) for part in views.prefixes())
        arrays = self._arrays(bodies[-1][1])
        inputs = Inputs(*self._head_scales(pages), arrays, self._pad(q), new.rows if new else (), _pools(pages))
        hbm: Any = pltpu.HBM
        in_memory = tuple(pltpu.SMEM if x.ndim == 1 else pltpu.VMEM for x in arrays)
        # A core may be given any number of the items, so it has a step for each; those that are not its own are empty.
        grid = (self.cores,) if self.sequence == "inline" else (self.cores, work.begin.shape[0])
        results: Outputs = call_kernel(
            functools.partial(self._kernel, Decode(bodies, self.splits, self.items_at_once)),
            name=f"paged_decode_{self.sequence}",
            chip=self.chip,
            interpret=self.interpret,
            grid=grid,
            scalars=Scalars(work, new.targets if new else None),
            inputs=inputs,
            memory=Inputs(pltpu.VMEM, pltpu.VMEM, in_memory, q=hbm, new=hbm, pools=hbm),
            outputs=self._outputs(q.shape[0], inputs.pools if new else ()),
            scratch=self._scratch(new is not None),
            in_place=(lambda tree: tree.pools) if new else None,
        )
        return self._state(results.out, results.lse), _with_pools(pages, results.pools) if new else pages

    def _kernel(self, decode: Decode, scalars: Scalars, inputs: Inputs, outputs: Outputs, scratch: Scratch) -> None:
        layout, work = self.views.layout, scalars.work
        # Pages are read where they are written, so that what was written is what is read.
        pools = outputs.pools or inputs.pools
        transfers = Transfers(layout, pools, scratch.pages, scratch.pages_arrived)
        stream = Stream(work, transfers, scratch.cursor, scratch.is_clean)
        refs = Refs(work, inputs, outputs, scratch, stream)
        core = pl.program_id(0)
        first, end = work.bounds[core], work.bounds[core + 1]

        def write() -> None:
            if scalars.targets is not None and scratch.staging is not None:
                written = WriteRefs(work, scalars.targets, inputs.new, pools, scratch.staging)
                Write(layout, self.views.query_rows).run(written, first, end)

        if self.sequence == "inline":
            write()
            decode.run_items(refs, first, end)
        else:
            _run_step(decode, refs, first, end, write)

    def _arrays(self, terms: Any) -> tuple[Array, ...]:
        """What the terms need, for every tile; numbers alone go to scalar memory."""
        h = jnp.asarray(self.views.q_head(self.program.group), jnp.int32)[..., None]
        arrays = jax.vmap(terms.early, out_axes=0)(h)
        return tuple(x.astype(jnp.int32) if x.dtype == bool else x for x in arrays)

    def _head_scales(self, pages: Pages) -> tuple[Array | None, Array | None]:
        """Per-tensor and per-head scales of keys and of values, as one factor for every query row; None if there are
        none."""
        if pages.layout.scales not in ("tensor", "head"):
            return None, None
        heads = pages.layout.num_kv_heads
        rows, scales = self.views.kv_head(), (jnp.asarray(pages.k_scale), jnp.asarray(pages.v_scale))
        k_scale, v_scale = (jnp.broadcast_to(scale, (heads,))[rows][..., None] for scale in scales)
        return k_scale, v_scale

    def _pad(self, q: Array) -> Float[Array, "tokens kv_heads group dim"]:
        """Query heads by KV head, padded to the rows of a vector register and to the lanes of a key."""
        grouped = q.reshape(q.shape[0], self.program.num_kv_heads, self.program.group, -1)
        padding = [(0, 0), (0, 0), (0, self.views.group - self.program.group), (0, 0)]
        padding[3] = (0, self.views.key_lanes - q.shape[-1])
        return jnp.pad(grouped.astype(self.views.compute_dtype), padding)

    def _scratch(self, is_update: bool) -> Scratch:
        dma = pltpu.SemaphoreType.DMA
        pages, (q, out, lse) = _vmem_scratch(self.views, self.buffers)
        return Scratch(
            pages=pages,
            pages_arrived=dma((self.buffers,)),
            q=q,
            q_arrived=dma((ROWS_IN_FLIGHT,)),
            out=out,
            lse=lse,
            out_left=dma((ROWS_IN_FLIGHT,)),
            cursor=pltpu.SMEM((2,), jnp.int32),
            is_clean=pltpu.SMEM((self.buffers,), jnp.int32),
            next_stage=pltpu.SMEM((1,), jnp.int32),
            staging=Write(self.views.layout, self.views.query_rows).scratch() if is_update else None,
        )

    def _outputs(self, tokens: int, pools: tuple[Array, ...]) -> Outputs:
        views, layout, f32 = self.views, self.views.layout, jnp.float32
        out = (self.splits, tokens, layout.num_kv_heads, views.group, views.result_lanes)
        lse = (self.splits, tokens, views.heads_per_tile * views.group, LANES)
        written = tuple(jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools)
        return Outputs(jax.ShapeDtypeStruct(out, f32), jax.ShapeDtypeStruct(lse, f32), written)

    def _state(self, out: Array, lse: Array) -> AttentionState:
        """Parts merged, padding dropped, heads in their order."""
        views, program = self.views, self.program
        parts, tokens = out.shape[:2]
        out = out[:, :, :, : program.group, views.value_lanes].reshape(parts, tokens, program.num_q_heads, -1)
        lse = jnp.moveaxis(lse[..., : views.tiles], -1, 2).reshape(parts, tokens, program.num_kv_heads, views.group)
        lse = lse[..., : program.group].reshape(parts, tokens, program.num_q_heads)
        return AttentionState(out[0], lse[0]) if parts == 1 else _merge_parts(out, lse)

    @staticmethod
    def vmem_bytes(views: Views, buffers: int) -> int:
        """Vector memory that a kernel's buffers take, with every tile padded as the chips lay it out."""
        pages, rows = _vmem_scratch(views, buffers)
        return sum(padded_bytes(x.shape, x.dtype) for x in (*pages, *rows))


def _vmem_scratch(views: Views, buffers: int) -> tuple[tuple[Any, ...], tuple[Any, Any, Any]]:
    """Vector memory for pages; and for queries, results and log-sum-exps."""
    layout, block, f32 = views.layout, views.pages_per_block, jnp.float32
    pages = tuple(pltpu.VMEM((buffers, block, *pool.page_shape), pool.dtype) for pool in pools_of(layout))
    rows = (ROWS_IN_FLIGHT, views.query_rows, layout.num_kv_heads, views.group)
    return pages, (
        pltpu.VMEM((*rows, views.key_lanes), views.compute_dtype),
        pltpu.VMEM((*rows, views.result_lanes), f32),
        pltpu.VMEM((ROWS_IN_FLIGHT, views.query_rows, views.heads_per_tile * views.group, LANES), f32),
    )


def _run_step(decode: Decode, refs: Refs, first: Any, end: Any, write: Callable[[], None]) -> None:
    """One item for each grid step, the first after all writes; the stream of pages runs on from step to step."""
    step, next_stage = pl.program_id(1), refs.scratch.next_stage

    @pl.when(step == 0)
    def _():
        write()
        decode.begin(refs, first, end)
        next_stage[0] = 0

    @pl.when(first + step < end)
    def _():
        next_stage[0] = decode.run_item(refs, first + step, first, end, next_stage[0])

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        decode.drain(refs, first, end)


def _pools(pages: Pages) -> tuple[Array, ...]:
    """The arrays that kernels copy pages from: keys and values, and per-token scales."""
    scales = (pages.k_scale, pages.v_scale) if pages.layout.scales == "token" else ()
    return (*pages.arrays, *scales)  # pyright: ignore


def _with_pools(pages: Pages, pools: tuple[Array, ...]) -> Pages:
    count = len(pages.arrays)
    scales = pools[count:] or (pages.k_scale, pages.v_scale)
    return Pages(pools[:count], *scales, layout=pages.layout)  # pyright: ignore


def _merge_parts(
    out: Float[Array, "parts tokens heads dim"], lse: Float[Array, "parts tokens heads"]
) -> AttentionState:
    """The parts of every sequence, merged."""
    return functools.reduce(merge, (AttentionState(*part) for part in zip(out, lse, strict=True)))
