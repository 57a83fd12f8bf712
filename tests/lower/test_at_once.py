"""The form ``"at_once"`` of the XLA lowering: how many pages it lists, its steps, and its 16-bit products."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import paged
from paged.lower import LOWERINGS, Program
from paged.lower.program import Call, most_pages_of_any
from paged.lower.xla.sizes import fit, key_bytes, most_row_blocks
from paged.spec import AttentionSpec, Chunk, PageLayout, Prefix, Window
from tests.support import assert_bitwise, assert_state_close, build, case_of, state_of

SPEC = AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128)
LAYOUT = PageLayout(page_size=16, num_kv_heads=8, head_dim=128)
CALL = Call(tokens=16, slots=16, pages_per_seq=256, num_pages=4096, query_rows=1, q_dtype=jnp.dtype("bfloat16"))
XLA = dataclasses.replace(next(low for low in LOWERINGS if low.name == "xla-blocks"), platform="cuda")
SMALL = {"pages_per_block": 1, "rows_per_tile": 5, "row_blocks_at_once": 2, "form": "at_once"}


def small(case, **changes):
    return paged.lower(case.spec, case.layout, "xla", schedule=paged.XlaSchedule(**{**SMALL, **changes}))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "mask", [Window(7), Window(3) | Prefix(5), Chunk(6), ~Window(9), Prefix(2)], ids=lambda mask: str(mask)
)
def test_no_rows_see_more_pages_than_the_list_has_room_for(mask, rows):
    width = 9
    for size in (1, 3, 4):
        program = Program.from_spec(SPEC.replace(mask=mask))
        p, j = np.arange(-5, 100)[:, None], np.arange(width * size)[None]
        seen = np.broadcast_to(np.asarray(program.visible(p, j, 10**6)), (105, width * size))
        pages = seen.reshape(105, width, size).any(axis=2)
        most = max(pages[i : i + rows].any(axis=0).sum() for i in range(105 - rows + 1))
        assert most <= most_pages_of_any(program, size, width, rows) <= width


@pytest.mark.parametrize(("mask", "most"), [(Window(128), 9), (Chunk(64), 4), (Window(100) | Prefix(20), 10)])
def test_a_list_is_short_in_a_table_of_any_width(mask, most):
    program = Program.from_spec(SPEC.replace(mask=mask))
    assert [most_pages_of_any(program, 16, width, 1) for width in (256, 8192)] == [most, most]


def test_a_mask_that_asks_the_batch_has_a_list_as_wide_as_the_table():
    program = Program.from_spec(SPEC.replace(window=paged.Value("window")))
    assert most_pages_of_any(program, 16, 64, 1) == 64


@pytest.mark.parametrize("width", [256, 8192, 2**20])
@pytest.mark.parametrize("facts", [{}, {"query_rows": None, "tokens": 512}, {"query_rows": 512, "tokens": 16 * 512}])
def test_a_step_has_the_memory_that_it_may_have_whatever_the_tables_width(width, facts):
    call = dataclasses.replace(CALL, pages_per_seq=width, **facts)
    schedule = XLA.schedule(Program.from_spec(SPEC), LAYOUT, call)
    rows = schedule.rows_per_tile
    keys = schedule.row_blocks_at_once * schedule.pages_per_block * 16
    limit = (64 if rows == 1 else 192) * 2**20
    assert limit / 4 < keys * key_bytes(Program.from_spec(SPEC), LAYOUT, jnp.bfloat16, rows) <= limit or width == 256
    assert schedule.form == "at_once"


def test_steps_are_alike_and_cover_everything():
    for row_blocks in (1, 5, 16, 257):
        for pages in (1, 7, 256, 8192):
            at_once, per_block = fit(2**20, 512, 16, row_blocks, pages)
            assert 1 <= at_once <= row_blocks and 1 <= per_block <= pages
            assert at_once * per_block * 16 * 512 <= 2**20 or (at_once, per_block) == (1, 1)
            assert -(-pages // per_block) * per_block - pages < -(-pages // per_block)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_rows_of_a_batch_are_never_cut_into_more_row_blocks(rows):
    rng = np.random.default_rng(0)
    for _ in range(200):
        slots, tokens = rng.integers(1, 6), rng.integers(1, 20)
        counts = np.diff(np.sort(np.concatenate([[0, tokens], rng.integers(0, tokens + 1, slots - 1)])))
        call = dataclasses.replace(CALL, slots=int(slots), tokens=int(tokens), query_rows=None)
        assert sum(-(-counts // rows)) <= most_row_blocks(call, rows)
        assert sum(counts == 1) <= most_row_blocks(call, 1, is_single=True)


def test_explain_tells_the_steps_their_memory_and_that_no_gpu_has_timed_them():
    attend = dataclasses.replace(paged.lower(SPEC, LAYOUT, "xla"), lowerings=(XLA,))
    batch = paged.RaggedBatch.decode([4096] * 16, np.zeros((16, 256), int))
    pages = LAYOUT.wrap(jax.ShapeDtypeStruct(LAYOUT.array_shapes(4096)[0], jnp.bfloat16))
    told = str(attend.explain(jax.ShapeDtypeStruct((16, 32, 128), jnp.bfloat16), pages, batch))
    assert "runs as xla-blocks(pages_per_block=256, row_blocks_at_once=16, form=at_once)" in told
    assert "at most 1 steps, each of 16 row blocks side by side over 4096 keys, without a loop" in told
    assert "a step stores about 16 MiB, whatever the table's width; never timed on a GPU" in told


def test_blocks_per_step_is_refused():
    attend = small(case_of("plain", "decode"), blocks_per_step=2)
    with pytest.raises(ValueError, match='in form="at_once" blocks_per_step is 1; got 2'):
        attend.choice(CALL)


# Decode sums products of float32; more rows multiply matrices of 16-bit numbers, with each weight in two of them.
HALVES = [("bfloat16", "prefill"), *(pytest.param("float16", x, marks=pytest.mark.slow) for x in ("decode", "ragged"))]


@pytest.mark.parametrize(("dtype", "phase"), HALVES)
def test_a_half_precision_result_is_the_float32_result_rounded_once(dtype, phase):
    case = case_of("rich", phase, dtype=dtype, q_dtype=dtype)
    built = build(case)
    assert_state_close(state_of(small(case), built), built)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["decode", "ragged", "prefill"])
def test_a_plan_changes_no_bit(phase):
    built = build(case_of("rich", phase))
    attend = small(built.case)
    plan = attend.plan(built.q, built.pages, built.batch)
    assert_bitwise(attend.state(built.q, built.pages, plan, built.sinks), state_of(attend, built))


@pytest.mark.slow
def test_an_export_for_several_platforms_has_no_loop_and_gives_the_same_here():
    built = build(case_of("plain", "decode"))
    attend = paged.lower(built.case.spec, built.case.layout, "xla")
    on_gpu = jax.jit(attend.on_chip("h200").state)
    exported = export.export(on_gpu, platforms=["cpu", "cuda"])(built.q, built.pages, built.batch)
    assert "stablehlo.while" not in exported.mlir_module() and "custom_call" not in exported.mlir_module()
    again = export.deserialize(exported.serialize())
    assert_state_close(again.call(built.q, built.pages, built.batch), built)
