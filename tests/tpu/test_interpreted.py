"""The TPU decode kernel equals the reference, crossed in pairs, in an interpreter that sees races and unwritten memory.

A row of the table is one kernel. It runs on a few corners of a batch's values, because most of the time is compiling.
`make test` runs a few rows, `make test-kernels` half of them, and `make test-slow` all. The first rows hold every level
of every factor.
"""

import jax.numpy as jnp
import pytest

from paged.lower import DecodeSchedule, Schedule
from paged.spec import PAGE_ORDERS, ALiBi, AttentionSpec, Bias, Chunk, Prefix, Where
from tests.support import CORNERS, Case, build
from tests.support.pairs import assert_every_level, assert_every_pair_meets, covering_rows, named
from tests.support.specs import not_fifth, real

from .interpreter import MODES, assert_equals_reference, interpreted

FIRST_ROWS = 7
FAST = (0, 4)
_SLOPES = jnp.linspace(-1.1, 0.9, 16)


def head_bias(p, j, h):
    """An opaque bias whose table is read by head alone, before the kernel starts."""
    return _SLOPES[h] * real(jnp.abs(p - j)) ** 0.5


TERMS = {
    "plain": {},
    "rich": {"window": 9, "soft_cap": 20.0, "sinks": True, "scores": (ALiBi(),)},
    "odd": {"causal": False, "mask": (Prefix(3) | Chunk(6)) & Where(not_fifth), "scores": (Bias(head_bias),)},
    "window": {"window": 20},
    "chunk": {"mask": Chunk(12)},
    "all": {"causal": False},
}
# "more rows than tokens" and "mixed" have empty rows, and with several query rows also rows before the first token.
CORNER_SETS = (
    ("mixed", "few live", "one token"),
    ("first page masked", "empty", "exact pages"),
    ("more rows than tokens", "one past a page", "all dead"),
    ("no rows in the middle", "one live"),
)
FACTORS = {
    "corners": CORNER_SETS,
    "terms": tuple(TERMS),
    "pool": ("float32", "bfloat16", "int8 tensor", "int8 head", "int8 token", "float8_e4m3fn head"),
    "heads": ((2, 2), (3, 1), (8, 2), (10, 2), (8, 1), (16, 1)),
    "order": PAGE_ORDERS,
    "head_dim": (8, 64, 80, 128),
    "q_dtype": ("float32", "bfloat16", "float16"),
    "page_size": (8, 16, 32),
    "rows": (1, 2, 3),
    "kv_splits": (1, 2, 3),
    "pages_per_block": (1, 2, 3),
    "buffers": (2, 4),
    "sequence": ("inline", "grid"),
    "cores": (1, 2),
    "mode": MODES,
}


def is_taken(row) -> bool:
    """Whether the lowering accepts a row of the table: see `test_refusals`."""
    return not (row.get("order") == "interleaved" and row.get("pool") == "int8 token")


ROWS = covering_rows(FACTORS, is_allowed=is_taken)


def case_of_row(row, phase="decode", rows=0) -> Case:
    """The case that a row of a table stands for, in its first corner, with ``rows`` rows per sequence."""
    heads, kv_heads = row["heads"]
    terms = TERMS[row["terms"]]
    dtype, _, scales = row["pool"].partition(" ")
    return Case(
        spec=AttentionSpec(num_q_heads=heads, num_kv_heads=kv_heads, head_dim=row["head_dim"], **terms),
        page_size=row["page_size"],
        order=row["order"],
        dtype=dtype,
        scales=scales or None,
        q_dtype=row["q_dtype"],
        phase=phase,
        rows=rows or row["rows"],
        sink_shape=(heads,) if terms.get("sinks") else None,
        corner=row["corners"][0],
    )


def schedule_of_row(row) -> Schedule:
    """The schedule that a row stands for."""
    names = ("pages_per_block", "kv_splits", "buffers", "sequence", "cores")
    return DecodeSchedule(**{name: row[name] for name in names})


def marked(rows, fast, most):
    """The table's rows as parameters, named by everything but their corners.

    Those in ``fast`` always run. Of the others the first ``most`` are `kernels`, and the rest is `slow`.
    """

    def mark(i):
        return [] if i in fast else [pytest.mark.kernels if i < most else pytest.mark.slow]

    return [pytest.param(row, id=named(row, "corners"), marks=mark(i)) for i, row in enumerate(rows)]


@pytest.mark.parametrize("row", marked(ROWS, FAST, 26))
def test_any_two_features_together_equal_the_reference(row):
    case = case_of_row(row)
    attend = interpreted(case, schedule_of_row(row), row["mode"])
    for corner in row["corners"]:
        assert_equals_reference(attend, build(case.replace(corner=corner)))


def test_the_table_covers_every_pair_that_is_taken():
    assert len(ROWS) <= 52
    assert_every_pair_meets(ROWS, FACTORS, is_taken)


def test_every_corner_of_a_batch_is_in_the_table():
    assert {corner for corners in CORNER_SETS for corner in corners} == set(CORNERS)


def test_the_first_rows_have_every_level():
    assert_every_level(ROWS[:FIRST_ROWS], FACTORS)
