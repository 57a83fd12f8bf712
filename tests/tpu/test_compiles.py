"""The real TPU compiler takes the kernels: specs, shapes and schedules over five generations, without a TPU.

A point is compiled for one or two generations, so that each generation meets every family of points. The few that run
always are those of models people have; with ``-m "slow or not slow"`` all do.
"""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower import Call, CompileError, Schedule, compile_for
from paged.lower.tpu import CHIPS

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is in the package libtpu, which is not here"
)
POOL_BYTES = 256 * 2**20
GENERATIONS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
assert set(GENERATIONS) == set(CHIPS)


def _wave(p, j, h):
    return 0.1 * jnp.sin(p - j) + 0.01 * h


def _not_fifth(p, j):
    return (p + j) % 5 != 0


_GEMMA = {"head_dim": 256, "group": 2, "spec": {"soft_cap": 50.0}}
_GPT_OSS = {"head_dim": 64, "group": 8, "spec": {"sinks": True, "window": 128}}
_F32 = {"dtype": "float32", "q_dtype": "float32"}


def _int8(scales, **facts):
    return {"dtype": "int8", "scales": scales, **facts}


def _scores(*scores):
    return {"spec": {"scores": scores}}


# What differs from 16 sequences of 4096 tokens, 8 KV heads of 128 with a group of 4, bfloat16, pages of 16, packed.
POINTS = {
    "llama 8b": {},
    "llama 70b": {"group": 8},
    "gemma 2": _GEMMA,
    "gemma 2, window": {**_GEMMA, "spec": {"soft_cap": 50.0, "window": 1024}},
    "gpt-oss": {**_GPT_OSS, "order": "joined"},
    "gpt-oss, page 64": {**_GPT_OSS, "order": "joined", "page_size": 64},
    "gpt-oss, packed": _GPT_OSS,
    "page 8": {"page_size": 8},
    "page 64": {"page_size": 64},
    "page 256": {"page_size": 256},
    "head_dim 80": {"head_dim": 80, "order": "joined"},
    "head_dim 96": {"head_dim": 96, "order": "joined"},
    "head_dim 96, split": {"head_dim": 96, "order": "split"},
    "head_dim 64, int8": _int8("head", head_dim=64, order="joined"),
    "MQA, 16": {"kv_heads": 1, "group": 16},
    "MHA, 16": {"kv_heads": 16, "group": 1},
    "group 3": {"group": 3},
    "group 5": {"group": 5},
    "split": {"order": "split"},
    "split, page 64": {"order": "split", "page_size": 64},
    "interleaved": {"order": "interleaved"},
    "interleaved, page 64": {"order": "interleaved", "page_size": 64},
    "interleaved MQA": {"order": "interleaved", "kv_heads": 1, "group": 8},
    "float32": _F32,
    "float32, small": {**_F32, "kv_heads": 2, "page_size": 32},
    "float32 queries": {"q_dtype": "float32", "kv_heads": 2},
    "float16 queries": {"q_dtype": "float16", "kv_heads": 2},
    "int8, tensor": _int8("tensor"),
    "int8, head": _int8("head"),
    "int8, token": _int8("token"),
    "int8, token, page 64": _int8("token", page_size=64),
    "int8, interleaved": _int8("head", order="interleaved"),
    "int8, split": _int8("head", order="split", page_size=32),
    "float8_e4m3fn": {"dtype": "float8_e4m3fn", "scales": "head"},
    "float8_e5m2, token": {"dtype": "float8_e5m2", "scales": "token"},
    "ALiBi": _scores(paged.ALiBi()),
    "bias": _scores(paged.Bias(_wave)),
    "where": {"spec": {"mask": paged.Where(_not_fifth)}},
    "prefix or causal": {"spec": {"causal": False, "mask": paged.Causal() | paged.Prefix(64)}},
    "chunk": {"spec": {"mask": paged.Chunk(1024)}},
    "not causal": {"spec": {"causal": False}},
    "4 query rows": {"rows": 4},
    "8 query rows": {"rows": 8, "group": 8},
    "one of 32k": {"slots": 1, "length": 32768},
    "256 of 32k": {"slots": 256, "length": 32768},
    "4 of 128k, page 8": {"slots": 4, "length": 131072, "page_size": 8},
    "grid": {"schedule": {"sequence": "grid", "pages_per_block": 16}},
    "grid, int8": {**_int8("head"), "schedule": {"sequence": "grid", "pages_per_block": 16}},
    "grid, interleaved": {"order": "interleaved", "schedule": {"sequence": "grid", "pages_per_block": 8}},
    "grid, gpt-oss": {**_GPT_OSS, "schedule": {"sequence": "grid", "pages_per_block": 8, "buffers": 4}},
    "grid, splits": {"slots": 2, "schedule": {"sequence": "grid", "pages_per_block": 8, "kv_splits": 4}},
    "splits": {"slots": 2, "schedule": {"pages_per_block": 8, "kv_splits": 4}},
    "update": {"update": True},
    "update, joined": {**_GPT_OSS, "order": "joined", "update": True},
    "update, split": {"order": "split", "update": True},
    "update, interleaved": {"order": "interleaved", "update": True},
    "update, int8": _int8("head", update=True),
    "update, int8, token": _int8("token", update=True),
    "update, float32, page 8": {**_F32, "page_size": 8, "update": True},
    "update, 4 query rows": {"rows": 4, "update": True},
    "update, grid": {"update": True, "schedule": {"sequence": "grid", "pages_per_block": 16}},
    "one page a block": {"schedule": {"pages_per_block": 1, "buffers": 8}},
    "seven pages a block": {"schedule": {"pages_per_block": 7}},
}
FAST = (
    ("llama 8b", "v4"),
    ("gemma 2", "v6e"),
    ("gpt-oss", "v5e"),
    ("int8, head", "tpu7x"),
    ("interleaved", "v5p"),
    ("grid", "tpu7x"),
    ("update", "v5e"),
)


