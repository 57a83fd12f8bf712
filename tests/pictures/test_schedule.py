"""Pictures of schedules: the items and blocks that are drawn are those that the lowerings work on."""

import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged import pictures
from paged.lower import Call, Sequences
from tests.pictures.drawn import require_sound

SPEC = paged.AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=128, window=600)
LAYOUT = paged.PageLayout(page_size=16, num_kv_heads=2, head_dim=128)
LENGTHS, TABLES = [2000, 40, 0, 900, 5000], np.arange(5 * 320).reshape(5, 320)
DECODE = paged.RaggedBatch.decode(LENGTHS, TABLES)
MIXED = paged.RaggedBatch(LENGTHS, TABLES, [0, 1, 40, 40, 41, 541])


def _attend(target, generation=None, **options):
    attend = paged.lower(SPEC, LAYOUT, target=target, **options)
    return attend if generation is None else attend.on_chip(generation)


def _work(attend, batch, tokens):
    sizes = {"slots": 5, "pages_per_seq": 320, "num_pages": 1600, "has_even_starts": batch.has_even_starts}
    call = Call(tokens=tokens, query_rows=batch.query_rows, q_dtype=jnp.dtype("bfloat16"), **sizes)
    lowering, schedule, _ = attend.choice(call)
    return lowering.work(attend.program, schedule, call, LAYOUT, Sequences.of(batch, tokens, 16)), schedule


SPLIT = paged.DecodeSchedule(pages_per_block=4, buffers=3, kv_splits=2)


@pytest.mark.kernels
@pytest.mark.parametrize(
    "attend",
    [
        pytest.param(_attend("tpu", "v5e"), id="v5e"),
        pytest.param(_attend("tpu", "v5p"), id="two cores"),
        pytest.param(_attend("tpu", "v6e", schedule=SPLIT), id="splits"),
        pytest.param(_attend("xla"), id="xla"),
    ],
)
def test_the_items_of_decoding_visit_what_explain_counts(attend):
    works, schedule = _work(attend, DECODE, 5)
    items = [item for work in works for items in work.cores for item in items]
    seen = paged.lower.pages_seen(attend.program, DECODE, tokens=5, page_size=16, num_pages=1600)
    for slot in range(5):
        own = [item for item in items if item.row == slot]
        assert sum(item.pages for item in own) == seen.some[slot].sum()
        assert sum(item.full for item in own) == seen.full[slot].sum()
        assert len(own) <= getattr(schedule, "kv_splits", 1)
    assert len(works[0].cores) == getattr(schedule, "cores", 1)
    picture = pictures.schedule(attend, DECODE)
    require_sound(picture)
    assert ("modelled" in picture.description) and picture.description.startswith(f"{len(items)} items")


@pytest.mark.kernels
@pytest.mark.parametrize("attend", [_attend("tpu", "v6e"), _attend("xla")], ids=["v6e", "xla"])
def test_a_mixed_step_is_drawn_in_its_phases(attend):
    works, schedule = _work(attend, MIXED, 541)
    singles, tiles = ([item for items in work.cores for item in items] for work in works)
    assert [item.row for item in singles] == [0, 40]
    rows = schedule.rows_per_tile
    assert sorted((item.row, item.rows) for item in tiles) == [
        (1, 39),
        *((41 + first, min(rows, 500 - first)) for first in range(0, 500, rows)),
    ]
    require_sound(pictures.schedule(attend, MIXED))


@pytest.mark.kernels
def test_a_call_alone_is_drawn_with_full_tables():
    call = Call(tokens=2, slots=2, pages_per_seq=64, num_pages=256, query_rows=1, q_dtype=jnp.dtype("bfloat16"))
    picture = pictures.schedule(_attend("tpu", "v5e"), call)
    assert "seq 1: 38 pages" in picture.text
    require_sound(picture)


def test_a_lowering_that_does_not_tell_is_named(monkeypatch):
    attend = _attend("xla")
    monkeypatch.setattr(type(attend.lowering), "work", lambda *arguments: ())
    with pytest.raises(ValueError, match="xla-blocks does not tell"):
        pictures.schedule(attend, DECODE)
