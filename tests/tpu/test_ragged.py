"""The TPU lowering for prompts and mixed batches equals the reference, for any two features together.

The table is made like that of `test_interpreted`. A row of it is one kernel, which runs on a few corners of a batch's
values. `make test` runs one row. `make test-kernels` runs the first rows, which hold every level of every feature.
`make test-slow` runs all rows.
"""

import pytest

from paged.lower import DecodeSchedule, RaggedSchedule
from tests.support import build
from tests.support.pairs import assert_every_level, assert_every_pair_meets, covering_rows

from .interpreter import MODES, assert_equals_reference, interpreted
from .test_interpreted import CORNER_SETS, TERMS, case_of_row, is_taken, marked
from .test_interpreted import FACTORS as DECODE_FACTORS

FIRST_ROWS = 6
FAST = (3,)
FACTORS = {
    "corners": CORNER_SETS,
    "terms": tuple(TERMS),
    "pool": DECODE_FACTORS["pool"],
    "heads": ((4, 2), (3, 1), (8, 8), (10, 2), (8, 1)),
    "order": DECODE_FACTORS["order"],
    "head_dim": (8, 64, 80, 128, 256),
    "q_dtype": DECODE_FACTORS["q_dtype"],
    "page_size": (8, 24, 64, 128),
    # The phase, and how many rows each sequence has. In a ragged batch the corner says how many.
    "rows": (("ragged", 0), ("prefill", 40), ("decode", 5)),
    "blocks": (1, 2),  # of as few tokens as are whole lanes
    "query_rows": (16, 64),
    "buffers": (2, 3),
    "cores": (1, 2),
    "mode": MODES,
}
ROWS = covering_rows(FACTORS, is_allowed=is_taken)
_LEAST_PAGES = {8: 16, 24: 16, 64: 2, 128: 1}


def schedule_of_row(row) -> RaggedSchedule:
    """The schedule that a row of the table describes."""
    pages = row["blocks"] * _LEAST_PAGES[row["page_size"]]
    return RaggedSchedule(
        pages_per_block=pages,
        single_rows=DecodeSchedule(pages_per_block=2),
        rows_per_tile=row["query_rows"],
        buffers=row["buffers"],
        cores=row["cores"],
    )


@pytest.mark.parametrize("row", marked(ROWS, FAST, 10))
def test_any_two_features_together_equal_the_reference(row):
    phase, rows = row["rows"]
    case = case_of_row(row, phase, rows or 1)
    # Two cores, and memory for every row: v4's does not hold two blocks of 384 tokens of 8 float32 heads of 256.
    attend = interpreted(case, schedule_of_row(row), row["mode"], "v5p")
    for corner in row["corners"]:
        assert_equals_reference(attend, build(case.replace(corner=corner)))


def test_the_table_covers_every_pair_that_is_taken():
    assert_every_pair_meets(ROWS, FACTORS, is_taken)


def test_the_first_rows_have_every_level():
    assert_every_level(ROWS[:FIRST_ROWS], FACTORS)
