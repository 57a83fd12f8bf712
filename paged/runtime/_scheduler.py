"""The host's side of `generate`: which sequence waits, prefills or decodes, who gets pages and who gives them up."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from paged.spec import GroupedBatch, RaggedBatch

from ._groups import Masks, keeps_all, mask_of, most_pages
from .grouped_pool import GroupedPool
from .pool import PagePool

Pool = PagePool | GroupedPool
Batch = RaggedBatch | GroupedBatch

# The operations of a pool, each compiled once for the pool's shapes.
_release = eqx.filter_jit(lambda pool, is_released: pool.release(is_released))
_prefill_batch = eqx.filter_jit(lambda pool, slot, rows: pool.prefill_batch(slot, rows))
_decode_batch = eqx.filter_jit(lambda pool, is_decoding: pool.decode_batch(is_decoding))


@eqx.filter_jit
def _reserve(pool: Pool, tokens: Int[Array, " seqs"]) -> tuple[Pool, Bool[Array, " seqs"], Array]:
    """`reserve`, in groups that keep every page: the others get their pages step by step. And what was free before."""
    free = pool.num_free
    if isinstance(pool, PagePool):
        reserved, ok = pool.reserve(tokens)
        return reserved, ok, free
    keeping = [keeps_all(masks) for masks in pool.masks]
    if not any(keeping):
        return pool, jnp.ones(pool.num_slots, bool), free
    first = keeping.index(True)  # there is one such group
    reserved, ok = pool.pools[first].reserve(tokens)
    return GroupedPool((*pool.pools[:first], reserved, *pool.pools[first + 1 :]), pool.masks), ok, free


@eqx.filter_jit
def _extend(pool: Pool, tokens: Int[Array, " seqs"], values: Any) -> tuple[Pool, Bool[Array, " seqs"], Array]:
    """`extend`, after pages that no query sees any more are freed; and how many were."""
    trimmed = pool.trim(values) if isinstance(pool, GroupedPool) else pool
    freed = jnp.atleast_1d(trimmed.num_free - pool.num_free)
    extended, ok = trimmed.extend(tokens)
    return extended, ok, freed


@dataclasses.dataclass
class Request:
    """One prompt on its way through the server.

    * ``index``: the prompt's place among those of the call.
    * ``prompt``: its token ids.
    * ``max_new_tokens``: the most tokens to draw.
    * ``known``: the prompt and every token drawn so far.
    * ``cached``: how many of the known tokens have their keys and values in pages.
    * ``preemptions``: how often the sequence gave up its pages.
    * ``values``: the prompt's numbers, by name, that the model's specs name by `Value`.
    * ``cuts`` bool[most_cached + 1]: where its tokens may be cut into steps; None for everywhere.
    * ``finish_reason``: why the sequence ended, None while it has not.

    A running sequence that lacks one known token decodes: that token is its row, and the next token its result. A
    sequence that lacks more than one prefills.
    """

    index: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    known: list[int]
    cached: int = 0
    preemptions: int = 0
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cuts: np.ndarray | None = None
    finish_reason: Literal["eos", "length", "no_token"] | None = None

    @property
    def most_cached(self) -> int:
        """The most tokens that the sequence will have in pages: all but the last one drawn."""
        return len(self.prompt) + self.max_new_tokens - 1

    def most_pages(self, masks: Masks, tokens: int, page_size: int, chunk_size: int) -> int:
        """The most pages of a group that the sequence holds at once, up to a length."""
        if keeps_all(masks):
            return -(-tokens // page_size)
        return most_pages(mask_of(masks), tokens, page_size, chunk_size, self.values)

    @property
    def num_generated(self) -> int:
        """How many tokens have been drawn."""
        return len(self.known) - len(self.prompt)

    def chunk_after_cached(self, most: int) -> int:
        """How many of the next known tokens to put into pages, at most ``most``: up to where they may be cut."""
        tokens = min(len(self.known) - self.cached, most)
        if self.cuts is None:
            return tokens
        return int(np.flatnonzero(self.cuts[self.cached + 1 : self.cached + tokens + 1])[-1]) + 1

    @property
    def is_decoding(self) -> bool:
        """Whether all but the last known token are cached."""
        return len(self.known) - self.cached == 1


class Scheduler:
    """Requests, sequence slots and the page pool. It decides what the next step is, and runs nothing.

    Requests are admitted in order, each when a slot is free and the pool has pages for all of its known tokens; of a
    group whose masks free pages, as many as the request will hold at once. When the pool has no pages for a step, the
    sequence that was admitted last is preempted: it gives back its pages and waits at the head of the queue, to be
    prefilled again with the tokens drawn so far. So the oldest sequence always advances, and a request that fits an
    empty pool always finishes.
    """

    def __init__(self, pool: Pool, requests: Sequence[Request], chunk_size: int = 64):
        self.pool = pool
        self.chunk_size = chunk_size
        self.waiting = collections.deque(requests)
        self.running: dict[int, Request] = {}  # by slot, in order of admission
        self.freed: Any = None  # pages of each group that were freed by masks before the latest step
        # What a slot without a request brings: numbers that nobody reads.
        self.examples = requests[0].values if requests else {}

    def admit(self) -> None:
        """Start waiting requests, in order, until one does not fit."""
        while self.waiting and len(self.running) < self.pool.num_slots:
            slot = next(s for s in range(self.pool.num_slots) if s not in self.running)
            request = self.waiting[0]
            pool, ok, free = _reserve(self.pool, self._per_slot({slot: len(request.known)}))
            if not ok[slot] or np.any(self._needed(request) > np.asarray(free)):
                return
            self.pool = pool
            self.running[slot] = self.waiting.popleft()

    def next_prefill(self) -> int | None:
        """The slot of the oldest sequence that lacks more than one token, or None."""
        return next((slot for slot, request in self.running.items() if not request.is_decoding), None)

    def decoding(self) -> list[int]:
        """The slots of all sequences that lack one token, in order of admission."""
        return [slot for slot, request in self.running.items() if request.is_decoding]

    def _needed(self, request: Request) -> np.ndarray:
        """How many pages of each group a request holds at once while its known tokens are prefilled."""
        pool, tokens = self.pool, len(request.known)
        if isinstance(pool, PagePool):
            return np.asarray(-(-tokens // pool.page_size))
        sizes = tokens, pool.page_size, self.chunk_size
        return np.asarray([request.most_pages(masks, *sizes) for masks in pool.masks])

    def extend_prefill(self, slot: int, tokens: int) -> bool:
        """Count the next ``tokens`` of a slot as cached, preempting the newest sequence until there is room.

        Pages of layers that free none were reserved at admission. Returns whether the slot's sequence goes on: False
        where it was the newest, and is preempted itself.
        """
        while slot in self.running:
            pool, ok, freed = _extend(self.pool, self._per_slot({slot: tokens}), self._values_of_slots())
            if ok[slot]:
                self.pool, self.freed = pool, freed
                self.running[slot].cached += tokens
                return True
            self._preempt_newest()
        return False

    def extend_decoding(self) -> list[int]:
        """Make room for one more token in every decoding sequence, preempting the newest until there is room.

        Returns the slots of the sequences that go on, in order of admission.
        """
        while slots := self.decoding():
            pool, ok, freed = _extend(self.pool, self._per_slot(dict.fromkeys(slots, 1)), self._values_of_slots())
            if np.asarray(ok)[slots].all():
                self.pool, self.freed = pool, freed
                for slot in slots:
                    self.running[slot].cached += 1
                return slots
            self._preempt_newest()
        return []

    def prefill_batch(self, slot: int, rows: int) -> Batch:
        """A step of the last ``rows`` cached tokens of a slot."""
        # As arrays: Python ints would be static, and every slot and every length would compile a program.
        batch = _prefill_batch(self.pool, jnp.asarray(slot), jnp.asarray(rows))
        return self._with_values(batch, [self.running.get(slot)])

    def decode_batch(self, slots: Sequence[int]) -> Batch:
        """A step of one row for every slot, of which those in ``slots`` are live."""
        batch = _decode_batch(self.pool, self._is_in(slots))
        return self._with_values(batch, self._by_slot())

    def _by_slot(self) -> list[Request | None]:
        return [self.running.get(slot) for slot in range(self.pool.num_slots)]

    def _with_values(self, batch: Batch, requests: Sequence[Request | None]) -> Batch:
        """A batch with the numbers of each slot's request."""
        if not self.examples:
            return batch
        values = self._values(requests)
        is_grouped = isinstance(batch, GroupedBatch)
        return batch.with_values(values) if is_grouped else dataclasses.replace(batch, values=values)

    def _values(self, requests: Sequence[Request | None]) -> dict[str, Array]:
        """The numbers of each slot's request; any numbers for a slot without."""
        rows = [self.examples if request is None else request.values for request in requests]
        return {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in self.examples}

    def _values_of_slots(self) -> dict[str, Array] | None:
        """The numbers by which masks say what may be freed, if there are any."""
        return self._values(self._by_slot()) if isinstance(self.pool, GroupedPool) and self.examples else None

    def release(self, slots: Sequence[int]) -> None:
        """The sequences in these slots are done: free their pages and slots."""
        self.pool = _release(self.pool, self._is_in(slots))
        for slot in slots:
            del self.running[slot]

    def _preempt_newest(self) -> None:
        if len(self.running) == 1:
            raise RuntimeError(
                f"The pool has too few pages for one sequence alone: {self.pool.num_pages} pages of "
                f"{self.pool.page_size} tokens. Does the coverage of a mask of yours rule out fewer pairs from later "
                "positions on? A page that it has hidden must stay hidden."
            )
        slot, request = next(reversed(self.running.items()))
        self.release([slot])
        request.cached = 0
        request.preemptions += 1
        self.waiting.appendleft(request)

    def _per_slot(self, counts: dict[int, int]) -> Int[Array, " seqs"]:
        """Counts for some slots, 0 for the others."""
        return jnp.asarray([counts.get(slot, 0) for slot in range(self.pool.num_slots)], jnp.int32)

    def _is_in(self, slots: Sequence[int]) -> Bool[Array, " seqs"]:
        return jnp.asarray(np.isin(np.arange(self.pool.num_slots), list(slots)))
