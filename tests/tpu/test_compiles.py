"""The real TPU compiler accepts the kernels: specs, shapes and schedules over five generations, without a TPU.

The few points that always run are those of common models; `make test-kernels` runs a quarter of the
others, and `make test-slow` all.
"""

import pytest

import paged
from paged.lower import compile_for

from .points import (
    abstract_call,
    assert_crosses_generations,
    assert_error_carries_the_compilers_words,
    assert_refused_with_the_nearest,
    assert_takes_back_its_own,
    compiled,
    int8,
    marked,
    needs_libtpu,
    not_fifth,
    table_of,
    wave,
)

POOL_BYTES = 256 * 2**20
_GEMMA = {"head_dim": 256, "group": 2, "spec": {"soft_cap": 50.0}}
_GPT_OSS = {"head_dim": 64, "group": 8, "spec": {"sinks": True, "window": 128}}
_F32 = {"dtype": "float32", "q_dtype": "float32"}

_N, _A, _B = paged.Value("n"), paged.Value("a", 4), paged.Value("b", 4)
_BY_HEAD = paged.PerHead((paged.Window(128), paged.Everything()))


def _scores(*scores):
    return {"spec": {"scores": scores}}


# Points, by what differs from 16 sequences of 4096 tokens, 8 KV heads of 128 with a group of 4, and packed bfloat16
# pages of 16 tokens.
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
    "head_dim 64, int8": int8("head", head_dim=64, order="joined"),
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
    "int8, tensor": int8("tensor"),
    "int8, head": int8("head"),
    "int8, token": int8("token"),
    "int8, token, page 64": int8("token", page_size=64),
    "int8, interleaved": int8("head", order="interleaved"),
    "int8, split": int8("head", order="split", page_size=32),
    "float8_e4m3fn": {"dtype": "float8_e4m3fn", "scales": "head"},
    "float8_e5m2, token": {"dtype": "float8_e5m2", "scales": "token"},
    "ALiBi": _scores(paged.ALiBi()),
    "bias": _scores(paged.Bias(wave)),
    "where": {"spec": {"mask": paged.Where(not_fifth)}},
    "prefix or causal": {"spec": {"causal": False, "mask": paged.Causal() | paged.Prefix(64)}},
    "chunk": {"spec": {"mask": paged.Chunk(1024)}},
    "not causal": {"spec": {"causal": False}},
    "4 query rows": {"rows": 4},
    "8 query rows": {"rows": 8, "group": 8},
    "one of 32k": {"slots": 1, "length": 32768},
    "256 of 32k": {"slots": 256, "length": 32768},
    "4 of 128k, page 8": {"slots": 4, "length": 131072, "page_size": 8},
    "grid": {"schedule": {"sequence": "grid", "pages_per_block": 16}},
    "grid, int8": {**int8("head"), "schedule": {"sequence": "grid", "pages_per_block": 16}},
    "grid, interleaved": {"order": "interleaved", "schedule": {"sequence": "grid", "pages_per_block": 8}},
    "grid, gpt-oss": {**_GPT_OSS, "schedule": {"sequence": "grid", "pages_per_block": 8, "buffers": 4}},
    "grid, splits": {"slots": 2, "schedule": {"sequence": "grid", "pages_per_block": 8, "kv_splits": 4}},
    "splits": {"slots": 2, "schedule": {"pages_per_block": 8, "kv_splits": 4}},
    "update": {"update": True},
    "update, joined": {**_GPT_OSS, "order": "joined", "update": True},
    "update, split": {"order": "split", "update": True},
    "update, interleaved": {"order": "interleaved", "update": True},
    "update, int8": int8("head", update=True),
    "update, int8, token": int8("token", update=True),
    "update, float32, page 8": {**_F32, "page_size": 8, "update": True},
    "update, 4 query rows": {"rows": 4, "update": True},
    "update, grid": {"update": True, "schedule": {"sequence": "grid", "pages_per_block": 16}},
    "one page a block": {"schedule": {"pages_per_block": 1, "buffers": 8}},
    "seven pages per block": {"schedule": {"pages_per_block": 7}},
    "window of each sequence": {"spec": {"window": _N}},
    "prefix of each sequence or causal": {"spec": {"causal": False, "mask": paged.Causal() | paged.Prefix(_N)}},
    "chunk of each sequence": {"spec": {"mask": paged.Chunk(_N)}},
    "spans of each sequence": {"spec": {"causal": False, "mask": paged.Causal() | paged.Spans(_A, _B)}},
    "segments of each sequence, int8": int8("token", spec={"mask": paged.Segments(_A)}),
    "soft cap of each sequence": {"spec": {"soft_cap": paged.Value("f", dtype="float32")}},
    "slopes of each sequence": _scores(paged.ALiBi(paged.Value("m", 32, "float32"))),
    "by head": {"spec": {"mask": _BY_HEAD}},
    "by head, interleaved": {"order": "interleaved", "spec": {"mask": _BY_HEAD}},
    "tree": {"rows": 8, "ancestors": 1, "update": True, "spec": {"mask": paged.Tree()}},
    "tree, gemma 2, int8": {
        **int8("head", rows=8, ancestors=1, head_dim=256, group=2),
        "spec": {"soft_cap": 50.0, "window": 1024, "mask": paged.Tree()},
    },
    "tree, lists, by head, ALiBi": {
        **{"rows": 4, "ancestors": 1, "slots": 4},
        "spec": {"mask": paged.Tree() & paged.Chunk(_N) & _BY_HEAD, "scores": (paged.ALiBi(),)},
    },
    "group 7, 28 heads, update": {"kv_heads": 4, "group": 7, "update": True},
    "group 3, 9 heads of 64": {"kv_heads": 3, "group": 3, "head_dim": 64, "order": "joined"},
    "group 5, float16 queries, grid": {
        **{"group": 5, "q_dtype": "float16"},
        "schedule": {"sequence": "grid", "pages_per_block": 16},
    },
}
# The kernels inline, on the grid and with a write; generations of one core and of two.
FAST = (("llama 8b", "v4"), ("grid", "tpu7x"), ("update", "v5e"))
ALWAYS_IN_THE_TABLE = (*FAST, ("gemma 2", "v6e"), ("gpt-oss", "v5e"), ("int8, head", "tpu7x"), ("interleaved", "v5p"))


