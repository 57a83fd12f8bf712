"""Planted bugs of the TPU prefill kernel and of the lowering around it."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp

from paged.lower.tpu.decode import TpuDecode
from paged.lower.tpu.pages.intervals import Computed, IntervalWork
from paged.lower.tpu.pages.stream import Stream
from paged.lower.tpu.pages.transfer import Transfers
from paged.lower.tpu.pages.work import TileVisits
from paged.lower.tpu.prefill import block as block_module
from paged.lower.tpu.prefill import tile as tile_module
from paged.lower.tpu.prefill.block import Block, BlockKernel
from paged.lower.tpu.prefill.intervals import TileWork
from paged.lower.tpu.prefill.kernel import PrefillKernel
from paged.lower.tpu.prefill.launch import PrefillLaunch
from paged.lower.tpu.prefill.shape import TileShape
from paged.lower.tpu.prefill.tile import TileKernel

from .base import Mutant
from .planting import (
    Instead,
    Shifted,
    all_full,
    all_of,
    attribute,
    method,
    never_awaited,
    none_filled,
    nothing,
    page_too_few,
)


def _not_waiting_before_results(original):
    def run(self, refs, item, end, half, before_results, stage):
        return original(self, refs, item, end, half, lambda: None, stage)

    return run


def _impatient(patch):
    """Only an item's first whole block is waited for, not the block in the stage *after* the one that is worked on."""
    later, after, wait = [], Stream.after, Stream.wait_whole

    def noted(self, slot):
        later.append(after(self, slot))
        return later[-1]

    def wait_whole(self, slot):
        if not any(slot is other for other in later):
            wait(self, slot)

    patch.setattr(Stream, "after", noted)
    patch.setattr(Stream, "wait_whole", wait_whole)


def _one_too_long(original):
    def find_visible(self, refs, *args):
        work = refs.stream.work
        work = dataclasses.replace(work, tiles=work.tiles._replace(length=Shifted(work.tiles.length, 1)))
        return original(self, refs._replace(stream=dataclasses.replace(refs.stream, work=work)), *args)

    return find_visible


def _spare_rows_see(original):
    def seen_by_a_row(self, refs, item):
        work = Instead(refs.stream.work, rows=Shifted(refs.stream.work.rows, self.shape.positions))
        return original(self, refs._replace(stream=dataclasses.replace(refs.stream, work=work)), item)

    return seen_by_a_row


def _in_the_first_half(original):
    """`BlockKernel.score` or `weigh` with the scores in half 0, whichever half is asked for."""
    at = list(inspect.signature(original).parameters).index("half")
    return lambda *args, **kwargs: original(*args[:at], 0, *args[at + 1 :], **kwargs)


def _of_the_other_head(original):
    return lambda self, refs, block, head, which: original(self, refs, block, 1 - head, which)


def _results_of_the_other_head(original):
    return lambda self, strip: 1 - original(self, strip)


def _one_half(stage, half, entry):
    return Block(stage, 0, entry)


def _one_too_far(name):
    return property(lambda self: Shifted(getattr(self.tiles, name), 1))


def _shorter(original):
    def pages(self, item):
        first, count, *full = original(self, item)
        return first, jnp.maximum(count - 1, 0), *full

    return pages


def _all_seen(original):
    def pages(self, item):
        first, count, *_ = original(self, item)
        return first, count, first, first + count

    return pages


def _of_the_next_slot(original):
    def run_single_rows(self, *args):
        return jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), original(self, *args))

    return run_single_rows


def _into_new_memory(original):
    return lambda self, work, q, pages, sinks, results=None, own=None: original(self, work, q, pages, sinks, own=own)


def _a_row_before(original):
    return lambda self, rows: original(self, rows._replace(out=jnp.roll(rows.out, 1, axis=0)))


def _numbers_of_the_slot_before(original):
    return lambda self, item: jnp.maximum(original(self, item) - 1, 0)


def _a_page_later(original):
    return lambda self, place, length: original(self, place, length) + 1


def _of_keys_only(original):
    del original
    return property(lambda self: Computed(lambda item: jnp.where(self.length[item] > 0, self.tiles.rows[item], 0)))


def _cleared_at_first_only(patch):
    clear = TileKernel._clear

    def every_group(self, refs):
        for strip_group in range(self.shape.strip_groups):
            clear(self, refs, strip_group)

    patch.setattr(TileKernel, "clear", every_group)
    patch.setattr(TileKernel, "_clear", lambda self, refs, strip_group: None)


