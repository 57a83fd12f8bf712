"""What the lowering for GPUs refuses, each by name, with what would do; and that it runs by name only."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import paged
from paged.lower import Call, GpuDecodeSchedule, refusals
from paged.lower.gpu import GPU_DECODE
from paged.lower.jax_version import HAS_GPU_KERNELS
from paged.spec import Bias, RaggedBatch, Tree

SPEC = paged.AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=128)
LAYOUT = paged.PageLayout(page_size=16, num_kv_heads=2, head_dim=128)
CALL = Call(tokens=16, slots=16, pages_per_seq=64, num_pages=512, query_rows=1, q_dtype=jnp.dtype("bfloat16"))


def _by_a_table(p, j, h):
    return jnp.linspace(0.0, 1.0, 64)[jnp.clip(p - j, 0, 63)]


PROGRAMS = {
    "tree": (SPEC.replace(mask=Tree()), {}, "Tree asks for a row's ancestors"),
    "a table by position": (SPEC.replace(scores=(Bias(_by_a_table),)), {}, "gather, which the kernel has no rule for"),
    "float32": (SPEC, {"dtype": jnp.float32}, "must be float16, bfloat16, int8 or float8.*got float32"),
    "int8 by token": (SPEC, {"dtype": jnp.int8, "scales": "token"}, 'scales must be "head" or "tensor".*got "token"'),
    "float8 by token": (SPEC, {"dtype": jnp.float8_e4m3fn, "scales": "token"}, "no copies of per-token scales"),
    "int8 of short heads": (
        SPEC.replace(head_dim=64),
        {"dtype": jnp.int8, "scales": "head", "head_dim": 64},
        "head_dim of int8 and float8 pages must be 128 or 256.*got 64",
    ),
    "pages of 4": (SPEC, {"page_size": 4}, r"page_size must be 8, 16, 32 or 64 \(got 4\)"),
    "pages of 128": (SPEC, {"page_size": 128}, r"page_size must be 8, 16, 32 or 64 \(got 128\)"),
    "head dim": (SPEC.replace(head_dim=80), {"head_dim": 80}, r"head_dim must be 64, 128 or 256.*got 80"),
    "value dim": (SPEC, {"order": "split", "value_dim": 64}, "got 128 with values of 64"),
}
CALLS = {
    "ragged": ({"query_rows": None}, "it decodes"),
    "many rows": (
        {"tokens": 16 * 9, "query_rows": 9},
        "9 query rows per sequence are 36 rows per KV head, of at most 32",
    ),
    "positions": ({"has_own_rows": True}, "positions of its rows"),
    "queries of float32": ({"q_dtype": jnp.dtype("float32")}, "queries must be bfloat16.*got float32"),
    "no page": ({"num_pages": 0}, "no page"),
}
NARROW_CALLS = {
    "many rows": ({"tokens": 16 * 5, "query_rows": 5}, "20 rows per KV head, of at most 16 for int8 and float8 pages"),
    "queries of float32": ({"q_dtype": jnp.dtype("float32")}, "int8 and float8 pages must be float16 or bfloat16"),
}
SCHEDULES = {
    "tokens": (GpuDecodeSchedule(pages_per_block=2), "its page blocks have 32 tokens"),
    "memory": (GpuDecodeSchedule(pages_per_block=4, stages=8), "lower stages or pages_per_block"),
    "splits": (GpuDecodeSchedule(pages_per_block=4, kv_splits=65), "kv_splits=65, and they have 64 pages"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_or_layout_is_refused_by_name(name):
    spec, fields, words = PROGRAMS[name]
    with pytest.raises(ValueError, match=f"(?s)gpu-decode: .*{words}"):
        paged.lower(spec, LAYOUT.replace(**fields), "gpu")


def test_an_earlier_jax_is_refused_by_name():
    reason = GPU_DECODE.refuses(paged.Program.from_spec(SPEC), LAYOUT)
    assert (reason is None) == HAS_GPU_KERNELS == (jax.__version_info__ >= (0, 11))
    assert HAS_GPU_KERNELS or "JAX 0.11 or later" in str(reason)


@pytest.mark.skipif(not HAS_GPU_KERNELS, reason=f"every program is refused on JAX {jax.__version__}")
@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_refused_by_name(name):
    changes, words = CALLS[name]
    reason = GPU_DECODE.refuses(paged.Program.from_spec(SPEC), LAYOUT, dataclasses.replace(CALL, **changes))
    assert reason is not None and words.split(".*")[0] in reason
    assert GPU_DECODE.refuses(paged.Program.from_spec(SPEC), LAYOUT, CALL) is None


@pytest.mark.skipif(not HAS_GPU_KERNELS, reason=f"every program is refused on JAX {jax.__version__}")
@pytest.mark.parametrize("name", NARROW_CALLS)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_a_call_over_8_bit_pages_is_refused_by_name(dtype, name):
    changes, words = NARROW_CALLS[name]
    program, layout = paged.Program.from_spec(SPEC), LAYOUT.replace(dtype=dtype, scales="tensor")
    assert words in str(GPU_DECODE.refuses(program, layout, dataclasses.replace(CALL, **changes)))
    assert GPU_DECODE.refuses(program, layout, dataclasses.replace(CALL, tokens=64, query_rows=4)) is None


def test_rows_that_do_not_fit_beside_three_tiles_are_refused():
    spec, layout = SPEC.replace(num_q_heads=32, head_dim=256), LAYOUT.replace(head_dim=256)
    program = paged.Program.from_spec(spec)
    if HAS_GPU_KERNELS:
        assert GPU_DECODE.refuses(program, layout, CALL) is None
        two = dataclasses.replace(CALL, query_rows=2, tokens=32)
        assert "32 rows of 256 per KV head do not fit" in str(GPU_DECODE.refuses(program, layout, two))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_cannot_run_says_why(name):
    schedule, words = SCHEDULES[name]
    assert words in str(GPU_DECODE.cannot_honour(paged.Program.from_spec(SPEC), LAYOUT, CALL, schedule))


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (128, "int8"), (256, "float8_e4m3fn")],
)
@pytest.mark.parametrize("page_size", [8, 16, 32, 64])
def test_every_candidate_fits_and_no_sequence_is_split_into_nothing(head_dim, dtype, page_size):
    scales = None if dtype == "bfloat16" else "head"
    layout = LAYOUT.replace(head_dim=head_dim, page_size=page_size, dtype=dtype, scales=scales)
    spec = SPEC.replace(head_dim=head_dim)
    program = paged.Program.from_spec(spec)
    for slots, width in ((1, 4), (16, 4096 // page_size), (256, 64)):
        call = dataclasses.replace(CALL, slots=slots, tokens=slots, pages_per_seq=width)
        candidates = GPU_DECODE.candidates(program, layout, call)
        assert candidates[0] == GPU_DECODE.schedule(program, layout, call)
        assert all(GPU_DECODE.cannot_honour(program, layout, call, one) is None for one in candidates)


def test_auto_leaves_it_out_even_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [low.name for low in paged.lower(SPEC, LAYOUT).lowerings] == ["xla-blocks"]
    assert "gpu-decode" in refusals(paged.Program.from_spec(SPEC), LAYOUT, "gpu")


class _Device:
    def __init__(self, device_kind, compute_capability):
        self.device_kind, self.compute_capability = device_kind, compute_capability


@pytest.mark.skipif(not HAS_GPU_KERNELS, reason=f"every program is refused on JAX {jax.__version__}")
def test_a_gpu_of_another_generation_is_refused_by_name(monkeypatch):
    program, devices = paged.Program.from_spec(SPEC), [_Device("NVIDIA A100-SXM4-80GB", "8.0")]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: devices)
    assert "Hopper, H100 and H200; this is another GPU: NVIDIA A100" in str(GPU_DECODE.refuses(program, LAYOUT))
    assert GPU_DECODE.on_chip("h200").refuses(program, LAYOUT) is None
    devices[0] = _Device("NVIDIA H200", "9.0")
    assert GPU_DECODE.refuses(program, LAYOUT) is None
    assert GPU_DECODE.target_gpu.name == "h200"


@pytest.mark.skipif(not HAS_GPU_KERNELS, reason=f"every program is refused on JAX {jax.__version__}")
@pytest.mark.parametrize("generation", ["a100", "b200"])
def test_to_compile_for_another_generation_is_refused_by_name(generation):
    attend = paged.lower(SPEC, LAYOUT, "gpu").on_chip(generation)
    with pytest.raises(ValueError, match=f"Hopper, H100 and H200; this is another GPU: {generation}"):
        attend.choice(CALL)


@pytest.mark.skipif(not HAS_GPU_KERNELS, reason=f"every program is refused on JAX {jax.__version__}")
def test_explain_says_that_it_was_never_timed():
    batch = RaggedBatch.decode(jnp.array([40, 700]), jnp.arange(128, dtype=jnp.int32).reshape(2, 64))
    q, pages = jnp.zeros((2, 8, 128), jnp.bfloat16), LAYOUT.init(num_pages=128)
    explanation = paged.lower(SPEC, LAYOUT, "gpu").explain(q, pages, batch)
    assert explanation.schedule.lowering == "gpu-decode"
    assert "never timed" in explanation.notes[-1]