def _table():
    """Every point for one generation, in turn; the first of each four for a second one; and the fast ones."""
    names = list(POINTS)
    table = [(name, GENERATIONS[i % 5]) for i, name in enumerate(names)]
    table += [(name, GENERATIONS[(i + 2 + i // 5) % 5]) for i, name in enumerate(names) if i % 4 == 0]
    return list(dict.fromkeys((*FAST, *table)))


TABLE = _table()


def _call(
    slots=16, length=4096, page_size=16, kv_heads=8, group=4, head_dim=128, rows=1, order="packed", dtype="bfloat16",
    scales=None, q_dtype="bfloat16", schedule=None, spec=None, update=False,
):  # fmt: skip
    """The lowered attention, the abstract arguments of a point, and the new keys and values if it is an update."""
    layout = paged.PageLayout(
        page_size=page_size, num_kv_heads=kv_heads, head_dim=head_dim, dtype=jnp.dtype(dtype), order=order,
        scales=scales,
    )  # fmt: skip
    spec = paged.AttentionSpec(num_q_heads=kv_heads * group, num_kv_heads=kv_heads, head_dim=head_dim, **(spec or {}))
    num_pages = POOL_BYTES // layout.bytes_per_page
    arrays = [jax.ShapeDtypeStruct(shape, layout.dtype) for shape in layout.array_shapes(num_pages)]
    if scales is not None:
        scale = jax.ShapeDtypeStruct(layout.scale_shape(num_pages), jnp.float32)
        scales = {"k_scale": scale, "v_scale": scale}
    tables = np.zeros((slots, -(-length // page_size)), int)
    batch = paged.RaggedBatch.decode(np.full(slots, length), tables, query_rows=rows)
    q = jax.ShapeDtypeStruct((slots * rows, spec.num_q_heads, head_dim), jnp.dtype(q_dtype))
    sinks = jax.ShapeDtypeStruct((spec.num_q_heads,), jnp.float32) if spec.sinks else None
    chosen = None if schedule is None else Schedule(lowering="tpu-decode", **schedule)
    attend = paged.lower(spec, layout, "tpu", schedule=chosen)
    new = jax.ShapeDtypeStruct((slots * rows, kv_heads, head_dim), jnp.dtype(q_dtype))
    args = (q, layout.wrap(*arrays, **(scales or {})), batch, sinks)
    return attend, args, {"new": (new, new)} if update else {}


def _marked(name, generation):
    marks = [] if (name, generation) in FAST else [pytest.mark.slow]
    return pytest.param(name, generation, id=f"{name}-{generation}", marks=marks)


def _copies_the_pool(point):
    """Where XLA's layout of the pool is not what a kernel's transfers take, it puts a copy before every call."""
    return point.get("head_dim", 128) % 128 != 0 and point.get("order") != "joined"


def _most_temporaries(point):
    """Half a pool. Scales a token, of pages of no whole lanes, are laid out anew for the kernels that read them, and on
    two-core chips, where the write goes first, once more."""
    is_laid_out_anew = point.get("scales") == "token" and point.get("page_size", 16) % 128 != 0
    return POOL_BYTES if is_laid_out_anew and point.get("update") else POOL_BYTES // 2


@needs_libtpu
@pytest.mark.parametrize(("name", "generation"), [_marked(*point) for point in TABLE])
def test_compiles_without_a_copy_of_the_pool(name, generation):
    attend, args, new = _call(**POINTS[name])
    compiled = compile_for(attend, generation, *args, **new)
    assert compiled.lowering == "tpu-decode" and compiled.generation == generation
    assert compiled.schedule.lowering == "tpu-decode" and compiled.code_bytes > 0
    assert compiled.argument_bytes >= POOL_BYTES
    if not _copies_the_pool(POINTS[name]):
        assert compiled.temporary_bytes < _most_temporaries(POINTS[name])
    for field, value in (POINTS[name].get("schedule") or {}).items():
        assert getattr(compiled.schedule, field) == value


def test_the_table_is_large_enough_and_crosses_generations():
    assert len(TABLE) >= 60 and set(FAST) <= set(TABLE)
    for generation in GENERATIONS:
        facts = [POINTS[name] for name, to in TABLE if to == generation]
        assert len(facts) >= 10
        assert any("schedule" in point and point["schedule"].get("sequence") == "grid" for point in facts)
        assert any("scales" in point for point in facts) and any("spec" in point for point in facts)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", [name for name, point in POINTS.items() if "schedule" not in point])
def test_the_heuristic_is_a_schedule_that_it_would_take_back(name, generation):
    """What is chosen fits the chip by the lowering's own rule: a default never needs more memory than there is."""
    attend, (q, pages, batch, _), _ = _call(**POINTS[name])
    call = Call.of(q, pages, batch)
    lowering = attend.lowering.on_chip(CHIPS[generation])
    schedule = lowering.schedule(attend.program, attend.layout, call)
    assert lowering.cannot_honour(attend.program, attend.layout, call, schedule) is None
    assert lowering.refuses(attend.program, attend.layout, call) is None


def test_a_schedule_too_large_for_the_chip_is_refused_with_the_nearest_that_fits():
    attend, args, _ = _call(schedule={"pages_per_block": 256, "buffers": 8})
    with pytest.raises(ValueError, match=r"cannot run: its buffers take \d+ bytes .*on v4: lower pages_per_block") as e:
        compile_for(attend, "v4", *args)
    own = _call()[0].on_chip(CHIPS["v4"])
    nearest = own.choose(Call.of(*args[:3]))[1]
    assert f"The nearest that can: {nearest}." in str(e.value)


def test_more_cores_than_the_chip_has_are_refused():
    attend, args, _ = _call(schedule={"pages_per_block": 8, "cores": 2})
    with pytest.raises(ValueError, match=r"has cores=2, and a device of v5e has 1.*The nearest that can: tpu-decode"):
        compile_for(attend, "v5e", *args)


def test_an_unknown_generation_is_named():
    attend, args, _ = _call()
    with pytest.raises(ValueError, match=r"generation must be one of \['tpu7x', 'v4', .*\]; got 'v9'"):
        compile_for(attend, "v9", *args)


@needs_libtpu
def test_a_compile_error_carries_the_schedule_and_the_compilers_words(monkeypatch):
    """A chip said to have sixty times its memory: the schedule passes our rule, and the compiler finds it out."""
    attend, args, _ = _call(page_size=256, schedule={"pages_per_block": 2, "buffers": 24})
    large = dataclasses.replace(CHIPS["v4"], vmem_bytes=2**30)
    monkeypatch.setitem(CHIPS, "v4", large)
    with pytest.raises(CompileError) as error:
        compile_for(attend, "v4", *args)
    assert error.value.schedule == attend.schedule and error.value.generation == "v4"
    assert str(attend.schedule) in str(error.value) and "vmem" in error.value.reason.lower()
