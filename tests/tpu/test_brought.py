"""What a batch brings, on the TPU decode kernel: numbers of a sequence, positions and ancestors of rows; masks by head.

Every run is interpreted and watched, over memory that is NaN wherever no live token lies, with garbage in the tables.
Slots without a token lie between others, and the last slot is dead or full.
"""

import dataclasses
import functools

import numpy as np
import pytest

import paged
from paged.lower import Call, DecodeSchedule
from paged.lower.tpu.decode.plan import intervals_of
from paged.spec import (
    ALiBi,
    AttentionSpec,
    Bias,
    Causal,
    Chunk,
    Everything,
    PerHead,
    Prefix,
    Segments,
    Spans,
    Tree,
    Value,
    Where,
    Window,
    reference_state,
)
from paged.testing import Case, Corner, build, interpreted
from tests.support.specs import real

from .interpreter import watched

CORNER = Corner(((2, 3), (0, 0), (4, 1), (0, 6), (5, 0)), (1,) * 5)
PLAIN = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
CASE = Case(spec=PLAIN, page_size=8, phase="decode", pages_per_seq=5, corner=CORNER)
INLINE = DecodeSchedule(pages_per_block=2, buffers=3)
GRID = DecodeSchedule(pages_per_block=1, buffers=2, sequence="grid")
TOGETHER = DecodeSchedule(pages_per_block=4, buffers=4)
SPLIT = DecodeSchedule(pages_per_block=1, buffers=2, kv_splits=2)


def by_head(p, j, h):
    return (p - j) % 5 != h % 4


def far(p, j, most):
    return p - j >= most


def slanted(p, j, h, slope):
    return slope * real(j - p) * real(h + 1)


def _ints(*rows):
    return np.array(rows, np.int32)


N, F = Value("n"), Value("f", dtype="float32")
ONE = {"n": _ints(3, 1, 9, 2, 17)}
FLOATS = {"f": np.array([2.0, 1.0, 0.5, 3.0, 30.0], np.float32)}
STARTS, ENDS = _ints((2, 9), (0, 0), (1, 20), (4, 11), (15, 38)), _ints((6, 18), (3, 0), (4, 30), (5, 12), (29, 40))
SLOPES = np.linspace(-1, 2, 20, dtype=np.float32).reshape(5, 4)
# What a spec has beside the plain one, what a batch brings, and whether the work needs no list of pages.
NUMBERS = {
    "window": ({"window": N}, ONE, True),
    "causal or prefix": ({"causal": False, "mask": Causal() | Prefix(N)}, ONE, True),
    "prefix": ({"causal": False, "mask": Prefix(N)}, ONE, True),
    "chunk": ({"mask": Chunk(N)}, ONE, False),
    "where": ({"mask": Where(far, values=(N,))}, ONE, True),
    "spans": (
        {"causal": False, "mask": Causal() | Spans(Value("a", 2), Value("b", 2))},
        {"a": STARTS, "b": ENDS},
        False,
    ),
    "segments": ({"mask": Segments(Value("a", 2))}, {"a": STARTS}, False),
    "soft cap": ({"soft_cap": F}, FLOATS, True),
    "slopes, window, bias": (
        {"window": N, "scores": (ALiBi(Value("m", 4, "float32")), Bias(slanted, values=(F,)))},
        {"m": SLOPES, **ONE, **FLOATS},
        True,
    ),
}
BY_HEAD = {
    "where": Where(by_head),
    "per head": PerHead((Window(2), Everything(), Chunk(6), Window(20))),
    "per group": PerHead((Window(2), Prefix(9))),
    "not": ~PerHead((Window(2), Where(by_head), Prefix(3), Everything())),
}


def lowered(case, schedule=INLINE, mode="on_wait", generation="v6e"):
    attend = paged.lower(case.spec, case.layout, "tpu", schedule=schedule).on_chip(generation)
    return interpreted(attend, mode)


@functools.cache
def _plain(case):
    return build(
        case.replace(spec=PLAIN.replace(num_q_heads=case.spec.num_q_heads, num_kv_heads=case.spec.num_kv_heads))
    )


def arrays(case, num_seqs=5, **brought):
    """Queries, pages and a batch of a case, whose values do not depend on its terms."""
    built = _plain(case.replace(spec=case.spec.replace(mask=None, window=None, soft_cap=None, scores=(), causal=True)))
    return built.q, built.pages, dataclasses.replace(built.batch, num_seqs=num_seqs, **brought)


