"""The kernel for GPUs equals the reference, in an interpreter that sees races, unwritten memory and bounds.

A row of the table is one kernel. It runs on a few corners of a batch's values, because most of the time is tracing.
"""

import dataclasses

import jax.numpy as jnp
import pytest

from paged.lower import GpuDecodeSchedule
from paged.spec import ALiBi, AttentionSpec, Bias, Chunk, PerHead, Prefix, Value, Where, Window
from paged.testing import PAST_THE_TABLE, Corner
from tests.support import CORNERS, Case, build
from tests.support.pairs import assert_every_pair_meets, covering_rows, named
from tests.support.specs import not_fifth, real

from .running import assert_equals_reference, needs_interpreter

pytestmark = [needs_interpreter, pytest.mark.slow]

_SLOPES = jnp.linspace(-1.1, 0.9, 16)


def head_bias(p, j, h):
    """An opaque bias whose table is read by head alone, before the kernel starts."""
    return _SLOPES[h] * real(jnp.abs(p - j))


TERMS = {
    "plain": {},
    "rich": {"window": 20, "soft_cap": 20.0, "sinks": True, "scores": (ALiBi(),)},
    "window": {"window": 70},
    "chunk": {"mask": Chunk(48), "scores": (Bias(head_bias),)},
    "brought": {"mask": Window(Value("window")), "soft_cap": Value("cap", dtype="float32")},
    "by head": {"mask": PerHead((Window(9), Window(40)))},
    "two runs": {"mask": Prefix(20) | Window(33), "soft_cap": 20.0},
    "by sequence": {"mask": Prefix(Value("prefix")) | Chunk(20)},
    "opaque": {"mask": Where(not_fifth)},
    "all": {"causal": False},
}
CORNER_SETS = (
    ("mixed", "few live", "one token", "empty"),
    ("first page masked", "exact pages", "one live"),
    ("more rows than tokens", "one past a page", "all dead", "no rows in the middle"),
)
FACTORS = {
    "corners": CORNER_SETS,
    "terms": tuple(TERMS),
    "dtype": ("bfloat16", "float16"),
    "heads": ((2, 2), (6, 2), (5, 1), (8, 1)),
    "order": ("packed", "split", "joined", "interleaved"),
    "head_dim": (64, 128, 256),
    "page_size": (16, 8, 32, 64),
    "rows": (1, 2),
    "kv_splits": (1, 2, 3),
    "tokens": (64, 128),
    "stages": (3, 4),
}


def is_taken(row) -> bool:
    """Whether the lowering accepts a row: see `test_refusals`. Tiles of 128 tokens leave room for short heads alone."""
    heads, _ = row.get("heads", (2, 2))
    is_by_head = row.get("terms") == "by head"
    is_large = row.get("head_dim", 64) > (64 if row.get("tokens") == 128 else 128 if row.get("stages") == 4 else 256)
    return not is_large and not (is_by_head and heads % 2)


ROWS = covering_rows(FACTORS, is_allowed=is_taken)

# Pages of 8 bits: what is multiplied in their place depends on dtype, head_dim and tokens, and its factors on scales.
NARROW = {
    "corners": (("mixed", "first page masked"), ("few live", "one past a page"), ("exact pages", "one token")),
    "terms": ("rich", "two runs", "all", "brought"),
    "dtype": ("int8", "float8_e4m3fn", "float8_e5m2"),
    "scales": ("head", "tensor"),
    "q_dtype": ("bfloat16", "float16"),
    "heads": ((6, 2), (8, 1)),
    "order": ("packed", "split", "joined", "interleaved"),
    "head_dim": (128, 256),
    "page_size": (16, 8, 32, 64),
    "rows": (1, 2),
    "kv_splits": (1, 2),
    "tokens": (64, 128),
}


def is_narrow_taken(row) -> bool:
    """Whether the lowering accepts a row of 8-bit pages: 128 tokens of 256 do not fit."""
    return not (row.get("head_dim") == 256 and row.get("tokens") == 128)


NARROW_ROWS = covering_rows(NARROW, is_allowed=is_narrow_taken)


def case_of_row(row, corner) -> Case:
    """The case that a row of the table stands for, with tables of four blocks of 64 tokens."""
    heads, kv_heads = row["heads"]
    pages, named = 64 // row["page_size"], CORNERS[corner]
    longer = dataclasses.replace(named, lengths=tuple((pages * a, b) for a, b in named.lengths))
    terms = TERMS[row["terms"]]
    return Case(
        spec=AttentionSpec(num_q_heads=heads, num_kv_heads=kv_heads, head_dim=row["head_dim"], **terms),
        page_size=row["page_size"],
        order=row["order"],
        dtype=row["dtype"],
        scales=row.get("scales"),
        q_dtype=row.get("q_dtype", row["dtype"]),
        phase="decode",
        rows=row["rows"],
        sink_shape=(heads,) if terms.get("sinks") else None,
        pages_per_seq=4 * pages,
        corner=longer,
    )


def schedule_of_row(row) -> GpuDecodeSchedule:
    """The schedule that a row stands for."""
    pages = row["tokens"] // row["page_size"]
    return GpuDecodeSchedule(pages_per_block=pages, stages=row.get("stages", 3), kv_splits=row["kv_splits"])


@pytest.mark.parametrize("row", [pytest.param(row, id=named(row, "corners")) for row in ROWS])
def test_any_two_features_together_equal_the_reference(row):
    for corner in row["corners"]:
        case = case_of_row(row, corner)
        assert_equals_reference(case, build(case), schedule_of_row(row))


@pytest.mark.parametrize("row", [pytest.param(row, id=named(row, "corners")) for row in NARROW_ROWS])
def test_any_two_features_of_8_bit_pages_together_equal_the_reference(row):
    for corner in row["corners"]:
        case = case_of_row(row, corner)
        assert_equals_reference(case, build(case), schedule_of_row(row))


def test_the_tables_cover_every_pair_that_is_taken():
    assert_every_pair_meets(ROWS, FACTORS, is_taken)
    assert_every_pair_meets(NARROW_ROWS, NARROW, is_narrow_taken)


def test_every_corner_of_a_batch_is_in_the_table():
    assert {corner for corners in CORNER_SETS for corner in corners} == set(CORNERS)


def test_long_sequences_go_round_the_ring_several_times():
    """Sixteen blocks in a ring of three tiles, and in one of eight."""
    corner = Corner(((64, 0), (40, 3), (17, 1), (5, 0), (63, 15)), (1,) * 5)
    spec = AttentionSpec(num_q_heads=8, num_kv_heads=1, head_dim=64)
    for stages in (3, 8):
        case = Case(
            spec=spec,
            page_size=16,
            dtype="bfloat16",
            q_dtype="bfloat16",
            phase="decode",
            corner=corner,
            pages_per_seq=64,
        )
        assert_equals_reference(case, build(case), GpuDecodeSchedule(pages_per_block=4, stages=stages))


def test_rows_past_the_table_and_holes():
    spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=64, window=40)
    case = Case(spec=spec, page_size=16, dtype="bfloat16", q_dtype="bfloat16", phase="decode", corner=PAST_THE_TABLE)
    assert_equals_reference(case, build(case), GpuDecodeSchedule(pages_per_block=4, stages=4))