TABLE = table_of(POINTS, ALWAYS_IN_THE_TABLE, every=4)


def _call(**point):
    return abstract_call("tpu-decode", POOL_BYTES, **{"slots": 16, "rows": 1, **point})


def _copies_the_pool(point):
    """Whether XLA's layout of the pool is not that of the kernel's copies, so that every call copies the pool."""
    return point.get("head_dim", 128) % 128 != 0 and point.get("order") != "joined"


def _most_temporaries(point):
    """The most temporary memory: half a pool.

    Per-token scales of pages that are no whole lanes are laid out anew for the kernels that read them. Two-core chips
    write first, and lay them out once more.
    """
    is_laid_out_anew = point.get("scales") == "token" and point.get("page_size", 16) % 128 != 0
    return POOL_BYTES if is_laid_out_anew and point.get("update") else POOL_BYTES // 2


@needs_libtpu
@pytest.mark.parametrize(("name", "generation"), marked(TABLE, FAST, every=4))
def test_compiles_without_a_copy_of_the_pool(name, generation):
    point = POINTS[name]
    made = compiled(_call(**point), "tpu-decode", generation, point.get("schedule"))
    assert made.argument_bytes >= POOL_BYTES
    if not _copies_the_pool(point):
        assert made.temporary_bytes < _most_temporaries(point)


def test_the_table_is_large_enough_and_crosses_generations():
    assert_crosses_generations(POINTS, TABLE, FAST, lambda point: point.get("schedule", {}).get("sequence") == "grid")


def test_the_heuristic_is_a_schedule_that_it_would_take_back():
    """At every point, on every generation."""
    for name, point in POINTS.items():
        if "schedule" not in point:
            assert_takes_back_its_own(name, _call(**point))


def test_a_schedule_too_large_for_the_chip_is_refused_with_the_nearest_that_fits():
    large = _call(schedule={"pages_per_block": 256, "buffers": 8})
    match = r"cannot run: its buffers take \d+ bytes .*on v4: lower pages_per_block"
    assert_refused_with_the_nearest(large, _call(), match)


def test_more_cores_than_the_chip_has_are_refused():
    attend, args, _ = _call(schedule={"pages_per_block": 8, "cores": 2})
    with pytest.raises(ValueError, match=r"has cores=2, and a device of v5e has 1.*The nearest that can: tpu-decode"):
        compile_for(attend, "v5e", *args)


def test_an_unknown_generation_is_named():
    attend, args, _ = _call()
    with pytest.raises(ValueError, match=r"generation must be one of \['a100', .*'tpu7x', 'v4', .*\]; got 'v9'"):
        compile_for(attend, "v9", *args)


@needs_libtpu
def test_a_compile_error_carries_the_schedule_and_the_compilers_words(monkeypatch):
    large = _call(page_size=256, schedule={"pages_per_block": 2, "buffers": 24})
    assert_error_carries_the_compilers_words(large, monkeypatch)
