"""What a batch brings, on the TPU kernel for prompts: numbers, positions and ancestors; and masks by head.

Every run is interpreted and watched, over memory that is NaN wherever no live token lies, with garbage in the tables.
Sequences have several tiles, less than one, one row and none. A block has fewer pages than the longest sequence.
"""

import itertools

import numpy as np
import pytest

from paged.lower import Call, DecodeSchedule, Program, RaggedSchedule
from paged.lower.tpu.prefill.intervals import intervals_of
from paged.spec import (
    ALiBi,
    Causal,
    Chunk,
    Everything,
    Given,
    PerHead,
    Prefix,
    Segments,
    Spans,
    Tree,
    Value,
    Where,
    Window,
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
    assert_reference,
    by_head,
    far,
    ints,
    rows_of,
)

from .interpreter import MODES, watched

CORNER = Corner(((19, 3), (0, 0), (4, 1), (0, 6), (17, 0)), (20, 3, 4, 1, 9))
CASE = Case(spec=PLAIN, page_size=8, phase="ragged", pages_per_seq=20, tokens=40, corner=CORNER)
SCHEDULE = RaggedSchedule(pages_per_block=16, rows_per_tile=16, buffers=2)


ONE = {"n": ints(30, 1, 9, 2, 7)}
STARTS = ints((2, 90), (0, 0), (1, 20), (4, 11), (133, 3))
ENDS = ints((60, 153), (3, 0), (4, 33), (5, 12), (136, 20))
# What a spec has beside the plain one, what a batch brings, and whether the work needs no list of pages.
NUMBERS = {
    "window": ({"window": N}, ONE, True),
    "causal or prefix": ({"causal": False, "mask": Causal() | Prefix(N)}, ONE, True),
    "spans": (
        {"causal": False, "mask": Causal() | Spans(Value("a", 2), Value("b", 2))},
        {"a": STARTS, "b": ENDS},
        False,
    ),
    "segments": ({"mask": Segments(Value("a", 2))}, {"a": STARTS}, False),
    "chunk, soft cap": ({"mask": Chunk(N), "soft_cap": F}, {**ONE, **FLOATS}, False),
    "slopes, window, bias": (SLOPED, {**ONE, **SLOPES}, True),
}


def lowered(case, schedule=SCHEDULE, *how):
    return brought.lowered(case, schedule, *how)


def has_lists(attend, step):
    call, chip = Call.of(*step), attend.lowering.target_chip
    return intervals_of(attend.program, attend.layout, call, attend.schedule.rows_per_tile, chip) is None


@pytest.mark.parametrize("name", rows_of(NUMBERS))
def test_a_number_for_each_sequence(name):
    terms, values, is_run = NUMBERS[name]
    case = CASE.replace(spec=PLAIN.replace(**terms))
    attend, step = lowered(case), arrays(case, values=values)
    assert has_lists(attend, step) != is_run
    assert_reference(attend, case, step)


POOLS = {
    "where": {"order": "interleaved"},
    "per head": {"dtype": "int8", "scales": "token"},
    "per group": {},
    "not": {"order": "split"},
}


def test_heads_that_are_known_to_have_the_same_mask():
    """Runs of heads of one mask; where several terms differ by head, runs of all of them."""
    sixteen, two, four = PLAIN.replace(num_q_heads=16), PerHead((Window(2), Causal())), PerHead((Window(2),) * 4)
    runs = {two: 8, four: 4, two & four: 4, two & ~four: 4, two & Where(by_head): 1, Where(far, values=(N,)): 16}
    assert {mask: Program.from_spec(sixteen.replace(mask=mask)).heads_alike for mask in runs} == runs


@pytest.mark.parametrize("name", rows_of(BY_HEAD))
def test_masks_by_head(name):
    """Pages that one head sees are read for all; strips of another head see nothing of them."""
    heads = 40 if name == "where" else 4  # more than one word has bits for
    case = CASE.replace(spec=PLAIN.replace(mask=BY_HEAD[name], num_q_heads=heads), **POOLS[name])
    assert_reference(lowered(case), case, arrays(case))


