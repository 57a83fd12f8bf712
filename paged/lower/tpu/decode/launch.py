"""From arrays to a kernel and back: operands, scratch memory, grid, and the state that comes out."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from paged.spec import AttentionState, Pages, merge

from ...program import Program, kernel_terms
from ..chips import Chip
from ..pages import Stream, Transfers, Views, Work, pools_of
from .kernel import ROWS_IN_FLIGHT, Decode, Refs
from .update import Staging, Targets, Write

_LANES = 128


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
        self, work: Work, q: Float[Array, "tokens q_heads dim"], pages: Pages, new: New | None = None
    ) -> tuple[AttentionState, Pages]:
        """The state of the work's rows, float32; other rows hold anything. With ``new`` rows these are written first,
        in place where the pages are donated; there must be one item a sequence then."""
        views, items = self.views, work.begin.shape[0]
        bodies = tuple((part, kernel_terms(self.program, part.tile_rows, part.columns)) for part in views.parts())
        arrays = self._arrays(bodies[-1][1])
        scales = self._head_scales(pages)
        decode = Decode(bodies, self.splits, self.items_at_once)
        pools: Any = (*pages.arrays, *(() if pages.layout.scales != "token" else (pages.k_scale, pages.v_scale)))
        in_memory = [pltpu.VMEM] * len(scales) + [pltpu.SMEM if x.ndim == 1 else pltpu.VMEM for x in arrays]
        targets, rows = ((), ()) if new is None else (new.targets, new.rows)
        scalars, operands = (*work, *targets), (*scales, *arrays, self._pad(q), *rows, *pools)
        in_memory += [pltpu.HBM] * (1 + len(rows) + len(pools))
        # A core may be given any number of the items, so it has a step for each; those that are not its own are empty.
        grid = (self.cores,) if self.sequence == "inline" else (self.cores, items)
        out_shapes = self._out_shapes(q.shape[0])
        first_pool, aliases = len(scalars) + len(operands) - len(pools), {}
        if new is not None:
            aliases = {first_pool + i: len(out_shapes) + i for i in range(len(pools))}
            out_shapes += [jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools]
        out, lse, *written = pl.pallas_call(
            self._kernel(decode, len(scales), len(arrays), len(pools), new is not None),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=grid,
                in_specs=[pl.BlockSpec(memory_space=memory) for memory in in_memory],
                out_specs=[pl.BlockSpec(memory_space=pltpu.HBM)] * len(out_shapes),
                scratch_shapes=self._scratch(new is not None),
            ),
            out_shape=out_shapes,
            input_output_aliases=aliases,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary")[: len(grid)],
                disable_bounds_checks=True,
                vmem_limit_bytes=self.chip.vmem_bytes,
            ),
            interpret=self.interpret,
            name=f"paged_decode_{self.sequence}",
        )(*scalars, *operands)
        return self._state(out, lse), _with_pools(pages, written) if written else pages

    def _kernel(self, decode: Decode, num_scales: int, num_arrays: int, num_pools: int, is_update: bool) -> Any:
        def kernel(*refs: Any) -> None:
            refs_left = list(refs)

            def take(count: int) -> tuple[Any, ...]:
                taken, refs_left[:] = refs_left[:count], refs_left[count:]
                return tuple(taken)

            some = num_pools if is_update else 0
            work = Work(*take(len(Work._fields)))
            targets = Targets(*take(len(Targets._fields))) if is_update else None
            scales, arrays, (q,), new, pools = (take(n) for n in (num_scales, num_arrays, 1, some, num_pools))
            (out, lse), written, buffers = take(2), take(some), take(num_pools)
            arrived, q_buffer, q_arrived, out_buffer, lse_buffer, out_left, cursor, is_clean, place = take(9)
            pools = written or pools
            k_scale, v_scale = scales or (None, None)
            stream = Stream(work, Transfers(self.views.layout, pools, buffers, arrived), cursor, is_clean)
            bound = Refs(
                work, k_scale, v_scale, arrays, q, stream, out, lse, q_buffer, q_arrived, out_buffer, lse_buffer,
                out_left,
            )  # fmt: skip
            core = pl.program_id(0)
            first, end = work.bounds[core], work.bounds[core + 1]

            def write() -> None:
                if targets is not None:
                    staging = Staging(new, take(some), take(some), *take(2))
                    Write(self.views.layout, self.views.rows).run(work, targets, staging, pools, first, end)

            if self.sequence == "inline":
                write()
                decode.run_items(bound, first, end)
            else:
                _run_step(decode, bound, place, first, end, write)

        return kernel

    def _arrays(self, terms: Any) -> tuple[Array, ...]:
        """What the terms need, for every tile; numbers alone go to scalar memory."""
        h = jnp.asarray(self.views.q_head(self.program.group), jnp.int32)[..., None]
        arrays = jax.vmap(terms.early, out_axes=0)(h)
        return tuple(x.astype(jnp.int32) if x.dtype == bool else x for x in arrays)

    def _head_scales(self, pages: Pages) -> tuple[Array, ...]:
        """Scales a tensor or head, as one factor for every query row."""
        if pages.layout.scales not in ("tensor", "head"):
            return ()
        heads = pages.layout.num_kv_heads
        rows, scales = self.views.kv_head(), (jnp.asarray(pages.k_scale), jnp.asarray(pages.v_scale))
        return tuple(jnp.broadcast_to(scale, (heads,))[rows][..., None] for scale in scales)

    def _pad(self, q: Array) -> Float[Array, "tokens kv_heads group dim"]:
        """Query heads by KV head, padded to the rows of a vector register and to the lanes of a key."""
        grouped = q.reshape(q.shape[0], self.program.num_kv_heads, self.program.group, -1)
        padding = [(0, 0), (0, 0), (0, self.views.group - self.program.group), (0, 0)]
        padding[3] = (0, self.views.key_lanes - q.shape[-1])
        return jnp.pad(grouped.astype(self.views.compute_dtype), padding)

    def _scratch(self, is_update: bool) -> list[Any]:
        dma = pltpu.SemaphoreType.DMA
        pages, (q, out, lse) = _vmem_scratch(self.views, self.buffers)
        return [
            *pages,
            dma((self.buffers,)),
            q,
            dma((ROWS_IN_FLIGHT,)),
            out,
            lse,
            dma((ROWS_IN_FLIGHT,)),
            pltpu.SMEM((2,), jnp.int32),
            pltpu.SMEM((self.buffers,), jnp.int32),
            pltpu.SMEM((1,), jnp.int32),
            *(Write(self.views.layout, self.views.rows).scratch() if is_update else ()),
        ]

    def _out_shapes(self, tokens: int) -> list[jax.ShapeDtypeStruct]:
        views, layout = self.views, self.views.layout
        out = (self.splits, tokens, layout.num_kv_heads, views.group, views.result_lanes)
        lse = (self.splits, tokens, views.heads * views.group, _LANES)
        return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (out, lse)]

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


def _vmem_scratch(views: Views, buffers: int) -> tuple[list[Any], list[Any]]:
    """Buffers of pages; and those of queries, results and log-sum-exps."""
    layout, block, f32 = views.layout, views.pages_per_block, jnp.float32
    pages = [pltpu.VMEM((buffers, block, *pool.page_shape), pool.dtype) for pool in pools_of(layout)]
    rows = (ROWS_IN_FLIGHT, views.rows, layout.num_kv_heads, views.group)
    return pages, [
        pltpu.VMEM((*rows, views.key_lanes), views.compute_dtype),
        pltpu.VMEM((*rows, views.result_lanes), f32),
        pltpu.VMEM((ROWS_IN_FLIGHT, views.rows, views.heads * views.group, _LANES), f32),
    ]


def _run_step(decode: Decode, refs: Refs, place: Any, first: Any, end: Any, write: Callable[[], None]) -> None:
    """One item a grid step, the first after all writes; the stream of pages runs on from step to step."""
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        write()
        decode.begin(refs, first, end)
        place[0] = 0

    @pl.when(first + step < end)
    def _():
        place[0] = decode.run_item(refs, first + step, first, end, place[0])

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        decode.drain(refs, first, end)


def _with_pools(pages: Pages, pools: list[Array]) -> Pages:
    count = len(pages.arrays)
    scales = tuple(pools[count:]) or (pages.k_scale, pages.v_scale)
    return Pages(tuple(pools[:count]), *scales, layout=pages.layout)  # pyright: ignore


def _merge_parts(
    out: Float[Array, "parts tokens heads dim"], lse: Float[Array, "parts tokens heads"]
) -> AttentionState:
    """The parts of every sequence, merged."""
    return functools.reduce(merge, (AttentionState(*part) for part in zip(out, lse, strict=True)))


def padded_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array whose last two axes are padded to tiles of 8 (32-bit) to 32 (8-bit) rows of 128 lanes."""
    itemsize = jnp.dtype(dtype).itemsize
    rows = 8 * (4 // itemsize)
    padded = (*shape[:-2], -(-shape[-2] // rows) * rows, -(-shape[-1] // _LANES) * _LANES)
    return math.prod(padded) * itemsize
