"""Writing one token for each of 8 sequences into donated pools of several sizes: microseconds, and proof of no copy.

The proof is in the compiled code: the pool is aliased to the result, and temporaries are a small part of it.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paged

from .inputs import HEAD_DIM, KV_HEADS, Q_HEADS, layout, pool, spec
from .measure import Row, Setting, progress, temporaries

_SEQS, _PAGE_SIZE, _REPEATS = 8, 16, 30
# Of the pool. A copy would be all of it; attention needs its tiles, whatever the pool.
_MOST_TEMPORARIES = {"paged.write": 1 / 100, "attend.update": 1 / 16}


def run(setting: Setting) -> Iterator[Row]:
    """Time must not follow the pool's size; nor may the compiled code's temporaries."""
    sizes = (512, 2048) if setting.is_quick else (512, 2048, 8192)
    cases = [(dtype, num_pages) for dtype in ("float32", "bfloat16") for num_pages in sizes]
    for dtype, num_pages in progress("write", setting, cases):
        pages_layout = layout(dtype, _PAGE_SIZE)
        keys, values = jax.random.normal(jax.random.key(0), (2, _SEQS, KV_HEADS, HEAD_DIM)).astype(dtype)
        queries = jax.random.normal(jax.random.key(1), (_SEQS, Q_HEADS, HEAD_DIM)).astype(dtype)
        update = paged.lower(spec(), pages_layout, target="xla").update
        for name, function, rows in (
            ("paged.write", paged.write, (keys, values)),
            ("attend.update", update, (queries, keys, values)),
        ):
            yield _row(name, function, rows, pool(pages_layout, num_pages), setting)


def _row(name: str, function: Callable[..., Any], rows: tuple[jax.Array, ...], pages: Any, setting: Setting) -> Row:
    """Time a function of ``(*rows, pages, batch)`` that donates and gives back its pages."""
    start = time.perf_counter()
    batch = _batch(pages.num_pages)
    executable = jax.jit(function, donate_argnums=len(rows)).lower(*rows, pages, batch).compile()
    compile_seconds, seconds = time.perf_counter() - start, []
    for _ in range(_REPEATS):
        begin = setting.clock()
        result = jax.block_until_ready(executable(*rows, pages, batch))
        seconds.append(setting.clock() - begin)
        pages = result[1] if isinstance(result, tuple) else result
    pool_bytes = sum(array.nbytes for array in pages.arrays)
    needed = temporaries(executable)
    is_aliased = "input_output_alias={" in (executable.as_text() or "")
    is_in_place = is_aliased and needed is not None and needed < pool_bytes * _MOST_TEMPORARIES[name]
    note = f"{'in place' if is_in_place else 'COPIES'}, pool {pool_bytes / 2**20:.0f} MiB"
    case = f"{pages.layout.dtype.name}, {pages.num_pages} pages"
    median = float(np.median(seconds))
    return Row("write", case, name, setting.cores, median, None, needed, compile_seconds, note=note)


def _batch(num_pages: int) -> paged.RaggedBatch:
    """Short sequences of several lengths, so that `attend.update` attends to little."""
    tables = np.random.default_rng(0).permutation(num_pages)[: _SEQS * 8].reshape(_SEQS, 8)
    return jax.tree.map(jnp.asarray, paged.RaggedBatch.decode(np.arange(1, _SEQS + 1) * 13, tables))