def own_rows(case, seed=0):
    """Positions and ancestors of random trees: a row follows a row before it, or the tokens before the step."""
    rng, lengths, rows, _ = np.random.default_rng(seed), *case.values()
    starts, positions, words = np.cumsum([0, *rows]), np.zeros(case.tokens, int), np.zeros((case.tokens, 2), np.uint32)
    for s, n in enumerate(rows):
        for i in range(n):
            parent = rng.integers(-1, i)
            row, before = starts[s] + i, starts[s] + parent
            positions[row] = lengths[s] - n if parent < 0 else positions[before] + 1
            words[row] = 0 if parent < 0 else words[before]
            words[row, i // 32] |= np.uint32(1 << i % 32)
    return {"positions": positions, "ancestors": words}


OWN = {
    "tree": {"mask": Tree()},
    "tree, window": {"mask": Tree(), "window": N},
    "tree, chunk or prefix": {"mask": Tree() & (Chunk(40) | Prefix(9))},
    "tree, slopes, cap": {"mask": Tree(), "window": 9, "scores": (ALiBi(),), "soft_cap": 20.0},
    "tree, per head": {"mask": PerHead((Window(9), Everything())) & Tree()},
}


# Each of these meets one mode before the slow tests, and `tree, window` both.
LAST = (("tree", "on_wait"), ("tree, chunk or prefix", "eager"), ("tree, slopes, cap", "on_wait"))
LAST += (("tree, per head", "eager"),)


@pytest.mark.parametrize(("name", "mode"), rows_of(itertools.product(OWN, MODES), slow=LAST))
def test_trees(name, mode):
    """Also where the sequence of one row goes to the decode kernel, and two cores share the tiles of groups of four."""
    pool = {"tree, chunk or prefix": {"dtype": "int8", "scales": "token"}, "tree, per head": {"order": "interleaved"}}
    case = CASE.replace(spec=PLAIN.replace(**OWN[name]), **pool.get(name, {}))
    values = {"values": ONE} if name == "tree, window" else {}
    schedule = SCHEDULE.replace(single_rows=DecodeSchedule(pages_per_block=2)) if mode == "eager" else SCHEDULE
    generation = "v6e"
    if name == "tree":
        case, generation = case.replace(spec=case.spec.replace(num_q_heads=8)), "v5p"
        schedule = schedule.replace(cores=2)
    assert_reference(lowered(case, schedule, mode, generation), case, arrays(case, **own_rows(case), **values))


# Own keys in pages that straddle 128 lanes, in pages of several times 128 keys, and rows past the first 128 of a batch.
SIZES = {
    "24": (24, Corner(((6, 3), (0, 9), (2, 1), (0, 6), (5, 0)), (50, 3, 40, 60, 29)), {"rows_per_tile": 32}),
    "256": (256, Corner(((1, 3), (0, 9), (1, 200), (0, 6), (2, 0)), (40, 3, 90, 6, 43)), {"pages_per_block": 1}),
}


TERMS = {
    "window": {"window": 30, "scores": (ALiBi(),)},
    "spans": {"mask": Causal() | Spans((3, 30), (20, 90)), "causal": False},
}


@pytest.mark.kernels
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("size", SIZES)
def test_positions_of_rows(size, term):
    """Any positions, also of keys: on page intervals, and on lists."""
    page_size, corner, schedule = SIZES[size]
    spec = PLAIN.replace(**TERMS[term])
    case = CASE.replace(spec=spec, page_size=page_size, pages_per_seq=7, tokens=190, corner=corner)
    positions = np.random.default_rng(3).integers(-5, 170, 190)
    attend, step = lowered(case, SCHEDULE.replace(**schedule)), arrays(case, positions=positions)
    assert has_lists(attend, step) == (term == "spans")
    assert_reference(attend, case, step)


@pytest.mark.kernels
@pytest.mark.parametrize(("window", "rows_per_tile"), [(None, 32), (30, 16)])
def test_a_chain_as_a_tree_is_the_chain(window, rows_per_tile):
    """Bitwise, without a factor of the products: XLA contracts it with the sum behind it where no mask is between."""
    case = CASE.replace(spec=PLAIN.replace(window=window, scale=1.0))
    chain = np.concatenate([np.array([(1 << (i + 1)) - 1 for i in range(n)]) for n in CORNER.rows] + [np.zeros(3, int)])
    chain = np.stack([chain & 0xFFFFFFFF, chain >> 32], axis=1).astype(np.uint32)
    schedule = SCHEDULE.replace(rows_per_tile=rows_per_tile)
    want = watched(lowered(case, schedule).state, *arrays(case))
    tree = case.replace(spec=case.spec.replace(mask=Tree()))
    got = watched(lowered(tree, schedule).state, *arrays(tree, ancestors=chain))
    np.testing.assert_array_equal(got.out, want.out)
    np.testing.assert_array_equal(got.lse, want.lse)


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["window", "spans"])
def test_a_batch_with_numbers_is_each_sequence_with_the_static_mask(name):
    """Bitwise."""
    terms, values, _ = NUMBERS[name]
    case = CASE.replace(spec=PLAIN.replace(**terms))
    got = watched(lowered(case).state, *arrays(case, values=values))
    for s in (0, 4):
        numbers = {name: int(x[s]) if x.ndim == 1 else tuple(x[s].tolist()) for name, x in values.items()}
        static = case.replace(spec=case.spec.replace(**_static(terms, numbers)))
        want, rows = watched(lowered(static).state, *arrays(static)), slice(*np.cumsum([0, *CORNER.rows])[s : s + 2])
        np.testing.assert_array_equal(got.out[rows], want.out[rows])
        np.testing.assert_array_equal(got.lse[rows], want.lse[rows])


def _static(terms, numbers):
    """Terms with Python numbers in place of values."""
    return {name: term if isinstance(term, bool) else _with_numbers(term, numbers) for name, term in terms.items()}


def _with_numbers(term, numbers):
    return numbers[term.name] if isinstance(term, Value) else term.given(Given(numbers))
