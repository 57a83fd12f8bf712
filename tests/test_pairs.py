"""Features crossed in pairs: any two of them meet in some row, and every row equals the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged.spec import (
    PAGE_ORDERS,
    ALiBi,
    AttentionSpec,
    AttentionState,
    Bias,
    Chunk,
    Prefix,
    Spans,
    Tree,
    Value,
    Where,
    Window,
)
from paged.testing.specs import not_every_head
from tests.support import (
    PHASES,
    Case,
    assert_state_close,
    assert_states_close,
    build,
    case_of,
    every_lowering,
    exact_state,
    lowered,
    state_of,
)
from tests.support.pairs import assert_every_pair_meets, covering_rows, named
from tests.support.specs import not_fifth, table_bias

MASKS = {
    "causal": {},
    "window": {"window": 5},
    "both sides": {"causal": False},
    "prefix or chunk": {"causal": False, "mask": Prefix(3) | Chunk(6)},
    "not prefix, where": {"window": 9, "mask": ~Prefix(2) & Where(not_fifth)},
    "values, by head": {"window": Value("window"), "mask": Spans(Value("a", 2), Value("b", 2)) | Where(not_every_head)},
    "tree": {"mask": Tree() & (Window(6) | Prefix(2))},
}
SCORES = {"none": (), "alibi": (ALiBi(),), "bias": (Bias(table_bias),), "alibi, bias": (ALiBi(), Bias(table_bias))}
FACTORS = {
    "mask": tuple(MASKS),
    "pool": ("float32", "bfloat16", "int8 token", "int8 head", "float8_e4m3fn tensor"),
    "heads": ((4, 4), (6, 2), (5, 1), (8, 1)),
    "page_size": (1, 4, 16, 3),
    "sinks": (None, "q_heads", "q_heads, n"),
    "scores": tuple(SCORES),
    "order": PAGE_ORDERS,
    "phase": tuple(PHASES),
    "q_dtype": ("float32", "bfloat16", "float16"),
    "soft_cap": (None, 7.0),
    "scale": (None, 0.11),
    "head_dim": (8, 16),
    # pages_per_block, rows_per_tile, blocks_per_step
    "schedule": (None, (3, 1, 2), (3, 5, 1)),
}
ROWS = covering_rows(FACTORS)


def case_of_row(row) -> Case:
    """The case that a row of the table stands for."""
    heads, kv_heads = row["heads"]
    sink_shape = {
        None: None,
        "q_heads": (heads,),
        "q_heads, n": (heads, 3),
    }[row["sinks"]]
    spec = AttentionSpec(
        num_q_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=row["head_dim"],
        soft_cap=row["soft_cap"],
        scale=row["scale"],
        sinks=sink_shape is not None,
        scores=SCORES[row["scores"]],
        **MASKS[row["mask"]],
    )
    dtype, _, scales = row["pool"].partition(" ")
    return Case(
        spec=spec,
        page_size=row["page_size"],
        order=row["order"],
        dtype=dtype,
        scales=scales or None,
        q_dtype=row["q_dtype"],
        phase=row["phase"],
        sink_shape=sink_shape,
        **PHASES[row["phase"]],
    )


def _schedule(row):
    return (
        {"own": 1}
        if row["schedule"] is None
        else dict(zip(("pages_per_block", "rows_per_tile", "blocks_per_step"), row["schedule"], strict=True))
    )


@every_lowering
@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=named(row), marks=[pytest.mark.kernels] * (i % 8 > 0)) for i, row in enumerate(ROWS)],
)
def test_any_two_features_together_equal_the_reference(lowering, row):
    case = case_of_row(row)
    attend = lowered(lowering, case, **_schedule(row))
    for corner in ("mixed", "first page masked", "more rows than tokens"):
        built = build(case.replace(corner=corner))
        assert_state_close(state_of(attend, built), built)


SINGLES = {
    "float16": {"dtype": "float16", "q_dtype": "float16"},
    "five sinks of each head": {"sink_shape": (3, 5)},
    "head_dim 64": {"head_dim": 64},
    "head_dim 80": {"head_dim": 80},
    "head_dim 96": {"head_dim": 96},
    "head_dim 128": {"head_dim": 128},
    "head_dim 256": {"head_dim": 256, "page_size": 8},
    "page_size 128": {"page_size": 128},
    "value_dim under head_dim": {"order": "split", "value_dim": 3},
    "value_dim over head_dim": {"order": "split", "value_dim": 24, "dtype": "bfloat16"},
    "float8_e5m2": {"dtype": "float8_e5m2", "scales": "head"},
    "float8_e4m3fn, per-token scales": {"dtype": "float8_e4m3fn", "scales": "token", "order": "split"},
    "int8, one scale": {"dtype": "int8", "scales": "tensor", "order": "interleaved"},
    "drafted tokens": {"phase": "decode", "rows": 3},
    "one row": {"phase": "prefill", "rows": 1},
}


# Sizes between others, which the kernels' tests have too.
LATER = ("head_dim 64", "head_dim 96", "head_dim 128")


@every_lowering
@pytest.mark.parametrize("single", [pytest.param(x, marks=[pytest.mark.kernels] * (x in LATER)) for x in SINGLES])
def test_single_features_equal_the_reference(lowering, single):
    facts = dict(SINGLES[single])
    spec = AttentionSpec(
        num_q_heads=3, num_kv_heads=1, head_dim=facts.pop("head_dim", 8), window=40, sinks="sink_shape" in facts
    )
    case = Case(spec=spec, **facts)
    for corner in ("mixed", "first page masked"):
        built = build(case.replace(corner=corner))
        assert_state_close(state_of(lowered(lowering, case), built), built)


SCHEDULES = [(1, 16, 1, 1), (7, 5, 2, 3), (1, 1, 2, 2)]
SCHEDULES += [pytest.param(schedule, marks=pytest.mark.kernels) for schedule in ((3, 2, 3, 1), (1, 2, 1, 3))]


@every_lowering
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_any_schedule_gives_the_same_attention(lowering, schedule):
    case = case_of("rich", "ragged")
    names = "pages_per_block", "rows_per_tile", "row_blocks_at_once", "blocks_per_step"
    attend = lowered(lowering, case, **dict(zip(names, schedule, strict=True)))
    for corner in ("mixed", "first page masked", "exact pages"):
        built = build(case.replace(corner=corner))
        assert_state_close(state_of(attend, built), built)


HALVES = [("bfloat16", "ragged"), ("float16", "decode")]
HALVES += [pytest.param("bfloat16", phase, marks=pytest.mark.kernels) for phase in ("decode", "prefill")]


@every_lowering
@pytest.mark.parametrize(("dtype", "phase"), HALVES)
def test_a_half_precision_result_is_the_float32_result_rounded_once(lowering, dtype, phase):
    """Softmax statistics and accumulators are float32 whatever the queries and pages are stored in."""
    case = case_of("rich", phase, dtype=dtype, q_dtype=dtype)
    built = build(case)
    attend = lowered(lowering, case)
    half = state_of(attend, built)
    full = attend.state(built.q.astype(jnp.float32), built.pages, built.batch, built.sinks)
    ulp = np.abs(np.spacing(np.asarray(full.out.astype(dtype))).astype(np.float32))
    assert (np.abs(np.asarray(half.out, np.float32) - np.asarray(full.out)) <= ulp).all()
    assert_states_close(AttentionState(full.out, half.lse), exact_state(built), built.error_unit, "float32")


@every_lowering
def test_scales_are_data_and_a_new_value_never_compiles(lowering):
    case = case_of("plain", "ragged", dtype="int8", scales="head", order="split")
    built = build(case)
    attend, traces = lowered(lowering, case), []

    @jax.jit
    def run(pages):
        traces.append(pages)
        return attend(built.q, pages, built.batch)

    out = run(built.pages)
    doubled = built.case.layout.wrap(*built.pages.arrays, k_scale=built.pages.k_scale, v_scale=2 * built.pages.v_scale)
    np.testing.assert_array_equal(run(doubled), 2 * out)
    assert len(traces) == 1 and np.abs(np.asarray(out)).max() > 1


def test_the_table_covers_every_pair():
    """And is not much larger than it has to be: five pools times seven masks are 35 rows already."""
    assert len(ROWS) <= 42
    assert_every_pair_meets(ROWS, FACTORS)
