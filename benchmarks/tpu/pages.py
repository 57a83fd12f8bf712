"""Pages in a random physical order, in a pool that is large enough to stay in HBM."""

from collections.abc import Sequence

import numpy as np

ITEM_BYTES = 2  # bfloat16 everywhere
_POOL_BYTES = 512 << 20  # a smaller pool may be placed in VMEM by XLA, where reading it costs nothing


def pool_pages(counts: Sequence[int], page_bytes: int) -> int:
    """Pages of the pool: those of the batch, or more, so that the pool stays in HBM."""
    return max(sum(counts), _POOL_BYTES // page_bytes)


def tables(counts: Sequence[int], width: int, pool: int) -> np.ndarray:
    """i32[seqs, width], each sequence's pages shuffled over the pool; entries that nobody needs are 0."""
    ids = np.random.default_rng(0).permutation(pool)[: sum(counts)]
    made = np.zeros((len(counts), width), np.int32)
    for row, part in enumerate(np.split(ids, np.cumsum(counts)[:-1])):
        made[row, : len(part)] = part
    return made
