"""Hints become the nearest schedule that the kernel can run, on every chip; without a kernel they have no effect."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

import paged
from paged.compat import page_attention, ragged_page_attention_v2, ragged_steps
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


def chosen(hints, call, generation="v5e", target="tpu", spec=SPEC, layout=LAYOUT):
    """The schedule that runs on a chip, or on this machine's stand-in for one, and who picked it."""
    attend = paged.lower(spec, layout, target)
    attend = attend if generation is None else attend.on_chip(generation)
    return hints.schedule(attend, call)[1:]


def scheduled(hints, call, generation="v5e"):
    """The schedule that runs on a chip."""
    return chosen(hints, call, generation)[0]


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
    own, (got, source) = scheduled(Hints(), call), chosen(hints, call)
    assert getattr(own, field) != value
    assert got == own.replace(**{field: value})
    assert source.startswith(f"hints, {name}=")


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


NEAREST = {
    "splits": (decode(num_splits=65), DECODE, {"kv_splits": 64}),
    "blocks": (decode(blocks=10**4), DECODE, {"pages_per_block": 64}),
    "rows between": (Hints.of_ragged(None, None, 24), RAGGED, {"rows_per_tile": 32}),
    "rows under": (Hints.of_ragged(None, None, 1), RAGGED, {"rows_per_tile": 16}),
    "columns": (Hints.of_ragged(None, 3), RAGGED, {"pages_per_block": 8}),
    "columns over": (Hints.of_ragged(None, 13), RAGGED, {"pages_per_block": 16}),
    "no field": (decode(num_splits=2), dataclasses.replace(DECODE, query_rows=64, tokens=256), {}),
    "heads among cores": (decode(megacore="kv_head"), DECODE, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAREST)
def test_the_nearest_schedule_runs_where_a_kernel_cannot_do_what_a_hint_asks(name):
    hints, call, changed = NEAREST[name]
    got, source = chosen(hints, call)
    own = scheduled(Hints(), call)
    for field, value in changed.items():
        assert getattr(got, field) == value
    assert changed or got == own
    assert source == f"hints, the nearest to {hints}"


def test_the_least_memory_that_is_enough_is_used_where_a_limit_is_not():
    got, source = chosen(Hints.of_ragged(1000), RAGGED)
    enough, exact = chosen(Hints.of_ragged(1000 * 2**11), RAGGED)
    assert got == enough and exact == "hints, vmem_limit_bytes=2048000"
    assert source == "hints, the nearest to vmem_limit_bytes=1000"
    attend = paged.lower(SPEC, LAYOUT, "tpu").on_chip("v5e")
    less = attend.lowerings[1].within_memory(1000 * 2**10)
    assert "do not fit" in less.refuses(attend.program, LAYOUT, RAGGED)


# The pairs of pages and queries per block that the tests and models of other libraries pass.
PAGES, QUERIES = (1, 2, 4, 8, 16, 32), (8, 16, 32, 64, 128)
WIDE = SPEC.replace(num_q_heads=32, num_kv_heads=8)
FULL = Call(tokens=512, slots=8, pages_per_seq=32, num_pages=1000, query_rows=None, q_dtype=jnp.dtype("bfloat16"))
# Every pair without a chip; those at the corners for every chip.
PAIRS = [(None, pages, queries) for pages in PAGES for queries in QUERIES]
PAIRS += [(chip, pages, queries) for chip in CHIPS for pages, queries in ((1, 8), (1, 128), (8, 64), (32, 128))]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_pair_of_block_sizes_runs_on_every_chip(dtype):
    layout = PageLayout(page_size=16, num_kv_heads=8, head_dim=128, dtype=dtype, order="interleaved")
    call = dataclasses.replace(FULL, q_dtype=jnp.dtype(dtype))
    attend = paged.lower(WIDE, layout, "tpu")
    for chip, pages, queries in PAIRS if dtype == "bfloat16" else PAIRS[::9]:
        hints = Hints.of_ragged(32 * 2**20, pages, queries)
        one = attend if chip is None else attend.on_chip(chip)
        lowering, schedule, _ = hints.schedule(one, call)
        assert lowering.cannot_honour(one.program, layout, call, schedule) is None, (chip, pages, queries)
        assert schedule.pages_per_block <= max(pages, 8) and schedule.rows_per_tile <= max(queries, 16)


@pytest.mark.parametrize("page_size, pages", [(16, 128), (128, 16)])
def test_blocks_of_2048_tokens_in_one_row_per_sequence_run_on_every_chip(page_size, pages):
    for chip in (None, *CHIPS):
        for heads, dtype in ((8, "float32"), (1, "bfloat16")):
            spec = SPEC.replace(num_q_heads=8 * heads, num_kv_heads=heads, head_dim=256)
            layout = PageLayout(page_size=page_size, num_kv_heads=heads, head_dim=256, dtype=dtype, order="split")
            call = Call(6, 6, 2048 // page_size, 256, 1, jnp.dtype(dtype))
            schedule, source = chosen(decode(blocks=pages), call, chip, "tpu", spec, layout)
            assert schedule.pages_per_block == pages or "nearest" in source


def test_without_a_kernel_hints_have_no_effect_whatever_they_say():
    for hints, call in ((decode(3, 10**4, "batch", False), DECODE), (Hints.of_ragged(1, 3, 24), RAGGED)):
        assert lowered("xla", False, hints, SPEC, LAYOUT, call) == paged.lower(SPEC, LAYOUT, "xla")


def test_a_schedule_that_is_no_hint_is_still_refused():
    attend = paged.lower(SPEC, LAYOUT, "tpu", schedule=paged.DecodeSchedule(pages_per_block=8, kv_splits=65))
    with pytest.raises(ValueError, match=r"kv_splits=65, and they have 64 pages.*nearest that can"):
        attend.choice(DECODE)


def test_the_attention_says_that_hints_chose_its_schedule():
    attend = lowered("tpu", False, decode(num_splits=3), SPEC, LAYOUT, DECODE)
    assert attend.choice(DECODE).source == attend.explain().source == "hints, num_splits=3"


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


@pytest.mark.kernels
def test_the_public_arguments_of_ragged_batches_reach_the_kernel():
    plain = _jaxpr(ragged_page_attention_v2, *V2, target="tpu")
    hints = {"num_kv_pages_per_block": 8, "num_queries_per_block": 32, "vmem_limit_bytes": 2**22}
    for name, value in hints.items():
        assert _jaxpr(ragged_page_attention_v2, *V2, target="tpu", **{name: value}) != plain, name
    for name, value in {"optimized": True, "compute_dtype": jnp.float16, "mask_value": -1e9}.items():
        assert _jaxpr(ragged_page_attention_v2, *V2, target="tpu", **{name: value}) == plain, name


@pytest.mark.parametrize(
    ("compute_dtype", "window"),
    [("bfloat16", 31), *(pytest.param(*row, marks=pytest.mark.kernels) for row in (("float16", 32), ("float32", 33)))],
)
def test_compute_dtype_widens_to_float32_and_narrows_nothing(compute_dtype, window, monkeypatch):
    """Each call has another window, because calls with equal arguments are traced once."""
    calls = []
    monkeypatch.setattr(ragged_steps, "lowered", lambda *args: calls.append(args[-1]) or lowered(*args))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in V2]
    said = {"target": "tpu", "compute_dtype": compute_dtype, "sliding_window": window}
    jax.eval_shape(functools.partial(ragged_page_attention_v2, **said), *arrays)
    assert [call.q_dtype for call in calls] == ["float32" if compute_dtype == "float32" else "bfloat16"]
