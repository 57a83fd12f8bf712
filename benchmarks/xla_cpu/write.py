"""Writing one token for each of 8 sequences into donated pools of several sizes: microseconds, and proof of no copy."""

import time
from collections.abc import Iterator

import jax
import numpy as np

import paged

from .inputs import HEAD_DIM, KV_HEADS, layout, pool
from .measure import Row, Setting, progress, temporaries

_SEQS, _PAGE_SIZE, _REPEATS = 8, 16, 60


def run(setting: Setting) -> Iterator[Row]:
    """Time must not follow the pool's size; nor may the compiled code's temporaries."""
    sizes = (512, 2048) if setting.is_quick else (512, 2048, 8192)
    cases = [(dtype, num_pages) for dtype in ("float32", "bfloat16") for num_pages in sizes]
    for dtype, num_pages in progress("write", setting, cases):
        pages = pool(layout(dtype, _PAGE_SIZE), num_pages)
        pool_bytes = sum(array.nbytes for array in pages.arrays)
        rows = jax.random.normal(jax.random.key(0), (2, _SEQS, KV_HEADS, HEAD_DIM)).astype(dtype)
        tables = np.random.default_rng(0).permutation(num_pages)[: _SEQS * 8].reshape(_SEQS, 8)
        batch = jax.tree.map(jax.numpy.asarray, paged.RaggedBatch.decode(np.arange(1, _SEQS + 1) * 13, tables))
        start = time.perf_counter()
        executable = jax.jit(paged.write, donate_argnums=2).lower(*rows, pages, batch).compile()
        compile_seconds = time.perf_counter() - start
        k, v, seconds = *rows, []
        for _ in range(_REPEATS):
            begin = setting.clock()
            pages = jax.block_until_ready(executable(k, v, pages, batch))
            seconds.append(setting.clock() - begin)
        needed = temporaries(executable)
        is_aliased = "input_output_alias={" in (executable.as_text() or "")
        is_in_place = is_aliased and needed is not None and needed < pool_bytes / 100
        yield Row(
            "write",
            f"{dtype}, {num_pages} pages",
            "paged.write",
            setting.cores,
            float(np.median(seconds)),
            None,
            needed,
            compile_seconds,
            note=f"{'in place' if is_in_place else 'COPIES'}: pool {pool_bytes / 2**20:.0f} MiB, "
            f"{'aliased' if is_aliased else 'not aliased'}",
        )
