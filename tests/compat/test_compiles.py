"""Entry points through the real TPU compiler: no cache is copied, and version 3 writes its cache in place."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from paged.compat import page_attention, ragged_page_attention_v2, ragged_page_attention_v3
from paged.lower._compile_for import compile_on
from paged.lower.tpu import CHIPS, base

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the package libtpu is not here"),
]
CHIP = CHIPS["v5e"]
BF16, I32 = jnp.bfloat16, jnp.int32
PAGES, SIZE, ROWS, SEQS = 2048, 16, 64, 8


@pytest.fixture(autouse=True)
def _chip(monkeypatch):
    monkeypatch.setattr(base, "this_chip", lambda: CHIP)


def _compiled(entry, *shapes, **how):
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return compile_on(CHIP, jax.jit(functools.partial(entry, target="tpu"), **how), *arrays).memory_analysis()


def _integers(*shapes):
    return [(shape, I32) for shape in shapes]


@pytest.mark.parametrize("cache", [(PAGES, SIZE, 16, 128), (PAGES, SIZE, 8, 2, 128)], ids=["plain", "packed"])
def test_a_ragged_cache_is_not_copied(cache):
    size = PAGES * SIZE * 16 * 128 * 2
    new = [((ROWS, 32, 128), BF16), *[((ROWS, 8, 128), BF16)] * 2, (cache, BF16)]
    memory = _compiled(
        ragged_page_attention_v3, *new, *_integers((SEQS,), (SEQS * 64,), (SEQS + 1,), (3,)), donate_argnums=3
    )
    assert memory.alias_size_in_bytes == size and memory.temp_size_in_bytes < size / 8
    read = [((ROWS, 32, 128), BF16), (cache, BF16), *_integers((SEQS,), (SEQS, 64), (SEQS + 1,), (1,))]
    assert _compiled(ragged_page_attention_v2, *read).temp_size_in_bytes < size / 8


def test_a_split_cache_is_not_copied():
    cache = ((8, PAGES, SIZE, 128), BF16)
    memory = _compiled(page_attention, ((SEQS, 32, 128), BF16), cache, cache, *_integers((SEQS,), (SEQS, 64)))
    assert memory.temp_size_in_bytes < PAGES * SIZE * 8 * 128 * 2 / 8
