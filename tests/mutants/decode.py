"""Planted bugs of the TPU decode kernel, of its update, and of the lowering around them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from paged.lower.tpu.decode import launch as launch_module
from paged.lower.tpu.decode.apart import Apart
from paged.lower.tpu.decode.kernel import ROWS_IN_FLIGHT, Decode
from paged.lower.tpu.decode.launch import DecodeLaunch
from paged.lower.tpu.decode.sight import Sight
from paged.lower.tpu.decode.update import Write
from paged.lower.tpu.pages import work as work_module
from paged.lower.tpu.pages.brought import BroughtFor
from paged.lower.tpu.pages.intervals import IntervalWork
from paged.lower.tpu.pages.stream import Stream
from paged.lower.tpu.pages.transfer import Transfers
from paged.lower.tpu.pages.work import TileVisits
from paged.spec import AttentionState

from .base import Mutant
from .planting import (
    Elsewhere,
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


def _first(index):
    return 0


def _next_item(index):
    return (jax.lax.rem(index[0] + 1, ROWS_IN_FLIGHT), *index[1:])


def _one_semaphore(original):
    return lambda self, *args: original(self._replace(arrived=Elsewhere(self.arrived, _first)), *args)


def _of_the_next_tile(original):
    return lambda self, memory, stage, tile, x: original(self, memory, stage, (tile + 1) % self.views.tiles, x)


def _one_too_long(original):
    def attend(self, refs, *args, **kwargs):
        work = Instead(refs.work, length=Shifted(refs.work.length, 1))
        return original(self, refs._replace(work=work), *args, **kwargs)

    return attend


def _one_stage(original):
    def attend(self, refs, blocks, *args, **kwargs):
        return original(self, refs, [block._replace(stage=blocks[0].stage) for block in blocks], *args, **kwargs)

    return attend


def _none_empty(original):
    def are_short(self, refs, *args):
        work = Instead(refs.work, count=Shifted(refs.work.count, 1))
        return original(self, refs._replace(work=work), *args)

    return are_short


def _wrong_place(original):
    def copies(self, refs, *args):
        scratch = refs.scratch._replace(out=Elsewhere(refs.scratch.out, _next_item))
        return original(self, refs._replace(scratch=scratch), *args)

    return copies


def _tail_lost(original):
    def work_list(self, rows, entries, *, splits, **rest):
        done = original(self, rows, entries, splits=splits, **rest)
        is_last = jnp.arange(done.count.shape[0]) % splits == splits - 1
        count = jnp.where(is_last, jnp.maximum(done.count - 1, 0), done.count)
        busy = work_module._next_busy(count)
        return done._replace(count=count, num_full=jnp.minimum(done.num_full, count), busy=busy)

    return work_list


def _splits_added_up(out, lse):
    return AttentionState(jnp.sum(out, axis=0), jnp.max(lse, axis=0))


def _not_awaited(is_write):
    def mutant(original):
        def copies(self, *args, **kwargs):
            chosen = never_awaited(original) if kwargs["is_write"] == is_write else original
            return chosen(self, *args, **kwargs)

        return copies

    return mutant


def _at_once(original):
    return lambda self, *args: original(self, *args) & False


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


def _in_their_own_order(original):
    return lambda self, item, i, block: self.facts.begin[item] + i * block


def _of_the_next_row(original):
    def row(self, ref):
        following = lambda: jax.lax.rem(self.which() + 1, self.count)
        return original(dataclasses.replace(self, which=following), ref)

    return row


_decode = functools.partial(Mutant, "decode", in_every_run=False)
_update = functools.partial(Mutant, "update", trial="decode, update", killed_by="writes", in_every_run=False)
_EQUAL = "equals the reference"
DECODE = (
    _decode(
        "no wait for pages", method(Transfers, "wait", nothing),
        "decode, late", _EQUAL, "not finite", in_every_run=True,
    ),
    _decode(
        "no wait for the last pages", method(Transfers, "wait_for", nothing),
        "decode, late", _EQUAL, "not finite",
    ),
    _decode(
        "no wait for queries", method(Decode, "_query_copies", never_awaited),
        "decode, late", _EQUAL, "not finite",
    ),
    _decode(
        "no wait for results", method(Decode, "_result_copies", never_awaited),
        "decode, early", "no races",
    ),
    _decode(
        "one semaphore for all stages",
        all_of(*(method(Transfers, name, _one_semaphore) for name in ("start", "wait"))),
        "decode, late, one page per block", _EQUAL, "not finite",
    ),
    _decode(
        "results from the wrong place", method(Decode, "_result_copies", _wrong_place),
        "decode, late", "no races",
    ),
    _decode(
        "results laid out for the next KV head", method(Apart, "store", _of_the_next_tile),
        "decode, apart", _EQUAL,
    ),
    _decode(
        "queries of every item laid out in one place",
        method(Apart, "put", lambda put: lambda self, memory, stage, q: put(self, memory, 0, q)),
        "decode, apart", _EQUAL, "not finite",
    ),
    _decode(
        "j <= length", method(Decode, "_attend", _one_too_long),
        "decode, late", _EQUAL, "not finite",
    ),
    _decode(
        "values past the length not zeroed", method(Transfers, "zero_dead_values", nothing),
        "decode, late", _EQUAL, "not finite",
    ),
    _decode(
        "values of entries without a page not zeroed", method(Stream, "zero_dead_values", none_filled),
        "decode, late", _EQUAL, "not finite",
    ),
    _decode(
        "values of hidden pages not zeroed", method(Stream, "hide_unseen", nothing),
        "decode, hidden pages", _EQUAL, "not finite",
    ),
    _decode(
        "a page too few in the list", method(TileVisits, "of", page_too_few),
        "decode, listed", _EQUAL, "error",
    ),
    _decode(
        "partial pages taken for full in the list", method(TileVisits, "of", all_full),
        "decode, listed", _EQUAL, "not finite",
    ),
    _decode(
        "a page too few", method(IntervalWork, "_pages", _shorter),
        "decode, late", _EQUAL, "not finite",
    ),
    _decode(
        "partial pages taken for full", method(IntervalWork, "_pages", _all_seen),
        "decode, window", _EQUAL, "not finite",
    ),
    _decode(
        "what the batch brings for the next sequence", method(BroughtFor, "_row", _of_the_next_row),
        "decode, tree", _EQUAL,
    ),
    _decode(
        "the step's own tokens taken for full", method(IntervalWork, "_first_own", lambda _: lambda self, item: 10**6),
        "decode, tree", _EQUAL,
    ),
    _decode(
        "the mask of the first heads for all",
        method(Sight, "_visible", lambda original: lambda self, *args: original(self, *args)[:1]),
        "decode, by head", _EQUAL,
    ),
    _decode(
        "blocks in their own order", method(IntervalWork, "entry", _in_their_own_order),
        "decode, window", _EQUAL, "error",
    ),
    _decode(
        "cursor a block behind",
        method(Stream, "move_cursor", lambda move: lambda self, item, at: move(self, item, at - 1)),
        "decode, early", "in bounds",
    ),
    _decode(
        "cursor a block ahead",
        method(Stream, "move_cursor", lambda move: lambda self, item, at: move(self, item, at + 1)),
        "decode, late", "kernels end",
    ),
    _decode(
        "one stage for items together", method(Decode, "_attend", _one_stage),
        "decode, together", _EQUAL, "error",
    ),
    _decode(
        "an item past the end together with the last",
        method(Decode, "_are_short", lambda short: lambda self, refs, item, end: short(self, refs, item, end + 1)),
        "decode, together", "kernels end",
    ),
    _decode(
        "an empty item together with another", method(Decode, "_are_short", _none_empty),
        "decode, together, one empty", "kernels end",
    ),
    _decode(
        "tail of a split lost", method(TileVisits, "work_list", _tail_lost),
        "decode, split, listed", _EQUAL, "error",
    ),
    _decode(
        "scale of keys for values",
        method(DecodeLaunch, "_head_scales", lambda scales: lambda self, pages: scales(self, pages)[:1] * 2),
        "decode, split", _EQUAL, "error",
    ),
    _decode(
        "splits added up", attribute(launch_module, "_merge_splits", lambda _: _splits_added_up),
        "decode, split", _EQUAL, "error",
    ),
)  # fmt: skip
UPDATE = (
    _update(
        "no wait for what is read", method(Write, "_granule_copies", _not_awaited(is_write=False)),
        killed_by="semaphores end at zero",
    ),
    _update("no wait for what is written", method(Write, "_granule_copies", _not_awaited(is_write=True))),
    _update("no wait for rows", method(Write, "_row_copies", never_awaited)),
    _update("neighbours at once", method(Write, "_note_targets", _at_once)),
)  # fmt: skip
