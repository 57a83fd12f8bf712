"""The TPU lowering for prompts and mixed batches equals the reference, crossed in pairs, as `test_interpreted` does.

A row of the table is one kernel and runs on a few corners of a batch's values. The first rows run always; with
``-m "slow or not slow"`` all do.
"""

import itertools

import pytest

from paged.lower import Schedule
from paged.spec import AttentionSpec
from tests.support import Case, build
from tests.support.pairs import covering_rows

from .interpreter import MODES, assert_equals_reference, interpreted
from .test_interpreted import CORNER_SETS, TERMS, is_taken
from .test_interpreted import FACTORS as DECODE_FACTORS

FAST_ROWS = 6
# And the first with two buffers and whole blocks one after the other, which once waited for what nobody had asked for.
ALSO_FAST = 8
FACTORS = {
    "corners": CORNER_SETS,
    "terms": tuple(TERMS),
    "pool": DECODE_FACTORS["pool"],
    "heads": ((4, 2), (3, 1), (8, 8), (10, 2), (8, 1)),
    "order": DECODE_FACTORS["order"],
    "head_dim": (8, 64, 80, 128, 256),
    "q_dtype": DECODE_FACTORS["q_dtype"],
    "page_size": (8, 24, 64, 128),
    # How sequences' rows are given, and how many: a ragged batch takes them from its corner.
    "rows": (("ragged", 0), ("prefill", 40), ("decode", 5)),
    "blocks": (1, 2),  # of as few tokens as are whole lanes
    "query_rows": (16, 64),
    "buffers": (2, 3),
    "cores": (1, 2),
    "mode": MODES,
}
ROWS = covering_rows(FACTORS, is_allowed=is_taken)
_LEAST_PAGES = {8: 16, 24: 16, 64: 2, 128: 1}


def case_of_row(row) -> Case:
    """The case that a row of the table stands for, in its first corner."""
    heads, kv_heads = row["heads"]
    terms, (phase, rows) = TERMS[row["terms"]], row["rows"]
    dtype, _, scales = row["pool"].partition(" ")
    return Case(
        spec=AttentionSpec(num_q_heads=heads, num_kv_heads=kv_heads, head_dim=row["head_dim"], **terms),
        page_size=row["page_size"],
        order=row["order"],
        dtype=dtype,
        scales=scales or None,
        q_dtype=row["q_dtype"],
        phase=phase,
        rows=rows or 1,
        sink_shape=(heads,) if terms.get("sinks") else None,
        corner=row["corners"][0],
    )


def schedule_of_row(row) -> Schedule:
    """The schedule that a row stands for."""
    names = ("query_rows", "buffers", "cores")
    pages = row["blocks"] * _LEAST_PAGES[row["page_size"]]
    return Schedule(lowering="tpu-ragged", pages_per_block=pages, **{name: row[name] for name in names})


def _marked(i, row):
    name = "-".join(str(value) for value in list(row.values())[1:])
    return pytest.param(row, id=name, marks=[pytest.mark.slow] if i >= FAST_ROWS and i != ALSO_FAST else [])


@pytest.mark.parametrize("row", [_marked(i, row) for i, row in enumerate(ROWS)])
def test_any_two_features_together_equal_the_reference(row):
    case = case_of_row(row)
    attend = interpreted(case, schedule_of_row(row), row["mode"])
    for corner in row["corners"]:
        assert_equals_reference(attend, build(case.replace(corner=corner)))


def test_the_table_covers_every_pair_that_is_taken():
    for a, b in itertools.combinations(FACTORS, 2):
        wanted = {(x, y) for x in FACTORS[a] for y in FACTORS[b] if is_taken({a: x, b: y})}
        assert {(row[a], row[b]) for row in ROWS} == wanted, (a, b)


def test_the_rows_that_always_run_have_every_level():
    fast = ROWS[:FAST_ROWS]
    missing = {(name, x) for name, levels in FACTORS.items() for x in levels} - {
        (name, row[name]) for row in fast for name in FACTORS
    }
    assert not missing
