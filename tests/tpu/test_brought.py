"""What a batch brings, on the TPU decode kernel: numbers of a sequence, positions and ancestors of rows; masks by head.

Every run is interpreted and watched, over memory that is NaN wherever no live token lies, with garbage in the tables.
Slots without a token lie between others, and the last slot is dead or full.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower import Call, DecodeSchedule
from paged.lower.program import Sequences
from paged.lower.tpu import CHIPS
from paged.lower.tpu.base import STATE
from paged.lower.tpu.decode.plan import intervals_of, kernels_of
from paged.spec import (
    ALiBi,
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
from paged.testing import Case, Corner
from tests.tpu import brought
from tests.tpu.brought import (
    BY_HEAD,
    FLOATS,
    PLAIN,
    SLOPED,
    SLOPES,
    F,
    N,
    arrays,
    assert_close,
    assert_reference,
    far,
    ints,
    plain,
    rows_of,
)

from .interpreter import watched

CORNER = Corner(((2, 3), (0, 0), (4, 3), (0, 6), (5, 0)), (1,) * 5)
CASE = Case(spec=PLAIN, page_size=8, phase="decode", pages_per_seq=5, corner=CORNER)
INLINE = DecodeSchedule(pages_per_block=2, buffers=3)
GRID = DecodeSchedule(pages_per_block=1, buffers=2, sequence="grid")
TOGETHER = DecodeSchedule(pages_per_block=4, buffers=4)
SPLIT = DecodeSchedule(pages_per_block=1, buffers=2, kv_splits=2)


ONE = {"n": ints(3, 1, 9, 2, 17)}
STARTS, ENDS = ints((2, 9), (0, 0), (1, 20), (4, 11), (15, 38)), ints((6, 18), (3, 0), (4, 34), (6, 12), (29, 40))
AHEAD = {"n": ints(18, 5, 33, 4, 60)}  # numbers among the positions of the last rows, and past them
# What a spec has beside the plain one, what a batch brings, and whether the work needs no list of pages.
NUMBERS = {
    "window": ({"window": N}, ONE, True),
    "causal or prefix": ({"causal": False, "mask": Causal() | Prefix(N)}, AHEAD, True),
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
    "slopes, window, bias": (SLOPED, {**ONE, **SLOPES}, True),
}


def lowered(case, schedule=INLINE, *how):
    return brought.lowered(case, schedule, *how)


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
    "positions, some far below": {"window": 13},
    "positions, some far below, lists": {"mask": Segments((5, 11))},
}
# Query heads where they are not 4, of 2 KV heads; and rows whose copies arrive at once.
MANY_HEADS = {"window": 2, "spans": 10, "chunk": 10, "positions": 2, "value window": 8}
# Rows on a chip of two cores.
TWO_CORES = ("value window", "positions, some far below")
EAGER = ("segments", "chunk", "window", "tree", "per group")
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
    return {"positions": ints(*depths), "ancestors": ints(*words)}


def _own(name, case, values):
    named = {value.name for value in paged.lower(case.spec, case.layout, "xla").program.values}
    own = tree_of(case)
    if name.startswith("positions"):
        positions = np.random.default_rng(7).integers(-3, 50, len(own["positions"])).astype(np.int32)
        own = {"positions": np.where(np.arange(len(positions)) % 2, positions, positions - 2**21 * ("far" in name))}
    return {"values": {name: x for name, x in values.items() if name in named}, **own}


def _case(name, terms, rows=1, **facts):
    heads = PLAIN.replace(num_q_heads=MANY_HEADS.get(name, 4))
    return CASE.replace(spec=heads.replace(**terms), rows=rows, **facts)


def _mode(name):
    return "eager" if name in EAGER else "on_wait"


@pytest.mark.parametrize("name", rows_of(NUMBERS))
def test_a_number_for_each_sequence(name):
    terms, values, is_run = NUMBERS[name]
    # One row, the last of its sequence, has no key ahead.
    case = _case(name, terms, rows=4 if "causal" in terms else 1)
    attend = lowered(case, TOGETHER if name == "window" else INLINE, _mode(name))
    step = arrays(case, values=values)
    assert has_lists(attend, step) != is_run
    assert_reference(attend, case, step)
    assert_reference(attend, case, arrays(case, num_seqs=3, values=values))


@pytest.mark.kernels
@pytest.mark.parametrize("make", [lambda n: {"window": n}, lambda n: {"mask": Chunk(n)}], ids=["window", "chunk"])
def test_a_number_is_the_static_number(make):
    """Bitwise, whichever sequence has it."""
    case, numbers = CASE.replace(spec=PLAIN.replace(**make(N))), ints(17, 1, 9, 9, 17)
    got = watched(lowered(case).state, *arrays(case, values={"n": numbers}))
    for number in (9, 17):
        static = CASE.replace(spec=PLAIN.replace(**make(number)))
        want, own = watched(lowered(static).state, *arrays(static)), numbers == number
        np.testing.assert_array_equal(got.out[own], want.out[own])
        np.testing.assert_array_equal(got.lse[own], want.lse[own])


@pytest.mark.parametrize("name", rows_of(BY_HEAD))
def test_masks_by_head(name):
    """Heads of one page block differ, in tiles of a head, in paired tiles and in a tile of all heads."""
    facts = {"where": {"order": "interleaved"}, "per group": INT8, "per head": {"order": "split"}}.get(name, {})
    case = _case(name, {"mask": BY_HEAD[name]}, rows=2, **facts)
    assert_reference(lowered(case, GRID if name == "not" else INLINE, _mode(name)), case, arrays(case))


@pytest.mark.kernels
def test_heads_of_paired_tiles_differ():
    case = _case("", {"mask": BY_HEAD["per head"], "head_dim": 128}, rows=2)
    assert_reference(lowered(case), case, arrays(case))


@pytest.mark.parametrize("name", rows_of(OWN, fast=("tree",)))
def test_positions_and_trees(name):
    case = _case(name, OWN[name], rows=4, **(INT8 if name in ("value window", "segments") else {}))
    schedule = {"tree": TOGETHER, "window": GRID, "prefix": SPLIT}.get(name, INLINE)
    cores, generation = (2, "v5p") if name in TWO_CORES else (1, "v6e")
    attend = lowered(case, schedule.replace(cores=cores), _mode(name), generation)
    own = _own(name, case, {**ONE, "a": STARTS})
    step = arrays(case, **own)
    assert has_lists(attend, step) == ("mask" in OWN[name] and "Segments" in repr(OWN[name]["mask"]))
    assert_reference(attend, case, step)
    assert_reference(attend, case, arrays(case, num_seqs=3, **own))


@pytest.mark.kernels
@pytest.mark.parametrize("terms", [{"window": 20}, {"mask": Segments((5, 11)) & Window(20)}], ids=["run", "lists"])
def test_a_chain_as_a_tree_is_the_chain(terms):
    """Bitwise. A page that all rows of the chain see in full holds one of the step's own tokens.

    Without a factor of the products, which XLA contracts with the sum behind it where no mask is between.
    """
    spec = PLAIN.replace(scale=1.0, **terms)
    case, schedule = CASE.replace(spec=spec, rows=4), INLINE.replace(pages_per_block=1)
    tree = case.replace(spec=spec.replace(mask=Tree() if spec.mask is None else Tree() & spec.mask))
    step = arrays(tree, **tree_of(tree, [[-1, 0, 1, 2]] * 5))
    got, want = watched(lowered(tree, schedule).state, *step), watched(lowered(case, schedule).state, *arrays(case))
    np.testing.assert_array_equal(got.out, want.out)
    np.testing.assert_array_equal(got.lse, want.lse)


@pytest.mark.kernels
def test_pages_between_a_prefix_and_the_own_tokens_hold_anything():
    case = CASE.replace(spec=PLAIN.replace(causal=False, mask=Prefix(9) & Tree()), rows=4)
    q, pages, batch = arrays(case, **tree_of(case))
    nobodys = sorted(set(range(pages.num_pages)) - set(np.asarray(batch.block_tables).ravel().tolist()))[0]
    table = batch.block_tables.at[4, 2].set(nobodys).at[4, 3].set(-1).at[2, 2].set(2**31 - 1)
    assert_reference(lowered(case), case, (q, pages, dataclasses.replace(batch, block_tables=table)))


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["window", "segments"])
def test_scalar_memory_that_holds_two_sequences(name):
    """Several kernels, each with what is brought for its own sequences; and sinks."""
    terms, values, _ = NUMBERS[name]
    spec = PLAIN.replace(sinks=True, **{**terms, "mask": Tree() & terms["mask"] if "mask" in terms else Tree()})
    case = CASE.replace(spec=spec, rows=4)
    attend = lowered(case)
    step = (*arrays(case, values=values, **tree_of(case)), jnp.asarray([1.0, -2.0, 0.5, 3.0]))
    call, wanted = Call.of(*step[:3]), reference_state(spec, *step)
    for smem in range(300, 3000, 20):
        chip = dataclasses.replace(CHIPS["v6e"], smem_bytes=smem)
        if kernels_of(attend.program, attend.layout, call, INLINE, chip) == 3:
            break
    small = dataclasses.replace(attend, lowerings=(dataclasses.replace(attend.lowerings[0], chip=chip),))
    got = watched(small.state, *step)
    assert_close(got, wanted)


@pytest.mark.kernels
def test_an_update_writes_by_places_and_attends_by_positions():
    case = CASE.replace(spec=PLAIN.replace(window=N, mask=Tree()), rows=4)
    q, pages, batch = arrays(case, values=ONE, **tree_of(case))
    built = plain(case.replace(spec=PLAIN))
    out, written = watched(lowered(case).update, q, built.k, built.v, pages, batch)
    np.testing.assert_array_equal(written.arrays[0], paged.write(built.k, built.v, pages, batch).arrays[0])
    np.testing.assert_allclose(out, reference_state(case.spec, q, written, batch).out, rtol=1e-4, atol=5e-5)


@pytest.mark.kernels
def test_single_rows_anywhere_among_others():
    """What the lowering for prompts leaves to this kernel."""
    case = CASE.replace(spec=PLAIN.replace(window=N, mask=Tree(), scores=(ALiBi(),)), phase="ragged", tokens=12)
    case = case.replace(corner=dataclasses.replace(CORNER, rows=(1, 1, 4, 1, 2)))
    q, pages, batch = arrays(case, values=ONE)
    positions = np.random.default_rng(1).integers(0, 40, 12).astype(np.int32)
    batch = dataclasses.replace(batch, positions=positions, ancestors=ints(*[[3]] * 12))
    seqs = Sequences.of(batch, 12, 8)
    alone = seqs._replace(counts=(seqs.counts == 1).astype(jnp.int32))
    attend, call = lowered(CASE.replace(spec=case.spec)), Call.of(q, pages, batch)
    got = watched(attend.lowerings[0].run_single_rows, attend.program, INLINE, call, STATE, q, pages, None, alone)
    want, rows = reference_state(case.spec, q, pages, batch), ints(0, 1, 6)
    np.testing.assert_allclose(got.out[rows], want.out[rows], rtol=1e-4, atol=5e-5)
