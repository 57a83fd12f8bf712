"""The real TPU compiler accepts the prefill kernel, and in mixed batches the decode kernel too. It needs no TPU.

The few points that always run have few heads, so that they compile fast. `make test-kernels` runs one in
thirteen of the others, and `make test-slow` all.
"""

import dataclasses

import pytest

import paged
from paged.lower.tpu import TPU_RAGGED

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

# Many times the memory of the largest point's queries and results, so that a copy of the pool cannot be overlooked.
POOL_BYTES = 4 * 2**30

_SMALL = {"kv_heads": 2, "group": 2}
_LLAMA_70B = {"group": 8}
_GEMMA_2 = {"head_dim": 256, "group": 2, "spec": {"soft_cap": 50.0}}
_GEMMA_3 = {"kv_heads": 16, "group": 2, "spec": {"window": 1024}}
_GPT_OSS = {"head_dim": 64, "group": 8, "order": "joined", "spec": {"sinks": True, "window": 128}}
_F32 = {"dtype": "float32", "q_dtype": "float32", **_SMALL}
_MIXED = {"slots": 64, "rows": None, "tokens": 1024}
_A, _B = paged.Value("a", 2), paged.Value("b", 2)


def _scores(*scores):
    return {**_SMALL, "spec": {"scores": scores}}


def _masked(mask, **spec):
    return {**_SMALL, "spec": {"mask": mask, **spec}}


