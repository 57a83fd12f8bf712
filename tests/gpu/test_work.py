"""What the lowering for GPUs tells of how a step is divided."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower import Call, GpuDecodeSchedule, Sequences
from paged.lower.gpu import GPU_DECODE, HOPPERS
from paged.spec import Prefix, RaggedBatch, Window
from tests.pictures.drawn import require_sound

from .running import needs_kernels

SPEC = paged.AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=128)
LAYOUT = paged.PageLayout(page_size=16, num_kv_heads=2, head_dim=128)
LENGTHS = [0, 40, 700, 1024]


def items_of(spec, splits, rows=1):
    """The work of four sequences, which have 0, 3, 44 and 64 pages, and the items of each as (row, pages, part)."""
    tables = np.arange(4 * 64).reshape(4, 64)
    batch = RaggedBatch.decode(LENGTHS, tables, query_rows=rows)
    call = Call(4 * rows, 4, 64, 256, rows, jnp.dtype("bfloat16"))
    schedule = GpuDecodeSchedule(pages_per_block=4, stages=6, kv_splits=splits)
    seqs = Sequences.of(batch, call.tokens, LAYOUT.page_size)
    lowering = dataclasses.replace(GPU_DECODE, gpu=HOPPERS["h200"])
    (work,) = lowering.work(paged.Program.from_spec(spec), schedule, call, LAYOUT, seqs)
    (items,) = work.cores
    assert (work.pages_per_block, work.buffers) == (4, 3)
    assert all(item.rows == rows and item.full == 0 and item.parts == splits for item in items)
    return work, [(item.row, item.pages, item.part) for item in items]


def test_each_sequence_is_an_item_with_the_pages_that_it_sees():
    work, items = items_of(SPEC, splits=1, rows=2)
    assert items == [(2, 3, 0), (4, 44, 0), (6, 64, 0)]
    assert work.words.startswith("sequences, each KV head")
    assert work.bytes_per_second == HOPPERS["h200"].bytes_per_second


def test_a_split_has_whole_blocks_and_the_last_one_the_rest():
    """Of 11 blocks the splits have 4, 4 and 3; of one block the first has all."""
    work, items = items_of(SPEC, splits=3)
    assert items == [(1, 3, 0), (2, 16, 0), (2, 16, 1), (2, 12, 2), (3, 24, 0), (3, 24, 1), (3, 16, 2)]
    assert "in 3 KV splits" in work.words


@pytest.mark.kernels
def test_only_lists_are_made_once_for_all_layers():
    batch = RaggedBatch.decode(LENGTHS, np.arange(4 * 64).reshape(4, 64))
    call, seqs = Call(4, 4, 64, 256, 1, jnp.dtype("bfloat16")), Sequences.of(batch, 4, LAYOUT.page_size)
    schedule = GpuDecodeSchedule(pages_per_block=4)
    of = lambda mask: paged.Program.from_spec(SPEC.replace(mask=mask))
    assert GPU_DECODE.plan(of(Window(128)), schedule, call, LAYOUT, seqs) is None
    planned = GPU_DECODE.plan(of(Window(32) | Prefix(20)), schedule, call, LAYOUT, seqs)
    assert planned is not None
    lists = planned.moved(1000)
    # The last sequence sees its first two pages and its last two. Of the second page it sees a part: it comes last.
    assert lists.columns is not None and lists.end.tolist() == [0, 3, 5, 4]
    assert lists.columns[3, :4].tolist() == [0, 62, 63, 1]
    assert lists.pages[3, :4].tolist() == [1192, 1254, 1255, 1193]


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("mask", "pages"), [(Window(128), [3, 9, 8]), (Window(128) | Prefix(20), [3, 11, 10])], ids=["a run", "two runs"]
)
def test_pages_that_nobody_sees_are_no_work(mask, pages):
    _, items = items_of(SPEC.replace(mask=mask), splits=1)
    assert [count for _, count, _ in items] == pages


@needs_kernels
@pytest.mark.parametrize("generation", HOPPERS)
def test_the_work_is_drawn(generation):
    batch = RaggedBatch.decode([40, 16, 900], np.arange(3 * 64).reshape(3, 64))
    pinned = GpuDecodeSchedule(pages_per_block=4, stages=6, kv_splits=2)
    attend = paged.lower(SPEC, LAYOUT, target="gpu", schedule=pinned).on_chip(generation)
    picture = paged.pictures.schedule(attend, batch)
    require_sound(picture)
    lines = picture.text.splitlines()
    assert "side by side, 3 buffers of 4 pages" in lines[0] and "modelled from the chip's bandwidth" in lines[-1]
    assert "  seq 1, part 1/2: 1 page, 0 full: [1]" in lines
    pages = [int(line.split(": ")[1].split()[0]) for line in lines[1:-1]]
    assert sum(pages) == sum(-(-length // 16) for length in (40, 16, 900))
