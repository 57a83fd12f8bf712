"""From arrays to the decode kernel and back: its operands and scratch memory, and its results as a state."""

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

from ...program import PageIntervals, Program, Results, Wanted, kernel_terms
from ..chips import LANES, Chip, padded_bytes
from ..pages import Facts, Holes, IntervalWork, PageTables, Stream, Transfers, Views, WorkList, pools_of
from ..references import call_kernel
from .apart import Apart
from .kernel import ROWS_IN_FLIGHT, Decode
from .refs import Inputs, Outputs, Refs, Scalars, Scratch
from .schedule import DecodeSchedule
from .sight import Sight
from .update import Targets, Write, WriteRefs, targets_of_tables


class Tables(NamedTuple):
    """Work that the scalar core computes from page tables, where visible pages are ``intervals``."""

    intervals: PageIntervals
    given: PageTables


class New(NamedTuple):
    """New rows to write: where they go, and `new_rows`. ``targets`` is None where the scalar core computes it."""

    targets: Targets | None
    rows: tuple[Float[Array, "tokens ..."], ...]


@dataclasses.dataclass(frozen=True)
class DecodeLaunch:
    """One decode kernel, ready to be called.

    * ``views``: how a block of the schedule's ``pages_per_block`` pages is read.
    * ``schedule``: its ``buffers`` are the stages of the stream's ring, its ``cores`` share the items, and with
      ``sequence="grid"`` every item is a step of the grid.
    * ``has_even_rows``: every slot has as many rows, and they are those that follow the slot before.
    * ``items_at_once``: items of one block that are worked on together.
    * ``interpret``: passed to Pallas.
    """

    program: Program
    views: Views
    schedule: DecodeSchedule
    has_even_rows: bool
    items_at_once: int
    chip: Chip
    interpret: Any

    def __call__(
        self,
        work: WorkList | Tables,
        q: Float[Array, "tokens q_heads dim"],
        pages: Pages,
        wanted: Wanted,
        sinks: Float[Array, " q_heads"] | None = None,
        new: New | None = None,
    ) -> tuple[Results, Pages]:
        """Run the kernel on a work list, or on page tables, and return its results, and the pages.

        Where rows are not even, those that the work list does not name hold anything. ``new`` rows are written before
        any page is read, in place where the pages are donated. Each sequence must then be one item: another item might
        read its pages first.

        The results of several KV splits are merged in float32. So ``wanted`` must be a state there, without sinks.
        """
        terms = tuple(
            (prefix, kernel_terms(self.program, prefix.tile_rows, prefix.columns)) for prefix in self.views.prefixes()
        )
        intervals = work.intervals if isinstance(work, Tables) else None
        given = work.given if isinstance(work, Tables) else work
        has_own_rows = given.brought.positions is not None
        # Pages of the step's own tokens are visited, whether some row sees them or not.
        hides_unseen = has_own_rows or self.program.may_visit_unseen(self.views.layout.page_size)
        sight = Sight(self.program, self.views.pages_per_block, hides_unseen)
        decode = Decode(terms, self.schedule.kv_splits, self.has_even_rows, self.items_at_once, sight, self.apart)
        arrays = self._arrays(terms[-1][1])
        per_row = self._head_scales(pages), self._sinks(sinks)
        inputs = Inputs(*per_row[0], per_row[1], arrays, self._queries(q), new.rows if new else (), _pools(pages))
        hbm: Any = pltpu.HBM
        in_memory = tuple(pltpu.SMEM if x.ndim == 1 else pltpu.VMEM for x in arrays)
        items = given.position.shape[0] * (self.schedule.kv_splits if intervals else 1)
        facts = None if intervals is None else Facts.scratch(items, intervals, has_own_rows)
        # The number of a core's items is known only when the kernel runs. So each core has a step for every item, and
        # does nothing in the steps past its own items.
        cores = self.schedule.cores
        results: Outputs = call_kernel(
            functools.partial(self._kernel, decode, intervals),
            name=f"paged_decode_{self.schedule.sequence}",
            chip=self.chip,
            interpret=self.interpret,
            grid=(cores,) if self.schedule.sequence == "inline" else (cores, items),
            scalars=Scalars(given, new.targets if new else None),
            inputs=inputs,
            memory=Inputs(pltpu.VMEM, pltpu.VMEM, pltpu.VMEM, in_memory, q=hbm, new=hbm, pools=hbm),
            outputs=self._outputs(q.shape[0], wanted, inputs.pools if new else ()),
            scratch=self._scratch(inputs, wanted, facts),
            in_place=(lambda tree: tree.pools) if new else None,
        )
        return self._results(results.out, results.lse), _with_pools(pages, results.pools) if new else pages

    def _kernel(
        self,
        decode: Decode,
        intervals: PageIntervals | None,
        scalars: Scalars,
        inputs: Inputs,
        outputs: Outputs,
        scratch: Scratch,
    ) -> None:
        layout, work = self.views.layout, self._work(intervals, scalars, scratch)
        # Pages are read through the reference that they are written through. Then nothing depends on whether the input
        # and the output really are the same memory, as they are on a chip.
        pools = outputs.pools or inputs.pools
        transfers = Transfers(layout, pools, scratch.pages, scratch.pages_arrived)
        stream = Stream(work, transfers, scratch.cursor, scratch.filled, scratch.holes)
        refs = Refs(work, inputs, outputs, scratch, stream)
        first, end = work.bounds_of(pl.program_id(0))

        def write() -> None:
            if scratch.staging is not None:
                rows = self.views.query_rows
                if isinstance(work, IntervalWork):
                    target = targets_of_tables(work, rows, layout.page_size, transfers.num_pages)
                else:
                    assert scalars.targets is not None
                    target = scalars.targets.at
                Write.of(layout, rows, inputs.new).run(
                    WriteRefs(work, target, inputs.new, pools, scratch.staging), first, end
                )

        if self.schedule.sequence == "inline":
            # All new rows must be in place before the stream copies the first page.
            write()
            decode.run_items(refs, first, end)
        else:
            _run_step(decode, refs, first, end, write)

    def _work(self, intervals: PageIntervals | None, scalars: Scalars, scratch: Scratch) -> WorkList | IntervalWork:
        """The work list, or the work that the scalar core computes."""
        if isinstance(scalars.work, WorkList):
            return scalars.work
        assert intervals is not None
        assert scratch.facts is not None
        width, rows = scalars.work.pages.shape[0] // scalars.work.position.shape[0], self.views.query_rows
        division = self.schedule.kv_splits, self.schedule.pages_per_block, self.schedule.cores
        return IntervalWork(intervals, scalars.work, scratch.facts, self.program.values, width, rows, *division)

    def _arrays(self, terms: Any) -> tuple[Array, ...]:
        """What the scores and the mask need of each query row of a tile, such as the slopes of ALiBi."""
        h = jnp.asarray(self.views.q_head(self.program.group), jnp.int32)[..., None]
        arrays = jax.vmap(terms.early, out_axes=0)(h)
        return tuple(x.astype(jnp.int32) if x.dtype == bool else x for x in arrays)

    def _head_scales(self, pages: Pages) -> tuple[Array | None, Array | None]:
        """The scales of keys and of values, one for every query row; None without per-tensor or per-head scales."""
        if pages.layout.scales not in ("tensor", "head"):
            return None, None
        heads = pages.layout.num_kv_heads
        rows, scales = self.views.kv_head(), (jnp.asarray(pages.k_scale), jnp.asarray(pages.v_scale))
        k_scale, v_scale = (jnp.broadcast_to(scale, (heads,))[rows][..., None] for scale in scales)
        return k_scale, v_scale

    def _sinks(self, sinks: Float[Array, " q_heads"] | None) -> Array | None:
        """The sink of every query row. No index leads to it: XLA would gather sinks one by one."""
        if sinks is None:
            return None
        views, group = self.views, self.program.group
        of_heads = sinks.reshape(views.tiles, 1, views.heads_per_tile, group)
        of_heads = jnp.pad(of_heads, [(0, 0), (0, 0), (0, 0), (0, views.group - group)])
        rows = jnp.broadcast_to(of_heads, (views.tiles, views.query_rows, *of_heads.shape[2:]))
        return rows.reshape(views.tiles, views.tile_rows, 1)

    @property
    def apart(self) -> Apart | None:
        """How rows are laid out for tiles, where the heads of a KV head are no whole registers as they lie."""
        return Apart.of(self.views, self.program.group)

    def _queries(self, q: Array) -> Float[Array, "tokens ... dim"]:
        """Queries as they lie: by KV head, or rows of all heads if they are laid apart."""
        # Kernels have no float16, and a reading of its bits as int16 would be an operation of XLA's as well.
        q = q.astype(_stored(q.dtype))
        return q.reshape(q.shape[0], *_heads(self.views, self.program.group), q.shape[-1])

    def _scratch(self, inputs: Inputs, wanted: Wanted, facts: Facts | None) -> Scratch:
        dma, stages, block = pltpu.SemaphoreType.DMA, self.schedule.buffers, self.schedule.pages_per_block
        dtypes = inputs.q.dtype, _stored(wanted.dtype)
        pages, (q, out, lse) = _vmem_scratch(self.views, self.program.group, stages, *dtypes)
        write = Write.of(self.views.layout, self.views.query_rows, inputs.new)
        return Scratch(
            pages=pages,
            pages_arrived=dma((stages,)),
            q=q,
            q_arrived=dma((ROWS_IN_FLIGHT,)),
            out=out,
            apart=None if self.apart is None else self.apart.scratch(ROWS_IN_FLIGHT),
            lse=lse if wanted.has_lse else None,
            out_left=dma((ROWS_IN_FLIGHT,)),
            cursor=pltpu.SMEM((2,), jnp.int32),
            filled=pltpu.SMEM((stages,), jnp.int32),
            facts=facts,
            holes=None if facts is None else Holes.scratch(stages, block),
            next_stage=pltpu.SMEM((1,), jnp.int32),
            staging=write.scratch() if inputs.new else None,
        )

    def _outputs(self, tokens: int, wanted: Wanted, pools: tuple[Array, ...]) -> Outputs:
        views, splits = self.views, self.schedule.kv_splits
        out = (splits, tokens, *_heads(views, self.program.group), views.layout.value_dim)
        lse = (splits, tokens, views.heads_per_tile * views.group, LANES)
        written = tuple(jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools)
        return Outputs(
            jax.ShapeDtypeStruct(out, _stored(wanted.dtype)),
            jax.ShapeDtypeStruct(lse, jnp.float32) if wanted.has_lse else None,  # pyright: ignore
            written,
        )

    def _results(self, out: Array, lse: Array | None) -> Results:
        """The kernel's results: KV splits merged, padding dropped, heads in the order of the queries."""
        views, program = self.views, self.program
        splits, tokens = out.shape[:2]
        out = out.reshape(splits, tokens, program.num_q_heads, -1)
        if lse is None:
            return Results(out[0], None)
        lse = jnp.moveaxis(lse[..., : views.tiles], -1, 2).reshape(splits, tokens, program.num_kv_heads, views.group)
        lse = lse[..., : program.group].reshape(splits, tokens, program.num_q_heads)
        return Results(*((out[0], lse[0]) if splits == 1 else _merge_splits(out, lse)))

    @staticmethod
    def vmem_bytes(views: Views, group: int, buffers: int) -> int:
        """Vector memory of a kernel's buffers, with every tile padded as chips lay it out.

        ``group`` are the query heads of a KV head, and ``buffers`` are stages.
        """
        pages, rows = _vmem_scratch(views, group, buffers, views.compute_dtype, jnp.float32)
        apart = Apart.of(views, group)
        apart = () if apart is None else (apart.scratch(ROWS_IN_FLIGHT),)
        return sum(padded_bytes(x.shape, x.dtype) for x in (*pages, *rows, *apart))


