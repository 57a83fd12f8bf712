"""The TPU decode kernel's own edges: gradients, lists too long for scalar memory, and buffers of one size."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower import DecodeSchedule, RaggedSchedule
from paged.lower.tpu.decode.launch import DecodeLaunch
from tests.support import Case, build
from tests.support.listed import Listed
from tests.support.specs import PLAIN

from .edges import (
    assert_gradients_are_those_of_xla,
    items_of_launches,
    with_scalar_memory,
)
from .interpreter import assert_equals_reference, interpreted

# One kernel for most of this file: two query rows, blocks of two pages of at most four.
CASE = Case(spec=PLAIN, page_size=8, phase="decode", rows=2)
LISTED = CASE.replace(spec=PLAIN.replace(mask=Listed()))
SCHEDULE = DecodeSchedule(pages_per_block=2)
SCHEDULES = {"decode": SCHEDULE, "ragged": RaggedSchedule(pages_per_block=2, rows_per_tile=16, single_rows=SCHEDULE)}


def _attend():
    return interpreted(CASE, SCHEDULE)


@pytest.mark.kernels
@pytest.mark.kernels
def test_gradients_are_those_of_the_xla_lowering():
    assert_gradients_are_those_of_xla(_attend(), build(CASE))


@pytest.mark.parametrize(
    ("case", "bytes_per_seq"),
    [pytest.param(CASE, 40, id="tables", marks=pytest.mark.kernels), pytest.param(LISTED, 72, id="lists")],
)
def test_tables_and_lists_too_long_for_scalar_memory_are_cut_by_sequence(case, bytes_per_seq, monkeypatch):
    """One kernel has three sequences and the next has two. Some or all of them may be dead."""
    items = items_of_launches(monkeypatch, DecodeLaunch)
    attend = with_scalar_memory(case, 3 * bytes_per_seq / 0.6 + 1, SCHEDULE)
    for corner in ("mixed", "few live", "more rows than tokens"):
        assert_equals_reference(attend, build(case.replace(corner=corner)))
    assert items == [3, 2]


@pytest.mark.kernels
@pytest.mark.kernels
def test_a_page_list_too_long_for_scalar_memory_is_cut_and_merged(monkeypatch):
    """One sequence of four pages: two kernels of two pages, each with two KV splits. Four states are merged."""
    items = items_of_launches(monkeypatch, DecodeLaunch)
    case = LISTED.replace(phase="prefill", spec=LISTED.spec.replace(sinks=True), sink_shape=(4, 3))
    attend = with_scalar_memory(case, (2 * 8 + 80) / 0.6 + 1, SCHEDULE.replace(pages_per_block=1, kv_splits=2))
    for corner in ("first page masked", "exact pages", "empty"):
        assert_equals_reference(attend, build(case.replace(corner=corner)))
    assert items == [2, 2]


@pytest.mark.parametrize("phase", SCHEDULES)
def test_no_kernel_holds_scores_of_the_whole_table(phase):
    """Its buffers in vector memory are the same for tables of 16 and of 64 thousand tokens."""
    few, many = (_buffers(phase, pages_per_seq) for pages_per_seq in (1024, 4096))
    assert few == many
    assert few


def _buffers(phase, pages_per_seq):
    layout = paged.PageLayout(page_size=16, num_kv_heads=2, head_dim=128, dtype=jnp.float32)
    schedule = SCHEDULES[phase].replace(pages_per_block=8)
    attend = paged.lower(
        paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=128), layout, "tpu", schedule=schedule
    )
    batch = paged.RaggedBatch(*(np.zeros(n, np.int32) for n in ((3,), (3, pages_per_seq), (4,))), query_rows=None)
    if phase == "decode":
        batch = paged.RaggedBatch.decode(batch.lengths, batch.block_tables)
    q, pages = jax.ShapeDtypeStruct((3, 4, 128), jnp.float32), jax.eval_shape(lambda: layout.init(64))
    return set(re.findall(r"<vmem>\{[^}]*\}", str(jax.make_jaxpr(attend)(q, pages, batch))))
