"""What pictures ask of a step: which pages and which tokens each sequence sees, by the functions that lowerings use."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paged.lower import PagesSeen, Program, Sequences, is_ancestor, pages_seen
from paged.spec import Given, RaggedBatch

_MOST_PAIRS = 2**22  # of a query and a key that are evaluated for one sequence


@dataclasses.dataclass(frozen=True)
class Step:
    """One step over one pool of pages, and what is known of it.

    * ``program``, ``batch``: the attention for this step, and the step.
    * ``tokens``, ``page_size``, ``num_pages``: query rows, tokens per page, and pages of the pool.
    * ``seen``: which pages each sequence's rows see.
    """

    program: Program
    batch: RaggedBatch
    tokens: int
    page_size: int
    num_pages: int
    seen: PagesSeen

    @classmethod
    def of(cls, program: Program, batch: RaggedBatch, page_size: int, num_pages: int | None) -> "Step":
        """Ask for the pages of a step. ``num_pages`` None: up to the last page that a live sequence has."""
        own = program.for_batch(batch)
        tokens = int(np.max(np.asarray(batch.query_starts), initial=0))
        if batch.positions is not None:
            tokens = batch.positions.shape[0]
        if num_pages is None:
            used = np.arange(batch.pages_per_seq) < _held(batch, page_size)[:, None]
            num_pages = int(np.max(np.where(used, np.asarray(batch.block_tables), 0), initial=0)) + 1
        sizes = {"tokens": tokens, "page_size": page_size, "num_pages": num_pages}
        return cls(own, batch, **sizes, seen=pages_seen(own, batch, **sizes))

    def states(self) -> np.ndarray:
        """For each sequence and page: F full, P partial, S skipped, X freed, O held by a sequence without rows, ""."""
        seen, tables = self.seen, self.seen.tables
        is_held = np.arange(tables.shape[1]) < _held(self.batch, self.page_size)[:, None]
        is_page = (tables >= 0) & (tables < self.num_pages)
        states = np.where(is_held & is_page, "O", "")
        states = np.where(seen.is_filled, np.where(seen.is_freed, "X", "S"), states)
        return np.where(seen.full, "F", np.where(seen.some, "P", states))

    def holders(self) -> np.ndarray:
        """How many sequences hold each page of the pool."""
        is_there = np.isin(self.states(), ("F", "P", "S", "O"))
        return np.bincount(self.seen.tables[is_there], minlength=self.num_pages)[: self.num_pages]

    def tokens_seen(self, slot: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Whether any, and whether every row of a sequence sees each of its tokens; None where that is much work."""
        rows, length = int(self.seen.counts[slot]), int(self.seen.lengths[slot])
        if not rows or not length or rows * length > _MOST_PAIRS:
            return None
        program, start = self.program, int(np.asarray(self.batch.query_starts)[slot])
        heads = range(0, program.num_q_heads, program.heads_alike) if program.has_heads else [0]
        seqs = Sequences.of(self.batch, self.tokens, self.page_size)
        numbers = seqs.numbers_of(slot)
        place0 = int(self.seen.positions[slot])
        row, key = np.arange(rows, dtype=np.int32)[:, None], np.arange(length, dtype=np.int32)[None]
        p, j, words = place0 + row, key, self.batch.ancestors
        own = key - place0
        if self.batch.positions is not None:
            positions = np.asarray(self.batch.positions)
            p = positions[start + row]
            j = np.where(own >= 0, positions[np.clip(start + own, 0, len(positions) - 1)], key)
        ancestor: Any = True
        if words is not None:
            ancestor = is_ancestor([words[start + row, i] for i in range(words.shape[1])], jnp.asarray(row), own)
        see = jax.jit(lambda h: program.visible(jnp.asarray(p), jnp.asarray(j), length, Given(numbers, h, ancestor)))
        flags = [np.broadcast_to(np.asarray(see(head)), (rows, length)) for head in heads]
        is_stored = np.repeat(np.isin(self.states()[slot], ("F", "P", "S")), self.page_size)[:length]
        return np.any(flags, axis=(0, 1)) & is_stored, np.all(flags, axis=(0, 1)) & is_stored


def _held(batch: RaggedBatch, page_size: int) -> np.ndarray:
    """How many table entries the tokens of each live slot need."""
    lengths, slots = np.asarray(batch.lengths), np.arange(batch.num_slots)
    live = slots < int(batch.num_seqs)
    return np.minimum(np.where(live, -(-np.maximum(lengths, 0) // page_size), 0), batch.pages_per_seq)
