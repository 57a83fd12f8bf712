"""The kernel that copies pages inside of a pool: every copy goes from memory to memory, and none through a register."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from paged.spec import PageLayout, Pages

from ...jax_version import vary_alike
from ...program import PageCopies
from ...transforms import run_kernels
from ...xla import copy_pages as copy_pages_by_xla
from ...xla import copy_scales
from ..chips import LANES, Chip
from ..pages import pools_of, refuses_layout
from ..references import Copies, Ref, call_kernel
from ..write import pipeline

# Copies on their way at once, of each core.
_AHEAD = 8


class Arrays(NamedTuple):
    """The arrays of keys and values of the pages."""

    pools: tuple[Ref, ...]


def refuses_copy(layout: PageLayout) -> str | None:
    """Why no kernel copies pages of this layout, or None."""
    reason = refuses_layout(layout)
    if reason is None and any(shape[-1] % LANES for shape in layout.array_shapes(1)):
        reason = f"XLA lays out pages whose last axis is no multiple of {LANES} lanes so that no kernel can read them"
    return reason


def copy_pages(chip: Chip, interpret: Any, pages: Pages, copies: PageCopies) -> Pages:
    """The pages with some of them copied to others, in place where the pages are donated."""
    run = functools.partial(_copy, chip, interpret)
    return run_kernels(run, copy_pages_by_xla, pages, copies, is_interpreted=bool(interpret))


def _copy(chip: Chip, interpret: Any, pages: Pages, copies: PageCopies) -> Pages:
    most = chip.smem_for_lists // 8  # two numbers for each sequence
    pools = pages.arrays
    for first in range(0, copies.target.shape[0], most):
        part = PageCopies(*(x[first : first + most] for x in copies))
        launch = lambda _, pools, part=part: _launch(chip, interpret, pages.layout, part, pools)
        # A loop of one turn or none, which XLA runs in place: a step without copies does not start the kernel.
        part, pools = vary_alike(part, pools)
        pools = jax.lax.fori_loop(0, jnp.any(part.target >= 0).astype(jnp.int32), launch, pools)
    return Pages(pools, *copy_scales(pages, copies), layout=pages.layout)


def _launch(
    chip: Chip, interpret: Any, layout: PageLayout, copies: PageCopies, pools: tuple[Array, ...]
) -> tuple[Array, ...]:
    slots = copies.target.shape[0]

    def run(scalars: PageCopies, inputs: Arrays, outputs: Arrays, left: Ref) -> None:
        del inputs  # read where they are written

        def of(seq: Any) -> Copies:
            def each(act: Any) -> None:
                @pl.when(scalars.target[seq] >= 0)
                def _():
                    for pool, ref in zip(pools_of(layout), outputs.pools, strict=False):  # without scales
                        source, target = (pool.page(ref, ids[seq]) for ids in scalars)
                        act(pltpu.make_async_copy(source, target, left.at[jax.lax.rem(seq, 2 * _AHEAD)]))

            return Copies(each)

        core = pl.program_id(0)
        pipeline(
            jax.lax.div(slots * core, chip.cores),
            jax.lax.div(slots * (core + 1), chip.cores),
            ahead=_AHEAD,
            read=lambda seq: None,
            send=lambda seq: of(seq).start(),
            await_sent=lambda seq: of(seq).wait(),
        )

    outputs: Arrays = call_kernel(
        run,
        name="paged_copy",
        chip=chip,
        interpret=interpret,
        grid=(chip.cores,),
        scalars=copies,
        inputs=Arrays(pools),
        memory=Arrays(pltpu.HBM),  # pyright: ignore
        outputs=Arrays(tuple(jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools)),
        scratch=pltpu.SemaphoreType.DMA((2 * _AHEAD,)),
        in_place=lambda tree: tree.pools,
    )
    return outputs.pools
