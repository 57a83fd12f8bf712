"""`pages_seen`: which pages the rows of each sequence may see. `explain` counts them, and pictures draw them."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from paged.spec import RaggedBatch

from .program import Program, Sequences, page_coverage


class PagesSeen(NamedTuple):
    """What is certain of the pages of each sequence in one step: NumPy arrays, [seqs, pages_per_seq] or [seqs].

    * ``some``: pages in which some row of the step may see a key. Lowerings visit these.
    * ``full``: pages in which every row sees every key. Lowerings use no mask there.
    * ``is_filled``: pages that the tokens of sequences with rows fill.
    * ``is_freed``: those of them that the table does not have, or that are no page of the pool.
    * ``tables``, ``lengths``: the block tables, and how many keys each sequence has.
    * ``counts``, ``positions``: how many rows each sequence has in the step, and the position of the first one.
    """

    some: Bool[np.ndarray, "seqs pages_per_seq"]
    full: Bool[np.ndarray, "seqs pages_per_seq"]
    is_filled: Bool[np.ndarray, "seqs pages_per_seq"]
    is_freed: Bool[np.ndarray, "seqs pages_per_seq"]
    tables: Int[np.ndarray, "seqs pages_per_seq"]
    lengths: Int[np.ndarray, " seqs"]
    counts: Int[np.ndarray, " seqs"]
    positions: Int[np.ndarray, " seqs"]


def pages_seen(program: Program, batch: RaggedBatch, *, tokens: int, page_size: int, num_pages: int) -> PagesSeen:
    """Ask the program which pages each sequence's rows see. Lowerings ask the same question, by the same function.

    **Arguments:**

    - `program`: the attention, as `Program.for_batch` gives it.
    - `batch`: the step, with concrete arrays.
    - `tokens`: query rows of the step.
    - `page_size`, `num_pages`: tokens per page, and pages of the pool. Entries outside of the pool are no pages.

    **Returns:** the answers, for all slots. A slot without rows has no page that is seen or filled.

    >>> program = Program.from_spec(AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=4, window=3))
    >>> batch = RaggedBatch.decode(lengths=[7], block_tables=[[5, 1, 0, 2]])
    >>> seen = pages_seen(program, batch, tokens=1, page_size=2, num_pages=8)
    >>> seen.some.tolist(), seen.full.tolist()
    ([[False, False, True, True]], [[False, False, True, False]])
    """
    seqs = Sequences.of(batch, tokens, page_size)
    coverage = jax.vmap(lambda rows, table: page_coverage(program, rows, table, page_size, num_pages))
    some, full = coverage(seqs.query_rows(), seqs.tables)
    numbers = (some, full, seqs.tables, seqs.lengths, seqs.counts, seqs.positions)
    some, full, tables, lengths, counts, positions = map(np.asarray, numbers)
    held = np.where(counts > 0, -(-lengths // page_size), 0)
    is_filled = np.arange(tables.shape[1]) < held[:, None]
    is_freed = is_filled & ((tables < 0) | (tables >= num_pages))
    return PagesSeen(some, full & some, is_filled, is_freed, tables, lengths, counts, positions)
