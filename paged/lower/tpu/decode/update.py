"""Writing a step's keys and values in the kernel that then attends: read a few slots, put the new rows in, write back.

Granules of many sequences are read at once, changed and written back, and all have arrived before the first page is
read for attention.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from paged.spec import PageLayout

from ...program import Sequences
from ..pages import pools_of
from ..write.granules import GRANULE, granule_at, granule_shape, granules_per_seq, row_shape, token_axis

Ref = Any
# Vector memory that granules on their way may take, and the most of them at once.
_STAGE_BYTES, _MOST_STAGED = 2**21, 64


class Targets(NamedTuple):
    """Where new rows go: ``per_seq`` granules for every sequence, flat.

    ``page`` is the granule's page, -1 where nothing is written; ``slot`` its first slot, and ``position`` that slot's.
    ``is_shared`` is 1 where two sequences write to one granule: granules must then be changed one after the other.
    """

    page: Int[Array, " granules"]
    slot: Int[Array, " granules"]
    position: Int[Array, " granules"]
    is_shared: Int[Array, "1"]

    @classmethod
    def of(cls, seqs: Sequences, rows: int, page_size: int, num_pages: int) -> "Targets":
        """For clamped sequences of at most ``rows`` rows."""
        first = jnp.maximum(seqs.lengths - seqs.counts, 0) // GRANULE * GRANULE
        position = first[:, None] + GRANULE * jnp.arange(granules_per_seq(rows), dtype=jnp.int32)
        is_written = (position < seqs.lengths[:, None]) & (seqs.counts > 0)[:, None]
        entry = jnp.minimum(position // page_size, seqs.tables.shape[1] - 1)
        page = jnp.take_along_axis(seqs.tables, entry, axis=1)
        is_written &= (page >= 0) & (page < num_pages)
        page, slot = jnp.where(is_written, page, -1).reshape(-1), (position % page_size).reshape(-1)
        # Each granule that nobody writes gets a number of its own, so that only real ones can be equal.
        key = jnp.where(page < 0, -1 - jnp.arange(page.shape[0], dtype=jnp.int32), page)
        pages, slots = jax.lax.sort((key, slot), num_keys=2)
        is_shared = jnp.any((pages[1:] == pages[:-1]) & (slots[1:] == slots[:-1]))
        return cls(page, slot, position.reshape(-1), is_shared.astype(jnp.int32)[None])


class Staging(NamedTuple):
    """Granules of several sequences, and the rows that go into them; each pool's array has its own of both."""

    new: tuple[Ref, ...]
    granules: tuple[Ref, ...]
    rows: tuple[Ref, ...]
    arrived: Ref
    left: Ref


class Write(NamedTuple):
    """The static facts of the writing part of a kernel."""

    layout: PageLayout
    rows: int

    @property
    def staged(self) -> int:
        """Sequences whose granules are on their way together."""
        granule = sum(math.prod(granule_shape(self.layout, pool)) * 4 for pool in pools_of(self.layout))
        return max(1, min(_MOST_STAGED, _STAGE_BYTES // (granule * granules_per_seq(self.rows))))

    def scratch(self) -> list[Any]:
        """Memory for `Staging`, without ``new``."""
        pools, count = pools_of(self.layout), self.staged * granules_per_seq(self.rows)
        granules = [pltpu.VMEM((count, *granule_shape(self.layout, pool)), pool.dtype) for pool in pools]
        rows = [pltpu.VMEM((self.staged, self.rows, *row_shape(self.layout, pool)), jnp.float32) for pool in pools]
        return [*granules, *rows, pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA]

    def run(self, work: Any, targets: Targets, staging: Staging, pools: tuple[Ref, ...], first: Any, end: Any) -> None:
        """Write the new rows of sequences ``first`` to ``end``, and return when they are in place."""
        per_seq = granules_per_seq(self.rows)
        at_once = jnp.where(targets.is_shared[0] != 0, 1, self.staged)

        def write_some(turn, _):
            base = first + turn * at_once
            count = jnp.minimum(end - base, at_once)

            def rows(verb):
                jax.lax.fori_loop(0, count, lambda i, _: self._copy_rows(work, staging, base + i, i, verb), None)

            def granules(act, *args):
                jax.lax.fori_loop(0, count * per_seq, lambda i, _: act(base * per_seq + i, i, *args), None)

            move = functools.partial(self._copy_granule, targets, staging, pools)
            rows("start")
            granules(move, "read")
            rows("wait")
            granules(move, "await read")
            granules(lambda granule, i: self._put(work, targets, staging, granule, i))
            granules(move, "write")
            granules(move, "await write")

        jax.lax.fori_loop(0, jax.lax.div(end - first + at_once - 1, at_once), write_some, None)

    def _copy_rows(self, work: Any, staging: Staging, seq: Any, i: Any, verb: str) -> None:
        for row in range(self.rows):
            for new, buffer in zip(staging.new, staging.rows, strict=True):
                source = new.at[jnp.minimum(work.row[seq] + row, new.shape[0] - 1)]
                getattr(pltpu.make_async_copy(source, buffer.at[i, row], staging.arrived), verb)()

    def _copy_granule(
        self, targets: Targets, staging: Staging, pools: tuple[Ref, ...], granule: Any, i: Any, what: str
    ) -> None:
        page, slot = targets.page[granule], targets.slot[granule]

        @pl.when(page >= 0)
        def _():
            for pool, ref, buffer in zip(pools_of(self.layout), pools, staging.granules, strict=True):
                place, here = granule_at(self.layout, pool, ref, page, slot), buffer.at[i]
                if what.endswith("read"):
                    copy = pltpu.make_async_copy(place, here, staging.arrived)
                else:
                    copy = pltpu.make_async_copy(here, place, staging.left)
                copy.wait() if what.startswith("await") else copy.start()

    def _put(self, work: Any, targets: Targets, staging: Staging, granule: Any, i: Any) -> None:
        """Put a sequence's rows into one of its granules."""
        seq, local = (jax.lax.div(x, granules_per_seq(self.rows)) for x in (granule, i))

        @pl.when(targets.page[granule] >= 0)
        def _():
            for which, pool in enumerate(pools_of(self.layout)):
                ref, axis = staging.granules[which].at[i], token_axis(self.layout, pool)
                x = ref[...].astype(jnp.float32)
                slot = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
                if pool.is_scale:
                    slot = slot - targets.slot[granule]
                for row in range(self.rows):
                    place = jnp.where(row < work.rows[seq], work.position[seq] + row - targets.position[granule], -1)
                    x = jnp.where(slot == place, staging.rows[which][local, row], x)
                ref[...] = x.astype(ref.dtype)