def assert_reference(attend, case, step):
    got, want = watched(attend.state, *step), reference_state(case.spec, *step)
    np.testing.assert_allclose(got.out, want.out, rtol=1e-4, atol=5e-5)
    np.testing.assert_allclose(got.lse, want.lse, rtol=1e-4, atol=5e-5)
    return got


def has_lists(attend, step):
    call, chip = Call.of(*step), attend.lowering.target_chip
    return intervals_of(attend.program, attend.layout, call, attend.schedule, chip) is None


PARENTS = ([-1, 0, 0, 1], [-1, 0, 1, 2], [-1, -1, 1, 0], [-1, 0, 1, 1], [-1, -1, -1, 2])
# Trees of drafted tokens, and positions that say anything, over page blocks of each phase.
OWN = {
    "tree": {"mask": Tree()},
    "window": {"window": 13, "mask": Tree(), "scores": (ALiBi(),)},
    "value window": {"window": N, "mask": Tree()},
    "soft cap, by head": {"soft_cap": 20.0, "mask": Tree() & PerHead((Window(20), Everything()))},
    "prefix": {"causal": False, "mask": Prefix(9) & Tree()},
    "segments": {"mask": Segments(Value("a", 2)) & Tree()},
    "positions": {"window": 13, "scores": (ALiBi(),)},
    "positions, not window": {"mask": ~Window(7)},
}
INT8 = {"dtype": "int8", "scales": "token"}


def tree_of(case, parents=PARENTS):
    """Positions and ancestors of a case's rows: those of a tree for each sequence."""
    lengths, rows, _ = case.values()
    words, depths = [], []
    for length, own in zip(lengths, parents, strict=True):
        of_seq, depth = [], []
        for i, parent in enumerate(own):
            of_seq.append((0 if parent < 0 else of_seq[parent]) | 1 << i)
            depth.append(0 if parent < 0 else depth[parent] + 1)
        words += of_seq
        depths += [length - len(own) + d for d in depth]
    assert rows == [len(own) for own in parents]
    return {"positions": _ints(*depths), "ancestors": _ints(*words)}


def _brought(name, case, values):
    named = {value.name for value in paged.lower(case.spec, case.layout, "xla").program.values}
    own = tree_of(case)
    if name.startswith("positions"):
        own = {"positions": np.random.default_rng(7).integers(-3, 50, len(own["positions"])).astype(np.int32)}
    return {"values": {name: x for name, x in values.items() if name in named}, **own}


def _rows(table, fast):
    return [pytest.param(name, marks=[] if name in fast else pytest.mark.kernels) for name in table]


@pytest.mark.parametrize("name", _rows(NUMBERS, ("causal or prefix",)))
def test_a_number_for_each_sequence(name):
    terms, values, is_run = NUMBERS[name]
    case = CASE.replace(spec=PLAIN.replace(**terms))
    attend = lowered(case, TOGETHER if name == "window" else INLINE)
    step = arrays(case, values=values)
    assert has_lists(attend, step) != is_run
    assert_reference(attend, case, step)
    assert_reference(attend, case, arrays(case, num_seqs=3, values=values))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.kernels) for name in BY_HEAD])
def test_masks_by_head(name):
    """Heads of one page block differ, in tiles of a head, in paired tiles and in a tile of all heads."""
    facts = {"where": {"order": "interleaved"}, "per group": {"dtype": "int8", "scales": "token"}}.get(name, {})
    case = CASE.replace(spec=PLAIN.replace(mask=BY_HEAD[name]), rows=2, **facts)
    assert_reference(lowered(case, GRID if name == "not" else INLINE), case, arrays(case))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "tree" else pytest.mark.kernels) for name in OWN]
)
def test_positions_and_trees(name):
    case = CASE.replace(
        spec=PLAIN.replace(**OWN[name]), rows=4, **(INT8 if name in ("value window", "segments") else {})
    )
    schedule = {"tree": TOGETHER, "window": GRID, "prefix": SPLIT}.get(name, INLINE)
    attend, brought = lowered(case, schedule), _brought(name, case, {**ONE, "a": STARTS})
    step = arrays(case, **brought)
    assert has_lists(attend, step) == (name == "segments")
    assert_reference(attend, case, step)
    assert_reference(attend, case, arrays(case, num_seqs=3, **brought))
