"""What the TPU decode lowering refuses, before anything is traced, and the words: with what would be accepted."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import paged
from paged.lower import Call, DecodeSchedule
from paged.spec import AttentionSpec, Bias, PageLayout, RaggedBatch, Where

SPEC = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=128)
LAYOUT = PageLayout(page_size=16, num_kv_heads=2, head_dim=128, dtype=jnp.bfloat16)
TABLE = jnp.arange(64.0)


def _layout(**changes):
    return dataclasses.replace(LAYOUT, **changes)


def by_position(p, j, h):
    """A bias that looks its values up by distance: a gather of positions."""
    return TABLE[jnp.clip(p - j, 0, 63)]


def in_table(p, j):
    """A mask that gathers by position."""
    return TABLE[jnp.clip(j, 0, 63)] > 3


REFUSED = {
    "page size": (SPEC, _layout(page_size=12), "pages of 12 tokens are no whole tiles: .* a multiple of 8"),
    "float16 pages": (SPEC, _layout(dtype=jnp.float16), "a TPU has no float16: pages must be bfloat16, float32, int8"),
    "interleaved token scales": (
        SPEC,
        _layout(order="interleaved", dtype=jnp.int8, scales="token"),
        r'scales="token" with order="interleaved" .*use order="packed" or "split"',
    ),
    "bias by position": (
        SPEC.replace(scores=(Bias(by_position),)), LAYOUT, "a mask or bias uses gather, .*only elementwise arithmetic",
    ),
    "mask by position": (SPEC.replace(mask=Where(in_table)), LAYOUT, "a mask or bias uses gather"),
    "too many heads": (
        SPEC.replace(num_q_heads=256, num_kv_heads=256),
        _layout(num_kv_heads=256),
        "256 KV heads are more than the 128 lanes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_target_tpu_raises_with_the_reason_and_says_who_takes_it(name):
    spec, layout, reason = REFUSED[name]
    with pytest.raises(ValueError, match=f'No lowering takes this spec on target "tpu": tpu-decode: {reason}') as error:
        paged.lower(spec, layout, "tpu")
    takers = [target for target in ("gpu", "xla") if _is_taken(spec, layout, target)]
    assert "xla" in takers and f"Targets that take it: {takers}." in str(error.value)


def _is_taken(spec, layout, target):
    try:
        paged.lower(spec, layout, target)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", REFUSED)
def test_target_auto_takes_what_the_tpu_lowering_refuses(name):
    spec, layout, _ = REFUSED[name]
    assert paged.lower(spec, layout).lowering.name == "xla-blocks"


def _pages(layout, num_pages=32):
    return layout.wrap(*(jax.ShapeDtypeStruct(s, layout.dtype) for s in layout.array_shapes(num_pages)))


def _call(attend, batch):
    q = jax.ShapeDtypeStruct((int(batch.query_starts[-1]), SPEC.num_q_heads, SPEC.head_dim), jnp.bfloat16)
    return jax.eval_shape(attend.__call__, q, _pages(attend.layout), batch)


CALLS = {
    "ragged": (
        RaggedBatch([40, 9], [[0, 1, 2], [3, 4, 5]], [0, 5, 6]),
        "it decodes, with as many query rows for every sequence .*and this batch's rows vary",
    ),
    "many rows": (
        RaggedBatch.decode([40, 9], [[0, 1, 2], [3, 4, 5]], query_rows=17),
        "it decodes: 17 query rows per sequence are 136 rows per KV head, of at most 128",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_are_not_decoding_are_refused_by_name(name):
    """By a schedule of the decode kernel, which leaves no other lowering to go to."""
    batch, reason = CALLS[name]
    attend = paged.lower(SPEC, LAYOUT, "tpu", schedule=DecodeSchedule(pages_per_block=2))
    with pytest.raises(ValueError, match=f"No lowering takes this call: tpu-decode: {reason}.*auto.*take any call"):
        _call(attend, batch)


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_are_not_decoding_are_taken_by_the_lowering_for_them(name):
    batch, _ = CALLS[name]
    attend = paged.lower(SPEC, LAYOUT, "tpu", interpret=True)
    q = jax.ShapeDtypeStruct((int(batch.query_starts[-1]), 8, 128), jnp.bfloat16)
    assert attend.choice(Call.of(q, _pages(LAYOUT), batch))[0].name == "tpu-ragged"
    assert _call(attend, batch).shape == q.shape


def test_the_most_query_rows_are_taken():
    batch = RaggedBatch.decode([40, 9], [[0, 1, 2], [3, 4, 5]], query_rows=16)
    assert _call(paged.lower(SPEC, LAYOUT, "tpu", interpret=True), batch).shape == (32, 8, 128)


def test_pages_too_large_for_vector_memory_are_refused():
    spec, layout = SPEC.replace(num_q_heads=128, num_kv_heads=64), _layout(num_kv_heads=64, page_size=256)
    attend = paged.lower(spec, layout, "tpu").on_chip("v4")
    q = jax.ShapeDtypeStruct((1, 128, 128), jnp.bfloat16)
    with pytest.raises(
        ValueError, match=r"two pages of \d+ bytes.*do not fit the vector memory of v4: use smaller pages"
    ):
        jax.eval_shape(attend.__call__, q, _pages(layout), RaggedBatch.decode([9], [[0]]))


CHIPS = {
    "named": ("v4", "for them on v4: lower"),
    "given": (paged.CHIPS["v4"], "for them on v4: lower"),
    "limited": (
        dataclasses.replace(paged.CHIPS["v5e"], vmem_bytes=2**20),
        "for them on v5e with 1048576 bytes of vector memory allowed: lower",
    ),
    "not known": (None, r"for them on a chip that is not known \(the least of all generations is assumed\): lower"),
}


@pytest.mark.parametrize("name", CHIPS)
def test_a_schedule_that_does_not_fit_is_refused_by_the_chips_name(name):
    chip, text = CHIPS[name]
    attend = paged.lower(SPEC, LAYOUT, "tpu", schedule=DecodeSchedule(pages_per_block=1024))
    with pytest.raises(ValueError, match=text):
        (attend if chip is None else attend.on_chip(chip)).choice(Call(8, 8, 2048, 4096, 1, jnp.dtype("bfloat16")))


SCHEDULES = {
    "sequence": ({"sequence": "both"}, ValueError, r"sequence must be one of \('inline', 'grid'\); got 'both'"),
    "buffers": ({"buffers": 1}, ValueError, "buffers must be at least 2; got 1"),
    "splits": ({"kv_splits": 0}, ValueError, "kv_splits must be at least 1; got 0"),
    "cores": ({"cores": True}, TypeError, "cores must be a Python int; got True"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_checks_itself(name):
    changes, kind, text = SCHEDULES[name]
    with pytest.raises(kind, match=text):
        DecodeSchedule(pages_per_block=4, **changes)


@pytest.mark.parametrize("target", ["xla", "auto"])
def test_a_schedule_for_the_tpu_is_not_one_for_xla(target):
    text = rf'"tpu-decode", which target "{target}" does not have here; it has \[\'xla-blocks\'\]. Pass target="tpu"'
    with pytest.raises(ValueError, match=text):
        paged.lower(SPEC, LAYOUT, target, schedule=DecodeSchedule(pages_per_block=4))


def test_only_kernels_can_be_interpreted():
    with pytest.raises(ValueError, match='interpret=True is for kernels, and the lowering "xla-blocks" has none'):
        paged.lower(SPEC, LAYOUT, "xla", interpret=True)