# How each point differs from this one: a chunk of 512 tokens at the end of 4096; 8 KV heads of 128, with a group of 4;
# bfloat16; pages of 16 tokens in packed order. Of mixed batches only the number of tokens is known.
POINTS = {
    "llama 8b": {},
    "llama 8b, 1 row": {"rows": 1},
    "llama 8b, 16 rows": {"rows": 16},
    "llama 8b, 100 rows": {"rows": 100},
    "llama 8b, 2048 rows": {"rows": 2048},
    "llama 8b, 4096 rows": {"rows": 4096},
    "llama 8b, 32k": {"rows": 2048, "length": 32768},
    "llama 8b, 128k": {"rows": 512, "length": 131072},
    "llama 8b, 128k, pages of 8": {"rows": 512, "length": 131072, "page_size": 8},
    "llama 8b, mixed": _MIXED,
    "llama 8b, mixed, 32k": {**_MIXED, "length": 32768, "page_size": 64},
    "llama 8b, 8 chunks of 100": {"slots": 8, "rows": 100},
    "llama 70b": _LLAMA_70B,
    "llama 70b, 16 rows": {**_LLAMA_70B, "rows": 16},
    "llama 70b, 2048 rows, 128k": {**_LLAMA_70B, "rows": 2048, "length": 131072, "page_size": 64},
    "llama 70b, mixed": {**_LLAMA_70B, **_MIXED},
    "gemma 2": _GEMMA_2,
    "gemma 2, window": {**_GEMMA_2, "spec": {"soft_cap": 50.0, "window": 4096}, "length": 8192},
    "gemma 2, 2048 rows": {**_GEMMA_2, "rows": 2048, "length": 8192},
    "gemma 2, mixed": {**_GEMMA_2, **_MIXED},
    "gemma 3": _GEMMA_3,
    "gemma 3, 4096 rows": {**_GEMMA_3, "rows": 4096, "length": 32768},
    "gemma 3, mixed": {**_GEMMA_3, **_MIXED},
    "qwen 3, 40 heads": {"group": 5},
    "qwen 3, 40 heads, mixed": {"group": 5, **_MIXED},
    "qwen 3, 32 heads": {"kv_heads": 4, "group": 8},
    "qwen 3, 32 heads, 100 rows": {"kv_heads": 4, "group": 8, "rows": 100, "length": 32768},
    "gpt-oss": _GPT_OSS,
    "gpt-oss, 2048 rows": {**_GPT_OSS, "rows": 2048, "length": 32768},
    "gpt-oss, page 64": {**_GPT_OSS, "page_size": 64},
    "gpt-oss, mixed": {**_GPT_OSS, **_MIXED},
    "MQA, 16": {"kv_heads": 1, "group": 16},
    "MQA, 16, mixed": {"kv_heads": 1, "group": 16, **_MIXED},
    "MHA, 16": {"kv_heads": 16, "group": 1},
    "MHA, 16, 2048 rows": {"kv_heads": 16, "group": 1, "rows": 2048},
    "small": _SMALL,
    "small, mixed": {**_SMALL, **_MIXED},
    "small, group 3": {"kv_heads": 2, "group": 3},
    "page 8": {"page_size": 8, **_SMALL},
    "page 32": {"page_size": 32, **_SMALL},
    "page 64": {"page_size": 64, **_SMALL},
    "page 128": {"page_size": 128, **_SMALL},
    "page 256": {"page_size": 256, **_SMALL},
    "page 256, 8 heads": {"page_size": 256},
    "page 24": {"page_size": 24, "kv_heads": 1, "group": 2},
    "joined": {"order": "joined", **_SMALL},
    "joined, head_dim 80": {"order": "joined", "head_dim": 80, **_SMALL},
    "joined, head_dim 96": {"order": "joined", "head_dim": 96, **_SMALL},
    "joined, head_dim 64, int8": int8("head", order="joined", head_dim=64, **_SMALL),
    "split": {"order": "split"},
    "split, page 64": {"order": "split", "page_size": 64, **_SMALL},
    "split, head_dim 64": {"order": "split", "head_dim": 64, **_SMALL},
    "packed, head_dim 64": {"head_dim": 64, **_SMALL},
    "interleaved": {"order": "interleaved"},
    "interleaved, page 64": {"order": "interleaved", "page_size": 64, **_SMALL},
    "interleaved MQA": {"order": "interleaved", "kv_heads": 1, "group": 8},
    "interleaved, mixed": {"order": "interleaved", **_MIXED},
    "int8, tensor": int8("tensor", **_SMALL),
    "int8, head": int8("head"),
    "int8, head, mixed": int8("head", **_MIXED),
    "int8, token": int8("token", page_size=64, **_SMALL),
    "int8, token, page 128": int8("token", page_size=128),
    "int8, token, page 16": int8("token", **_SMALL),
    "int8, interleaved": int8("head", order="interleaved", **_SMALL),
    "int8, split": int8("head", order="split", page_size=32, **_SMALL),
    "float8_e4m3fn": {"dtype": "float8_e4m3fn", "scales": "head", **_SMALL},
    "float8_e5m2, token": {"dtype": "float8_e5m2", "scales": "token", "page_size": 128, **_SMALL},
    "float32": _F32,
    "float32, interleaved": {**_F32, "order": "interleaved"},
    "float32, joined": {**_F32, "order": "joined", "head_dim": 64},
    "float32 queries": {"q_dtype": "float32", **_SMALL},
    "float16 queries": {"q_dtype": "float16", **_SMALL},
    "ALiBi": _scores(paged.ALiBi()),
    "ALiBi, 8 heads": {"spec": {"scores": (paged.ALiBi(),)}},
    "bias": _scores(paged.Bias(wave)),
    "where": _masked(paged.Where(not_fifth)),
    "chunk": _masked(paged.Chunk(1024)),
    "prefix or causal": _masked(paged.Causal() | paged.Prefix(64), causal=False),
    "not causal": {**_SMALL, "spec": {"causal": False}},
    "update": {"update": True, **_SMALL},
    "update, mixed": {"update": True, **_SMALL, **_MIXED},
    "update, joined": {**_GPT_OSS, "update": True},
    "update, split": {"order": "split", "update": True, **_SMALL},
    "update, interleaved": {"order": "interleaved", "update": True, **_SMALL},
    "update, int8": int8("head", update=True, **_SMALL),
    "update, int8, token": int8("token", update=True, page_size=128, **_SMALL),
    "one block of 128": {"schedule": {"pages_per_block": 8, "rows_per_tile": 64, "buffers": 2}, **_SMALL},
    "tiles of 16 rows": {"schedule": {"pages_per_block": 16, "rows_per_tile": 16, "buffers": 3}},
    "large tiles": {"schedule": {"pages_per_block": 16, "rows_per_tile": 1024, "buffers": 2}, **_SMALL},
    "spans of each sequence": _masked(paged.Causal() | paged.Spans(_A, _B), causal=False),
    "segments of each sequence, soft cap, mixed": {
        **_masked(paged.Segments(_A), soft_cap=paged.Value("f", dtype="float32")),
        **_MIXED,
    },
    "by head": _masked(paged.PerHead((paged.Window(40), paged.Everything()))),
    "tree, window of each sequence, ALiBi, mixed": {
        **_masked(paged.Tree(), window=paged.Value("n"), scores=(paged.ALiBi(),)),
        **_MIXED,
        "ancestors": 2,
    },
    "tree or prefix, interleaved": {
        **_masked(paged.Tree() & (paged.Chunk(400) | paged.Prefix(90))),
        "order": "interleaved",
        "ancestors": 16,
    },
}
FAST = ()  # `test_around.py` compiles a mixed batch in every run
ALWAYS_IN_THE_TABLE = (("small", "v4"), ("joined", "tpu7x"), ("interleaved, page 64", "v6e"))


