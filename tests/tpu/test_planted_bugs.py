"""Planted bugs that the interpreted tests must kill: each is put into the kernel, and a named case must see it.

What sees it is named too: wrong numbers, NaN, a race, a semaphore left counting, or a kernel that fails or never ends.
A bug that survives says that these tests lost their teeth.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from paged.lower import Schedule
from paged.lower.tpu import CHIPS
from paged.lower.tpu import launch as launch_module
from paged.lower.tpu import work as work_module
from paged.lower.tpu.decode import ROWS_IN_FLIGHT, Decode
from paged.lower.tpu.launch import Launch
from paged.lower.tpu.stream import Stream
from paged.lower.tpu.transfer import Transfers
from paged.lower.tpu.work import Visited
from paged.spec import AttentionState
from tests.support import Case, build, case_of, exact_state
from tests.support.specs import PLAIN

from .interpreter import KernelFault, assert_equals_reference, interpreted, params

_FULL = PLAIN.replace(causal=False)


def _schedule(pages_per_block, buffers=2, **rest):
    return Schedule(lowering="tpu-decode", pages_per_block=pages_per_block, buffers=buffers, **rest)


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


class _Shifted:
    """A reference to integers that reads something else than what it holds."""

    def __init__(self, ref, by):
        self.ref, self.by = ref, by

    @property
    def shape(self):
        return self.ref.shape

    def __getitem__(self, index):
        return self.ref[index] + self.by

    def __setitem__(self, index, value):
        self.ref[index] = value


class _Elsewhere:
    """A buffer or semaphores of which another place is given than the one that is asked for."""

    def __init__(self, ref, place):
        self.ref, self.place = ref, place

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        return self.ref.at[self.place(index)]


def _first(index):
    return 0


def _next_item(index):
    return (jax.lax.rem(index[0] + 1, ROWS_IN_FLIGHT), *index[1:])


def _nothing(original):
    return lambda *args, **kwargs: None


def _without_waiting(original):
    def copy(self, *args):
        if args[-1] == "start":
            original(self, *args)

    return copy


def _one_semaphore(original):
    return lambda self, *args: original(self._replace(arrived=_Elsewhere(self.arrived, _first)), *args)


def _one_too_long(original):
    def attend(self, refs, *args, **kwargs):
        work = refs.work._replace(length=_Shifted(refs.work.length, 1))
        return original(self, refs._replace(work=work), *args, **kwargs)

    return attend


def _one_slot(original):
    def attend(self, refs, blocks, *args, **kwargs):
        return original(self, refs, [block._replace(slot=blocks[0].slot) for block in blocks], *args, **kwargs)

    return attend


def _none_empty(original):
    def are_short(self, refs, *args):
        work = refs.work._replace(count=_Shifted(refs.work.count, 1))
        return original(self, refs._replace(work=work), *args)

    return are_short


def _all_clean(original):
    return lambda self, *args: original(dataclasses.replace(self, is_clean=_Shifted(self.is_clean, 1)), *args)


def _wrong_place(original):
    return lambda self, refs, *args: original(
        self, refs._replace(out_buffer=_Elsewhere(refs.out_buffer, _next_item)), *args
    )


def _page_too_few(original):
    def of(cls, *args):
        visited = original(cls, *args)
        count = jnp.maximum(visited.count - 1, 0)
        return visited._replace(count=count, num_full=jnp.minimum(visited.num_full, count))

    return of


def _all_full(original):
    def of(cls, *args):
        visited = original(cls, *args)
        return visited._replace(num_full=visited.count)

    return of


def _tail_lost(original):
    def work(self, rows, entries, *, splits, **rest):
        done = original(self, rows, entries, splits=splits, **rest)
        is_last = jnp.arange(done.count.shape[0]) % splits == splits - 1
        count = jnp.where(is_last, jnp.maximum(done.count - 1, 0), done.count)
        busy = work_module._next_busy(count)
        return done._replace(count=count, num_full=jnp.minimum(done.num_full, count), busy=busy)

    return work


def _method(cls, name, mutant):
    def plant(patch):
        raw = cls.__dict__[name]
        if isinstance(raw, classmethod):
            patch.setattr(cls, name, classmethod(mutant(raw.__func__)))
        else:
            patch.setattr(cls, name, mutant(raw))

    return plant


def _all_of(*plants):
    return lambda patch: [plant(patch) for plant in plants]


def _parts_added_up(out, lse):
    return AttentionState(jnp.sum(out, axis=0), jnp.max(lse, axis=0))


# name: how to plant it, the case that kills it, and what is seen.
BUGS = {
    "no wait for pages": (_method(Transfers, "wait", _nothing), "late", "nan"),
    "no wait for the last pages": (_method(Transfers, "wait_for", _nothing), "late", "nan"),
    "no wait for queries": (_method(Decode, "_copy_queries", _without_waiting), "late", "nan"),
    "no wait for results": (_method(Decode, "_copy_results", _without_waiting), "early", "race"),
    "one semaphore for all slots": (
        _all_of(*(_method(Transfers, name, _one_semaphore) for name in ("start", "wait"))), "late, one a block", "nan",
    ),
    "results from the wrong place": (_method(Decode, "_copy_results", _wrong_place), "late", "race"),
    "j <= length": (_method(Decode, "_attend", _one_too_long), "late", "nan"),
    "values past the length not silenced": (_method(Transfers, "silence", _nothing), "late", "nan"),
    "values of empty places not silenced": (_method(Stream, "silence", _all_clean), "late", "nan"),
    "a page too few": (_method(Visited, "of", _page_too_few), "late", "wrong"),
    "partial pages taken for full": (_method(Visited, "of", _all_full), "late", "nan"),
    "cursor a block behind": (
        _method(Stream, "move_cursor", lambda move: lambda self, item, at: move(self, item, at - 1)),
        "early",
        "semaphore",
    ),
    "cursor a block ahead": (
        _method(Stream, "move_cursor", lambda move: lambda self, item, at: move(self, item, at + 1)),
        "late",
        "exception",
    ),
    "one slot for items together": (_method(Decode, "_attend", _one_slot), "together", "wrong"),
    "an item past the end together with the last": (
        _method(Decode, "_are_short", lambda short: lambda self, refs, item, end: short(self, refs, item, end + 1)),
        "together",
        "exception",
    ),
    "an empty item together with another": (
        _method(Decode, "_are_short", _none_empty), "together, one empty", "exception",
    ),
    "tail of a split lost": (_method(Visited, "work", _tail_lost), "split", "wrong"),
    "scale of keys for values": (
        _method(Launch, "_head_scales", lambda scales: lambda self, pages: scales(self, pages)[:1] * 2),
        "split",
        "wrong",
    ),
    "parts added up": (lambda patch: patch.setattr(launch_module, "_merge_parts", _parts_added_up), "split", "wrong"),
}  # fmt: skip


# Kin of others above, or slow to be seen: a kernel that never ends is stopped after some seconds.
_SLOW = ("no wait for the last pages", "partial pages taken for full", "cursor a block ahead", "parts added up")


def _attend(name, planted):
    """The case's attention on a chip of its own name, so that no trace of another is taken for it."""
    case, schedule, mode = SUITE[name]
    attend = interpreted(case.replace(corner="mixed"), schedule, mode)
    chip = dataclasses.replace(CHIPS["v4"], generation=planted)
    lowerings = tuple(low.on_chip(chip).interpreted(params(mode, schedule.cores)) for low in attend.lowerings)
    return dataclasses.replace(attend, lowerings=lowerings)


def _what_is_seen(attend, built):
    """What gives a bug away, or None."""
    try:
        assert_equals_reference(attend, built, patience=20.0)
    except KernelFault as fault:
        return str(fault).partition(":")[0]
    except AssertionError as error:
        return "nan" if "not finite" in str(error) or "has NaN" in str(error) else "wrong"
    except Exception as error:
        return f"exception: {error}"
    return None


@pytest.fixture(scope="module")
def builts():
    """Every case's arrays; their exact states are computed before any bug is planted."""
    built = {name: build(case) for name, (case, _, _) in SUITE.items()}
    return {name: (one, exact_state(one))[0] for name, one in built.items()}


@pytest.mark.parametrize("name", SUITE)
def test_the_suite_passes_without_a_bug(name, builts):
    assert _what_is_seen(_attend(name, "sound"), builts[name]) is None


@pytest.mark.parametrize("bug", [pytest.param(bug, marks=[pytest.mark.slow] * (bug in _SLOW)) for bug in BUGS])
def test_the_suite_kills(bug, builts, monkeypatch):
    plant, name, expected = BUGS[bug]
    plant(monkeypatch)
    assert (_what_is_seen(_attend(name, bug), builts[name]) or "nothing").startswith(expected)
