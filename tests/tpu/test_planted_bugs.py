"""Planted bugs that the interpreted tests must kill: each is put into the kernel, and a named case must see it.

What sees it is named too: wrong numbers, NaN, a race, a semaphore left counting, or a kernel that fails or never ends.
A bug that survives says that these tests lost their teeth.
"""

import jax
import jax.numpy as jnp
import pytest

from paged.lower import DecodeSchedule
from paged.lower.tpu.decode import launch as launch_module
from paged.lower.tpu.decode.kernel import ROWS_IN_FLIGHT, Decode
from paged.lower.tpu.decode.launch import DecodeLaunch
from paged.lower.tpu.pages import work as work_module
from paged.lower.tpu.pages.stream import Stream
from paged.lower.tpu.pages.transfer import Transfers
from paged.lower.tpu.pages.work import TileVisits
from paged.spec import AttentionState
from tests.support import Case, case_of
from tests.support.specs import PLAIN

from .planting import (
    Elsewhere,
    Shifted,
    all_full,
    all_of,
    assert_killed,
    assert_sound,
    built_of,
    method,
    never_awaited,
    none_filled,
    nothing,
    page_too_few,
)

_FULL = PLAIN.replace(causal=False)


def _schedule(pages_per_block, buffers=2, **rest):
    return DecodeSchedule(pages_per_block=pages_per_block, buffers=buffers, **rest)


# name: case, schedule, how transfers run. Without a causal mask the length is all that hides what lies past it.
SUITE = {
    "late": (Case(spec=_FULL, page_size=8, phase="decode"), _schedule(2, 3), "on_wait"),
    "early": (case_of("plain", "decode", page_size=8, corner="first page masked"), _schedule(1), "eager"),
    "late, one a block": (
        case_of("plain", "decode", page_size=8, corner="first page masked"), _schedule(1, 3), "on_wait",
    ),
    "split": (
        Case(spec=_FULL, page_size=8, phase="decode", dtype="int8", scales="head", corner="exact pages"),
        _schedule(1, kv_splits=2, sequence="grid"),
        "eager",
    ),
    "together": (Case(spec=_FULL, page_size=8, phase="decode", corner="one token"), _schedule(4, 4), "on_wait"),
    "together, one empty": (Case(spec=_FULL, page_size=8, phase="decode"), _schedule(4, 4), "on_wait"),
}  # fmt: skip


def _first(index):
    return 0


def _next_item(index):
    return (jax.lax.rem(index[0] + 1, ROWS_IN_FLIGHT), *index[1:])


def _one_semaphore(original):
    return lambda self, *args: original(self._replace(arrived=Elsewhere(self.arrived, _first)), *args)


def _one_too_long(original):
    def attend(self, refs, *args, **kwargs):
        work = refs.work._replace(length=Shifted(refs.work.length, 1))
        return original(self, refs._replace(work=work), *args, **kwargs)

    return attend


def _one_stage(original):
    def attend(self, refs, blocks, *args, **kwargs):
        return original(self, refs, [block._replace(stage=blocks[0].stage) for block in blocks], *args, **kwargs)

    return attend


def _none_empty(original):
    def are_short(self, refs, *args):
        work = refs.work._replace(count=Shifted(refs.work.count, 1))
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


# name: how to plant it, the case that kills it, and what is seen.
BUGS = {
    "no wait for pages": (method(Transfers, "wait", nothing), "late", "nan"),
    "no wait for the last pages": (method(Transfers, "wait_for", nothing), "late", "nan"),
    "no wait for queries": (method(Decode, "_query_copies", never_awaited), "late", "nan"),
    "no wait for results": (method(Decode, "_result_copies", never_awaited), "early", "race"),
    "one semaphore for all stages": (
        all_of(*(method(Transfers, name, _one_semaphore) for name in ("start", "wait"))), "late, one a block", "nan",
    ),
    "results from the wrong place": (method(Decode, "_result_copies", _wrong_place), "late", "race"),
    "j <= length": (method(Decode, "_attend", _one_too_long), "late", "nan"),
    "values past the length not zeroed": (method(Transfers, "zero_dead_values", nothing), "late", "nan"),
    "values of entries without a page not zeroed": (method(Stream, "zero_dead_values", none_filled), "late", "nan"),
    "a page too few": (method(TileVisits, "of", page_too_few), "late", "wrong"),
    "partial pages taken for full": (method(TileVisits, "of", all_full), "late", "nan"),
    "cursor a block behind": (
        method(Stream, "move_cursor", lambda move: lambda self, item, at: move(self, item, at - 1)),
        "early",
        "semaphore",
    ),
    "cursor a block ahead": (
        method(Stream, "move_cursor", lambda move: lambda self, item, at: move(self, item, at + 1)),
        "late",
        "exception",
    ),
    "one stage for items together": (method(Decode, "_attend", _one_stage), "together", "wrong"),
    "an item past the end together with the last": (
        method(Decode, "_are_short", lambda short: lambda self, refs, item, end: short(self, refs, item, end + 1)),
        "together",
        "exception",
    ),
    "an empty item together with another": (
        method(Decode, "_are_short", _none_empty), "together, one empty", "exception",
    ),
    "tail of a split lost": (method(TileVisits, "work_list", _tail_lost), "split", "wrong"),
    "scale of keys for values": (
        method(DecodeLaunch, "_head_scales", lambda scales: lambda self, pages: scales(self, pages)[:1] * 2),
        "split",
        "wrong",
    ),
    "splits added up": (
        lambda patch: patch.setattr(launch_module, "_merge_splits", _splits_added_up), "split", "wrong",
    ),
}  # fmt: skip


# Bugs that are like others above, or that take long: a kernel that never ends is stopped after some seconds.
_SLOW = ("no wait for the last pages", "partial pages taken for full", "cursor a block ahead", "splits added up")


@pytest.fixture(scope="module")
def builts():
    return built_of(SUITE)


@pytest.mark.parametrize("name", SUITE)
def test_the_suite_passes_without_a_bug(name, builts):
    assert_sound(name, SUITE, builts)


@pytest.mark.parametrize("bug", [pytest.param(bug, marks=[pytest.mark.kernels] * (bug in _SLOW)) for bug in BUGS])
def test_the_suite_kills(bug, builts, monkeypatch):
    assert_killed(bug, SUITE, builts, BUGS[bug], monkeypatch)