_prefill = functools.partial(Mutant, "prefill", in_every_run=False)
_EQUAL = "equals the reference"
PREFILL = (
    _prefill(
        "the next whole block is not waited for", _impatient,
        "prefill, late", _EQUAL, "not finite", in_every_run=False,
    ),
    _prefill(
        "no wait for results", method(TileKernel, "run", _not_waiting_before_results),
        "prefill, early", "no races",
    ),
    _prefill(
        "scores of all strip groups in one half",
        all_of(*(method(BlockKernel, step, _in_the_first_half) for step in ("score", "weigh"))),
        "prefill, late", _EQUAL, "error",
    ),
    _prefill(
        "first scores of the next block from this one",
        attribute(tile_module, "_choose", lambda _: lambda condition, yes, no: yes),
        "prefill, late", _EQUAL, "error",
    ),
    _prefill(
        "decoded rows of the next slot", method(TpuDecode, "run_single_rows", _of_the_next_slot),
        "prefill, mixed", _EQUAL, "not finite",
    ),
    _prefill(
        "decoded rows are not kept", method(PrefillLaunch, "__call__", _into_new_memory),
        "prefill, mixed", _EQUAL, "not finite",
    ),
    _prefill(
        "no wait for whole blocks", method(Transfers, "wait", nothing),
        "prefill, late", _EQUAL, "not finite",
    ),
    _prefill(
        "no wait for blocks of few pages", method(Transfers, "wait_for", nothing),
        "prefill, late", _EQUAL, "not finite",
    ),
    _prefill(
        "no wait for queries", method(PrefillKernel, "_queries", never_awaited),
        "prefill, late", _EQUAL, "not finite",
    ),
    _prefill(
        "no wait for any results", method(PrefillKernel, "_results", never_awaited),
        "prefill, early", "no races",
    ),
    _prefill(
        "j <= length", method(BlockKernel, "_find_visible", _one_too_long),
        "prefill, late", _EQUAL, "not finite",
    ),
    _prefill(
        "no mask", method(BlockKernel, "_visible", lambda visible: lambda *args: jnp.bool_(True)),
        "prefill, early", _EQUAL, "not finite",
    ),
    _prefill(
        "values past the length not zeroed", method(Transfers, "zero_dead_values", nothing),
        "prefill, late", _EQUAL, "not finite",
    ),
    _prefill(
        "values of places without a page not zeroed", method(Stream, "zero_dead_values", none_filled),
        "prefill, half blocks", _EQUAL, "not finite",
    ),
    _prefill(
        "values of hidden pages not zeroed", method(Stream, "hide_unseen", nothing),
        "prefill, hidden pages", _EQUAL, "not finite",
    ),
    _prefill(
        "spare rows of a tile see pages", method(BlockKernel, "_seen_by_a_row", _spare_rows_see),
        "prefill, hidden pages", _EQUAL, "not finite",
    ),
    _prefill(
        "a page too few", method(TileWork, "_pages", _shorter),
        "prefill, early", _EQUAL, "error",
    ),
    _prefill(
        "partial pages taken for full", method(TileWork, "_pages", _all_seen),
        "prefill, early", _EQUAL, "not finite",
    ),
    _prefill(
        "a page too few in the list", method(TileVisits, "of", page_too_few),
        "prefill, listed", _EQUAL, "error",
    ),
    _prefill(
        "partial pages taken for full in the list", method(TileVisits, "of", all_full),
        "prefill, listed", _EQUAL, "not finite",
    ),
    _prefill(
        "keys of another head", method(BlockKernel, "_stored", _of_the_other_head),
        "prefill, early", _EQUAL, "error",
    ),
    _prefill(
        "results of another head", method(TileShape, "q_head_of", _results_of_the_other_head),
        "prefill, early", _EQUAL, "error",
    ),
    _prefill(
        "tiles a row too far", attribute(TileWork, "row", lambda _: _one_too_far("row")),
        "prefill, early", "in bounds",
    ),
    _prefill(
        "tiles a position too far", attribute(TileWork, "position", lambda _: _one_too_far("position")),
        "prefill, early", _EQUAL, "error",
    ),
    _prefill(
        "no tiles for rows of no sequence", attribute(TileWork, "rows", _of_keys_only),
        "prefill, mixed", _EQUAL, "not finite",
    ),
    _prefill(
        "the next block is deinterleaved over this one", attribute(tile_module, "Block", lambda _: _one_half),
        "prefill, interleaved", _EQUAL, "error",
    ),
    _prefill(
        "the state is never cleared", method(TileKernel, "clear", nothing),
        "prefill, early", _EQUAL, "not finite",
    ),
    _prefill(
        "the state of the tile before", _cleared_at_first_only,
        "prefill, early", _EQUAL, "not finite",
    ),
    _prefill(
        "positions are ignored for keys", attribute(block_module, "store_own_positions", nothing),
        "prefill, tree", _EQUAL, "error",
    ),
    _prefill(
        "numbers of another sequence", method(TileWork, "_slot", _numbers_of_the_slot_before),
        "prefill, tree", _EQUAL, "error",
    ),
    _prefill(
        "a page with own tokens needs no mask", method(IntervalWork, "_page_of_own", _a_page_later),
        "prefill, tree", _EQUAL, "error",
    ),
    _prefill(
        "results of the row before", method(PrefillLaunch, "results_of", _a_row_before),
        "prefill, mixed", _EQUAL, "error",
    ),
)  # fmt: skip
