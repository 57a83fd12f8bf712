"""Hints become the schedule of the kernel that runs, or are refused; where there is no kernel they have no effect."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

import paged
from paged.compat import page_attention, ragged, ragged_page_attention_v2
from paged.compat.hints import Hints, lowered
from paged.lower import Call
from paged.lower.tpu import CHIPS
from paged.spec import AttentionSpec, PageLayout

SPEC = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=128)
LAYOUT = PageLayout(page_size=16, num_kv_heads=2, head_dim=128)
DECODE = Call(tokens=4, slots=4, pages_per_seq=64, num_pages=256, query_rows=1, q_dtype=jnp.dtype("bfloat16"))
RAGGED = dataclasses.replace(DECODE, tokens=256, query_rows=None)


def decode(num_splits=0, blocks=None, megacore=None, inline=True):
    return Hints.of_decode(num_splits, blocks, megacore, inline)


def scheduled(hints, call, generation="v5e", target="tpu"):
    """The schedule that runs on a chip."""
    attend = paged.lower(SPEC, LAYOUT, target).on_chip(generation)
    lowering, schedule = hints.schedule(attend, call)
    return schedule or lowering.schedule(attend.program, LAYOUT, call)


HONOURED = {
    "num_splits": (decode(num_splits=3), DECODE, "kv_splits", 3),
    "pages_per_compute_block": (decode(blocks=5), DECODE, "pages_per_block", 5),
    "inline_seq_dim": (decode(inline=False), DECODE, "sequence", "grid"),
    "num_kv_pages_per_block": (Hints.of_ragged(None, 8), RAGGED, "pages_per_block", 8),
    "num_queries_per_block": (Hints.of_ragged(None, None, 32), RAGGED, "rows_per_tile", 32),
}


@pytest.mark.parametrize("name", HONOURED)
def test_a_hint_becomes_its_field_of_the_schedule_and_no_other(name):
    hints, call, field, value = HONOURED[name]
    own, got = scheduled(Hints(), call), scheduled(hints, call)
    assert getattr(own, field) != value
    assert got == own.replace(**{field: value})


def test_the_memory_limit_shrinks_what_a_kernel_holds():
    for call in (DECODE, RAGGED):
        own, got = scheduled(Hints(), call), scheduled(Hints.of_ragged(2**21), call)
        assert own != got
        sizes = [s.pages_per_block * s.buffers * LAYOUT.bytes_per_page for s in (own, got)]
        assert sizes[1] < min(sizes[0], 2**21)
    assert scheduled(Hints.of_ragged(2**40), RAGGED) == scheduled(Hints(), RAGGED)


def test_the_limit_is_told_to_the_compiler_too():
    attend = lowered("tpu", False, Hints.of_ragged(2**22), SPEC, LAYOUT, RAGGED)
    assert attend.lowering.target_chip.vmem_bytes == 2**22  # pyright: ignore


@pytest.mark.parametrize("generation", ["v4", "v5e"])
def test_batch_is_what_is_done_anyway_both_cores_where_there_are_two(generation):
    got = scheduled(decode(megacore="batch"), DECODE, generation)
    assert got == scheduled(Hints(), DECODE, generation)
    assert got.cores == CHIPS[generation].cores


REFUSED = {
    "splits": (decode(num_splits=65), DECODE, "num_splits=65 asks for.*kv_splits=65, and they have 64 pages.*nearest"),
    "blocks": (decode(blocks=10**4), DECODE, "pages_per_compute_block=10000 asks for.*lower pages_per_block"),
    "rows": (Hints.of_ragged(None, None, 24), RAGGED, "num_queries_per_block=24 asks for.*a power of two"),
    "columns": (Hints.of_ragged(None, 3), RAGGED, "num_kv_pages_per_block=3 asks for.*multiple of 128"),
    "limit": (Hints.of_ragged(1000), RAGGED, "vmem_limit_bytes=1000 is too little: .*do not fit"),
    "no field": (decode(num_splits=2), dataclasses.replace(DECODE, query_rows=64, tokens=256),
                 "num_splits=2 cannot be honoured: the kernel tpu-ragged, which takes this call, has no kv_splits"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_hint_that_a_kernel_cannot_honour_is_refused_by_name(name):
    hints, call, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        scheduled(hints, call)


def test_without_a_kernel_hints_have_no_effect_whatever_they_say():
    for hints, call in ((decode(3, 10**4, "batch", False), DECODE), (Hints.of_ragged(1, 3, 24), RAGGED)):
        assert lowered("xla", False, hints, SPEC, LAYOUT, call) == paged.lower(SPEC, LAYOUT, "xla")


def _jaxpr(entry, *shapes, **arguments):
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return str(jax.make_jaxpr(functools.partial(entry, **arguments))(*arrays))


I32, BF16 = jnp.int32, jnp.bfloat16
PAGE = (((4, 8, 128), BF16), *[((2, 9, 16, 128), BF16)] * 2, ((4,), I32), ((4, 4), I32))
V2 = (((40, 8, 128), BF16), ((9, 16, 4, 128), BF16), ((4,), I32), ((4, 16), I32), ((5,), I32), ((1,), I32))


def test_the_public_arguments_reach_the_kernel():
    plain = _jaxpr(page_attention, *PAGE, target="tpu")
    hints = {"num_splits": 2, "pages_per_compute_block": 2, "inline_seq_dim": False}
    for name, value in hints.items():
        assert _jaxpr(page_attention, *PAGE, target="tpu", **{name: value}) != plain, name
    narrow = _jaxpr(page_attention, *PAGE, target="tpu", max_context_len=33)
    assert "i32[4,3]" in narrow and "i32[4,3]" not in plain


def test_the_public_arguments_of_ragged_batches_reach_the_kernel():
    plain = _jaxpr(ragged_page_attention_v2, *V2, target="tpu")
    hints = {"num_kv_pages_per_block": 8, "num_queries_per_block": 32, "vmem_limit_bytes": 2**22}
    for name, value in hints.items():
        assert _jaxpr(ragged_page_attention_v2, *V2, target="tpu", **{name: value}) != plain, name
    for name, value in {"optimized": True, "compute_dtype": jnp.float16, "mask_value": -1e9}.items():
        assert _jaxpr(ragged_page_attention_v2, *V2, target="tpu", **{name: value}) == plain, name


@pytest.mark.parametrize(("compute_dtype", "window"), [("bfloat16", 31), ("float16", 32), ("float32", 33)])
def test_compute_dtype_widens_to_float32_and_narrows_nothing(compute_dtype, window, monkeypatch):
    """Each call has another window, because calls with equal arguments are traced once."""
    calls = []
    monkeypatch.setattr(ragged, "lowered", lambda *args: calls.append(args[-1]) or lowered(*args))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in V2]
    said = {"target": "tpu", "compute_dtype": compute_dtype, "sliding_window": window}
    jax.eval_shape(functools.partial(ragged_page_attention_v2, **said), *arrays)
    assert [call.q_dtype for call in calls] == ["float32" if compute_dtype == "float32" else "bfloat16"]