TABLE = table_of(POINTS, ALWAYS_IN_THE_TABLE, every=5)


def _call(**point):
    attend, args, new = abstract_call("tpu-ragged", POOL_BYTES, **{"slots": 1, "rows": 512, **point})
    return dataclasses.replace(attend, lowerings=(TPU_RAGGED,)), args, new


def _copies_the_pool(point):
    """Whether XLA copies the pool before every call, because its layout is not the one that the kernel's copies need.

    So it is for heads that do not fill whole registers of 128 lanes, and for per-token scales of pages that do not.
    """
    is_narrow = point.get("head_dim", 128) % 128 != 0 and point.get("order") != "joined"
    return is_narrow or (point.get("scales") == "token" and point.get("page_size", 16) % 128 != 0)


@needs_libtpu
@pytest.mark.parametrize(("name", "generation"), marked(TABLE, FAST, every=13))
def test_compiles_without_a_copy_of_the_pool(name, generation):
    point = POINTS[name]
    made = compiled(_call(**point), "tpu-ragged", generation, point.get("schedule"))
    assert made.argument_bytes >= 0.99 * POOL_BYTES
    if not _copies_the_pool(point):
        assert made.temporary_bytes < POOL_BYTES // 4


def test_the_table_is_large_enough_and_has_mixed_batches_for_every_generation():
    assert_crosses_generations(POINTS, TABLE, FAST, lambda point: point.get("rows", 0) is None)


def test_the_heuristic_is_a_schedule_that_it_would_take_back():
    """At every point, on every generation."""
    for name, point in POINTS.items():
        if "schedule" not in point:
            assert_takes_back_its_own(name, _call(**point))


def test_a_schedule_too_large_for_the_chip_is_refused_with_the_nearest_that_fits():
    large = _call(schedule={"pages_per_block": 64, "rows_per_tile": 1024, "buffers": 4})
    match = r"its buffers take \d+ bytes .*on v4: lower rows_per_tile, pages_per_block"
    assert_refused_with_the_nearest(large, _call(), match)


@needs_libtpu
@pytest.mark.kernels  # the decode kernel's runs always
def test_a_compile_error_carries_the_schedule_and_the_compilers_words(monkeypatch):
    large = _call(page_size=128, schedule={"pages_per_block": 4, "rows_per_tile": 16, "buffers": 64}, **_SMALL)
    assert_error_carries_the_compilers_words(large, monkeypatch)
