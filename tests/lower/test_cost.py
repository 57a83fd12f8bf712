"""Work counted exactly, from compiled programs: what is written in place, and what memory does not grow with."""

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import paged
from paged.lower.jax_version import HAS_BIT_UPDATES_IN_PLACE
from paged.spec import PAGE_ORDERS

HEADS, GROUP, DIM, PAGE, SLOTS = 2, 4, 16, 8, 3
SPEC = paged.AttentionSpec(num_q_heads=HEADS * GROUP, num_kv_heads=HEADS, head_dim=DIM)
ROOT = pathlib.Path(__file__).parents[2]
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
DTYPES = {"float32": None, "bfloat16": None, "float16": None, "int8": "token", "float8_e4m3fn": "head"}


# Every order meets a dtype without scales and one with, and every dtype the packed order; the others are slow.
every_pool = pytest.mark.parametrize(
    ("order", "dtype"),
    [
        pytest.param(o, d, marks=[pytest.mark.slow] * (o != "packed" and d not in ("float32", "int8")))
        for o in PAGE_ORDERS
        for d in DTYPES
    ],
)


@functools.cache
def compiled(what, order="packed", dtype="float32", num_pages=64, pages_per_seq=8, rows=1):
    """A function of the library, compiled for shapes alone."""
    layout = paged.PageLayout(
        page_size=PAGE, num_kv_heads=HEADS, head_dim=DIM, dtype=dtype, order=order, scales=DTYPES[dtype]
    )
    attend = paged.lower(SPEC, layout)
    slots = SLOTS if rows == 1 else 1
    batch = paged.RaggedBatch.decode(
        jax.ShapeDtypeStruct((slots,), jnp.int32),
        jax.ShapeDtypeStruct((slots, pages_per_seq), jnp.int32),
        query_rows=rows,
    )
    q = jax.ShapeDtypeStruct((slots * rows, HEADS * GROUP, DIM), jnp.float32)
    kv = jax.ShapeDtypeStruct((slots * rows, HEADS, DIM), jnp.float32)
    pages = jax.eval_shape(lambda: layout.init(num_pages))
    if what == "write":
        return jax.jit(paged.write, donate_argnums=2).lower(kv, kv, pages, batch).compile()
    if what == "update":
        return jax.jit(attend.update, donate_argnums=3).lower(q, kv, kv, pages, batch).compile()
    if what == "attend":
        return jax.jit(attend).lower(q, pages, batch).compile()
    gradient = jax.grad(lambda q, pages, batch: jnp.sum(attend(q, pages, batch)), argnums=(0, 1))
    return jax.jit(gradient).lower(q, pages, batch).compile()


def temporaries(*args, **kwargs):
    return compiled(*args, **kwargs).memory_analysis().temp_size_in_bytes


@every_pool
@pytest.mark.parametrize("what", ["write", pytest.param("update", marks=pytest.mark.kernels)])
def test_donated_pages_are_written_in_place(what, order, dtype):
    """The pool is aliased to the result, and nothing of the pool's size is allocated."""
    if dtype.startswith("float8") and not HAS_BIT_UPDATES_IN_PLACE:
        pytest.skip("XLA:CPU of this version copies a float8 pool once a write")
    few = temporaries(what, order, dtype)
    many = compiled(what, order, dtype, num_pages=1024).memory_analysis()
    pool = 1024 * 2 * PAGE * HEADS * DIM * jnp.dtype(dtype).itemsize
    assert many.alias_size_in_bytes >= pool
    assert many.temp_size_in_bytes <= few + 1024, "temporaries grow with the pool"


def _later(order, dtype):
    """Every order is met in every run, and every dtype but float16."""
    if order != "packed":
        return [] if dtype == "float32" else [pytest.mark.kernels if dtype == "int8" else pytest.mark.slow]
    return [pytest.mark.kernels] if dtype in ("float32", "float16") else []


@pytest.mark.parametrize(
    ("order", "dtype"), [pytest.param(o, d, marks=_later(o, d)) for o in PAGE_ORDERS for d in DTYPES]
)
def test_attention_neither_copies_nor_converts_the_pool(order, dtype):
    few, many = (temporaries("attend", order, dtype, num_pages=n) for n in (64, 1024))
    assert many <= few + 1024


def test_temporaries_of_decode_grow_by_no_more_than_the_list_of_pages_to_visit():
    """A few integers a table entry, whatever the heads and dimensions: 16k tokens need no more than 1k."""
    few, many = (temporaries("attend", pages_per_seq=n, num_pages=4096) for n in (128, 2048))
    assert many - few <= (2048 - 128) * 64


def test_the_gradient_keeps_nothing_of_the_size_of_the_scores():
    """Four times the length adds four times the pool's gradient, and not rows x length scores."""
    rows, short, long = 64, 16, 64
    few, many = (temporaries("gradient", rows=rows, pages_per_seq=n, num_pages=n) for n in (short, long))
    pool_growth = (long - short) * 2 * PAGE * HEADS * DIM * 4
    scores_growth = rows * HEADS * GROUP * (long - short) * PAGE * 4
    assert scores_growth > 2 * pool_growth, "the test would not notice scores"
    assert many - few < pool_growth + scores_growth // 4


def ready_at_first(text):
    """Programs of a compiled function that wait for no other one."""
    lines = re.findall(r"%([\w.-]+) = [^=]*? ([\w-]+)\((.*?)\)", text[text.index("\nENTRY") :])
    given, views = {"parameter", "constant"}, {"bitcast", "tuple", "get-tuple-element"}
    ready, known = [], set()
    for name, operation, operands in lines:
        is_ready = operation in given or known >= set(re.findall(r"%([\w.-]+)", operands))
        if operation in given or (operation in views and is_ready):
            known.add(name)
        elif operation not in views and is_ready:
            ready.append(name)
    return ready


def test_decode_wakes_no_thread_for_programs_of_a_few_numbers():
    """XLA:CPU shares work with other threads where more than eight programs are ready, however small these are: a call
    of 4 x 200 tokens took 1.4 times as long on two cores when ten were (measured)."""
    assert 0 < len(ready_at_first(compiled("attend").as_text())) <= 8


SPLITS = """
from paged.lower.xla.cpu import Buffers
from paged.spec import PAGE_ORDERS
from tests.lower.test_cost import compiled

def count(what, order):
    return compiled.__wrapped__(what, order, num_pages=1024).as_text().count('outer_dimension_partitions":["')

print(*(count("update", order) for order in PAGE_ORDERS))
Buffers.of = lambda layout, **sizes: Buffers(None, None)
print(count("attend", "packed"))
"""


@pytest.mark.kernels
@pytest.mark.skipif(CPUS < 2, reason="XLA:CPU splits nothing where it has one CPU")
def test_decode_splits_no_gather_over_threads():
    """To fork and join threads at every block costs more than it gains; without a buffer for tiles XLA does it. In a
    process of its own, with one device: between the eight of the tests XLA splits nothing."""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SPLITS]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=True)
    with_buffers, without = child.stdout.splitlines()[-2:]
    assert with_buffers.split() == ["0"] * len(PAGE_ORDERS)
    assert int(without) > 0, "the count counts nothing"