def _heads(views: Views, group: int) -> tuple[int, ...]:
    """The axes of heads of queries and results as the kernel has them."""
    apart, kv_heads = Apart.of(views, group), views.layout.num_kv_heads
    return (kv_heads, group) if apart is None else (apart.q_heads,)


def _vmem_scratch(
    views: Views, group: int, buffers: int, q_dtype: Any, out_dtype: Any
) -> tuple[tuple[Any, ...], tuple[Any, Any, Any]]:
    """Vector memory for pages; and for queries, results and log-sum-exps."""
    layout, block = views.layout, views.pages_per_block
    pages = tuple(pltpu.VMEM((buffers, block, *pool.page_shape), pool.dtype) for pool in pools_of(layout))
    rows = (ROWS_IN_FLIGHT, views.query_rows, *_heads(views, group))
    return pages, (
        pltpu.VMEM((*rows, layout.head_dim), q_dtype),
        pltpu.VMEM((*rows, layout.value_dim), out_dtype),
        pltpu.VMEM((ROWS_IN_FLIGHT, views.query_rows, views.heads_per_tile * views.group, LANES), jnp.float32),
    )


def _stored(dtype: Any) -> Any:
    """The dtype that a kernel reads or stores instead of the caller's: it has no float16."""
    return jnp.float32 if dtype == jnp.float16 else dtype


def _run_step(decode: Decode, refs: Refs, first: Any, end: Any, write: Callable[[], None]) -> None:
    """One step of the grid: one item. What an item passes to the next, here and in the stream, is in scratch memory."""
    step, next_stage = pl.program_id(1), refs.scratch.next_stage

    @pl.when(step == 0)
    def _():
        # In this order: all new rows must be in place before the stream copies the first page.
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


def _merge_splits(
    out: Float[Array, "splits tokens heads dim"], lse: Float[Array, "splits tokens heads"]
) -> AttentionState:
    return functools.reduce(merge, (AttentionState(*split) for split in zip(out, lse, strict=True)))
