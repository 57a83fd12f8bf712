"""Planted bugs of the prefill kernel and of the lowering around it, which the tests must see: see `planting`."""

import dataclasses
import inspect

import jax.numpy as jnp
import pytest

from paged.lower import DecodeSchedule, RaggedSchedule
from paged.lower.tpu.decode import TpuDecode
from paged.lower.tpu.pages.stream import Stream
from paged.lower.tpu.pages.transfer import Transfers
from paged.lower.tpu.pages.work import TileVisits
from paged.lower.tpu.prefill import lowering as lowering_module
from paged.lower.tpu.prefill import tile as tile_module
from paged.lower.tpu.prefill.block import Block, BlockKernel
from paged.lower.tpu.prefill.kernel import PrefillKernel
from paged.lower.tpu.prefill.launch import PrefillLaunch
from paged.lower.tpu.prefill.shape import TileShape
from paged.lower.tpu.prefill.tile import TileKernel
from paged.spec import AttentionState
from tests.support import Case, Corner
from tests.support.specs import PLAIN

from .planting import (
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

_MHA = PLAIN.replace(num_q_heads=2)
_LONG = Corner(((2, 1), (0, 9), (3, 0), (1, 0), (4, -1)), (17,) * 5)


def _case(**facts):
    return Case(**{"spec": _MHA, "page_size": 128, "phase": "decode", "rows": 17, "corner": _LONG, **facts})


def _schedule(pages_per_block=1, buffers=3):
    single_rows = DecodeSchedule(pages_per_block=pages_per_block)
    return RaggedSchedule(pages_per_block=pages_per_block, rows_per_tile=16, buffers=buffers, single_rows=single_rows)


# name: case, schedule, how transfers run. Two strip groups per tile, and two tiles per sequence, of 16 rows and of one.
# Without a causal mask the length is all that hides what lies past it.
SUITE = {
    "late": (_case(spec=_MHA.replace(causal=False)), _schedule(), "on_wait"),
    "early": (_case(), _schedule(), "eager"),
    "half blocks": (_case(spec=_MHA.replace(causal=False), page_size=64), _schedule(2), "on_wait"),
    "interleaved": (_case(order="interleaved"), _schedule(), "on_wait"),
    "mixed": (_case(page_size=64, phase="ragged", corner="mixed"), _schedule(2, 2), "on_wait"),
}


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
        work = refs.stream.work._replace(length=Shifted(refs.stream.work.length, 1))
        original(self, refs._replace(stream=dataclasses.replace(refs.stream, work=work)), *args)

    return find_visible


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


def _a_row_too_far(original):
    def cut(*args):
        tiles = original(*args)
        return tiles._replace(starts=tiles.starts + 1)

    return cut


def _a_position_too_far(original):
    def cut(*args):
        tiles = original(*args)
        return tiles._replace(positions=tiles.positions + 1)

    return cut


def _of_the_next_slot(original):
    def run_state(self, *args):
        return AttentionState(*(jnp.roll(x, 1, axis=0) for x in original(self, *args)))

    return run_state


def _a_row_before(original):
    return lambda self, rows: original(self, rows._replace(out=jnp.roll(rows.out, 1, axis=0)))


def _of_keys_only(original):
    def cut(*args):
        tiles = original(*args)
        return tiles._replace(counts=jnp.where(tiles.lengths > 0, tiles.counts, 0))

    return cut


def _cleared_at_first_only(patch):
    clear = TileKernel._clear

    def every_group(self, refs):
        for strip_group in range(self.shape.strip_groups):
            clear(self, refs, strip_group)

    patch.setattr(TileKernel, "clear", every_group)
    patch.setattr(TileKernel, "_clear", lambda self, refs, strip_group: None)


def _attribute(owner, name, mutant):
    return lambda patch: patch.setattr(owner, name, mutant(getattr(owner, name)))


# name: how to plant the bug, the case that kills it, and how it shows.
BUGS = {
    "the next whole block is not waited for": (_impatient, "late", "nan"),
    "no wait for results": (method(TileKernel, "run", _not_waiting_before_results), "early", "race"),
    "scores of all strip groups in one half": (
        all_of(*(method(BlockKernel, step, _in_the_first_half) for step in ("score", "weigh"))), "late", "wrong",
    ),
    "first scores of the next block from this one": (
        _attribute(tile_module, "_choose", lambda _: lambda condition, yes, no: yes), "late", "wrong",
    ),
    "decoded rows of the next slot": (method(TpuDecode, "run_state", _of_the_next_slot), "mixed", "wrong"),
    "no wait for whole blocks": (method(Transfers, "wait", nothing), "late", "nan"),
    "no wait for blocks of few pages": (method(Transfers, "wait_for", nothing), "late", "nan"),
    "no wait for queries": (method(PrefillKernel, "_queries", never_awaited), "late", "nan"),
    "no wait for any results": (method(PrefillKernel, "_results", never_awaited), "early", "race"),
    "j <= length": (method(BlockKernel, "find_visible", _one_too_long), "late", "nan"),
    "no mask": (method(BlockKernel, "_visible", lambda visible: lambda *args: jnp.bool_(True)), "early", "nan"),
    "values past the length not zeroed": (method(Transfers, "zero_dead_values", nothing), "late", "nan"),
    "values of places without a page not zeroed": (
        method(Stream, "zero_dead_values", none_filled), "half blocks", "nan",
    ),
    "a page too few": (method(TileVisits, "of", page_too_few), "early", "wrong"),
    "partial pages taken for full": (method(TileVisits, "of", all_full), "early", "nan"),
    "keys of another head": (method(BlockKernel, "_stored", _of_the_other_head), "early", "wrong"),
    "results of another head": (method(TileShape, "q_head_of", _results_of_the_other_head), "early", "wrong"),
    "tiles a row too far": (_attribute(lowering_module, "cut", _a_row_too_far), "early", "exception"),
    "tiles a position too far": (_attribute(lowering_module, "cut", _a_position_too_far), "early", "wrong"),
    "no tiles for rows of no sequence": (_attribute(lowering_module, "cut", _of_keys_only), "mixed", "nan"),
    "the next block is deinterleaved over this one": (
        _attribute(tile_module, "Block", lambda _: _one_half), "interleaved", "wrong",
    ),
    "the state is never cleared": (method(TileKernel, "clear", nothing), "early", "nan"),
    "the state of the tile before": (_cleared_at_first_only, "early", "nan"),
    "results of the row before": (method(PrefillLaunch, "results_of", _a_row_before), "mixed", "nan"),
}  # fmt: skip
_FAST = tuple(BUGS)[:3]
_FAST_SUITE = ("late",)


@pytest.fixture(scope="module")
def builts():
    return built_of(SUITE)


def _marked(names, fast):
    return [pytest.param(name, marks=[] if name in fast else [pytest.mark.kernels]) for name in names]


@pytest.mark.parametrize("name", _marked(SUITE, _FAST_SUITE))
def test_the_suite_passes_without_a_bug(name, builts):
    assert_sound(name, SUITE, builts)


@pytest.mark.parametrize("bug", _marked(BUGS, _FAST))
def test_the_suite_kills(bug, builts, monkeypatch):
    assert_killed(bug, SUITE, builts, BUGS[bug], monkeypatch)
