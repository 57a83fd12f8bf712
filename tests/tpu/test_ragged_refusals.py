"""Calls and schedules that the TPU lowering for mixed batches refuses, with their messages."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import paged
from paged.lower import Call, DecodeSchedule, RaggedSchedule
from paged.lower.tpu import CHIPS, TPU_RAGGED
from paged.spec import AttentionSpec, PageLayout, RaggedBatch

SPEC = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=128)
LAYOUT = PageLayout(page_size=16, num_kv_heads=2, head_dim=128, dtype=jnp.bfloat16)
BATCH = RaggedBatch([40, 9], [[0, 1, 2], [3, 4, 5]], [0, 5, 6])


def _call(spec, layout, schedule=None, chip="v4", batch=BATCH):
    attend = paged.lower(spec, layout, "tpu", schedule=schedule).on_chip(chip)
    pages = layout.wrap(*(jax.ShapeDtypeStruct(s, layout.dtype) for s in layout.array_shapes(32)))
    q = jax.ShapeDtypeStruct((int(batch.query_starts[-1]), spec.num_q_heads, spec.head_dim), jnp.bfloat16)
    return attend.choice(Call.of(q, pages, batch))[:2]


# Changes to a schedule of 8 pages per block, of 16 tokens each; the chip; and the message.
SCHEDULES = {
    "not a power of two": ({"rows_per_tile": 48}, "v4", "it has rows_per_tile=48, which must be a power of two,"),
    "few rows": ({"rows_per_tile": 8}, "v4", "it has rows_per_tile=8, which must be a power of two, and at least 16"),
    "part of a register": ({"pages_per_block": 12}, "v4", "its blocks of 192 tokens must be a multiple of 128: change"),
    "vector memory": (
        {"rows_per_tile": 2048, "pages_per_block": 32}, "v4", r"its buffers take \d+ bytes .*: lower rows_per_tile",
    ),
    "cores": ({"cores": 2}, "v5e", "it has cores=2, and a device of v5e has 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_that_cannot_run_are_refused_with_the_nearest_that_can(name):
    choices, chip, reason = SCHEDULES[name]
    schedule = RaggedSchedule(**{"pages_per_block": 8, "rows_per_tile": 64, **choices})
    with pytest.raises(ValueError, match=f"cannot run: {reason}.* The nearest that can: tpu-ragged") as error:
        _call(SPEC, LAYOUT, schedule, chip)
    assert str(schedule) in str(error.value)


def test_a_schedule_of_single_rows_that_cannot_run_is_refused():
    single_rows = DecodeSchedule(pages_per_block=8, kv_splits=99)
    schedule = RaggedSchedule(pages_per_block=8, rows_per_tile=64, single_rows=single_rows)
    with pytest.raises(ValueError, match=r"its single_rows=tpu-decode.*kv_splits=99.* The nearest"):
        _call(SPEC, LAYOUT, schedule)


def test_pages_too_large_for_vector_memory_are_refused_by_both_lowerings():
    spec = SPEC.replace(num_q_heads=128, num_kv_heads=64)
    layout = dataclasses.replace(LAYOUT, num_kv_heads=64, page_size=256)
    with pytest.raises(
        ValueError, match=r"No lowering takes this call: tpu-decode: .*this batch's rows vary; "
    ) as error:
        _call(spec, layout)
    said = str(error.value).partition("tpu-ragged: ")[2]
    assert said.startswith(
        "16 query rows of 128 heads, with two blocks of 1 pages, do not fit the vector memory of v4: use smaller pages"
    )
    assert "use smaller pages" in said


@pytest.mark.parametrize("page_size", [12, 20, 4])
def test_pages_of_no_whole_tiles_are_refused(page_size):
    layout = dataclasses.replace(LAYOUT, page_size=page_size)
    schedule = RaggedSchedule(pages_per_block=32, rows_per_tile=16)
    with pytest.raises(ValueError, match=f"tpu-ragged: pages of {page_size} tokens are no whole tiles"):
        paged.lower(SPEC, layout, "tpu", schedule=schedule)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("page_size", [8, 24, 40, 104, 128, 136, 200, 256, 384, 512, 1024])
def test_a_call_is_refused_or_gets_a_schedule_that_can_run(page_size, chip):
    """A block must fill whole registers with tokens. For odd page sizes that takes many pages."""
    for heads, kv_heads, head_dim in ((8, 2, 128), (64, 8, 128), (16, 8, 256), (128, 128, 64), (1, 1, 8)):
        spec = AttentionSpec(num_q_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
        layout = PageLayout(page_size=page_size, num_kv_heads=kv_heads, head_dim=head_dim, dtype=jnp.bfloat16)
        program, low = paged.lower(spec, layout, "xla").program, TPU_RAGGED.on_chip(chip)
        for rows in (None, 1, 3, 100, 4096):
            call = Call(4096, 4, 64, 512, rows, jnp.dtype("bfloat16"))
            schedule = low.schedule(program, layout, call)
            refusal = low.refuses(program, layout, call)
            assert (refusal is None) == (low.cannot_honour(program, layout, call, schedule) is None)
            assert refusal is None or "use smaller pages" in refusal
