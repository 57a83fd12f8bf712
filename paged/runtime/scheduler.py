"""The host's side of serving: which sequence waits, prefills or decodes, who gets pages first and who gives them up."""

import collections
import dataclasses
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from .pool import PagePool


@dataclasses.dataclass
class Request:
    """One prompt on its way: what is known of its sequence, and how much of that the cache holds.

    ``known`` is the prompt and every token drawn so far. A running sequence whose cache lacks one known token decodes:
    that token is its row, and the next one its result. One that lacks more prefills.
    """

    index: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    known: list[int]
    cached: int = 0
    preemptions: int = 0

    @property
    def num_generated(self) -> int:
        """How many tokens have been drawn."""
        return len(self.known) - len(self.prompt)

    @property
    def is_decoding(self) -> bool:
        """Whether all but the last known token are cached."""
        return len(self.known) - self.cached == 1


class Scheduler:
    """Requests, slots and the page pool. It decides, and moves no tokens.

    Requests are admitted in order, when a slot is free and the pool has pages for all that is known of them. When a
    decode step runs out of pages the most recently admitted sequence is preempted: it gives back its pages and waits
    at the head of the queue, to be prefilled again with what it has generated. The oldest one therefore always
    advances, and a request that fits an otherwise empty pool always finishes.
    """

    def __init__(self, pool: PagePool, requests: Sequence[Request]):
        self.pool = pool
        self.waiting = collections.deque(requests)
        self.running: dict[int, Request] = {}  # by slot, in order of admission

    def admit(self) -> None:
        """Start waiting requests, in order, until one does not fit."""
        while self.waiting and len(self.running) < self.pool.num_slots:
            slot = next(s for s in range(self.pool.num_slots) if s not in self.running)
            pool, ok = _reserve(self.pool, self._at({slot: len(self.waiting[0].known)}))
            if not ok[slot]:
                return
            self.pool = pool
            self.running[slot] = self.waiting.popleft()

    def next_prefill(self) -> int | None:
        """The slot of the oldest sequence with more than one token to cache, or None."""
        return next((slot for slot, request in self.running.items() if not request.is_decoding), None)

    def decoding(self) -> list[int]:
        """The slots of all sequences with one token to cache, in order of admission."""
        return [slot for slot, request in self.running.items() if request.is_decoding]

    def extend_prefill(self, slot: int, tokens: int) -> None:
        """Count a chunk of the slot's tokens as cached. Its pages were reserved at admission."""
        self.pool, _ = _extend(self.pool, self._at({slot: tokens}))
        self.running[slot].cached += tokens

    def extend_decoding(self) -> list[int]:
        """Make room for one more token in every decoding sequence, preempting until there is; the slots that go on."""
        while slots := self.decoding():
            pool, ok = _extend(self.pool, self._at(dict.fromkeys(slots, 1)))
            if np.asarray(ok)[slots].all():
                self.pool = pool
                for slot in slots:
                    self.running[slot].cached += 1
                return slots
            self._preempt_newest()
        return []

    def release(self, slots: Sequence[int]) -> None:
        """The sequences in these slots are done: their pages and slots are free."""
        self.pool = _release(self.pool, jnp.asarray(np.isin(np.arange(self.pool.num_slots), list(slots))))
        for slot in slots:
            del self.running[slot]

    def _preempt_newest(self) -> None:
        slot, request = next(reversed(self.running.items()))
        self.release([slot])
        request.cached = 0
        request.preemptions += 1
        self.waiting.appendleft(request)

    def _at(self, counts: dict[int, int]) -> Int[Array, " seqs"]:
        """Counts for some slots, 0 for the others."""
        return jnp.asarray([counts.get(slot, 0) for slot in range(self.pool.num_slots)], jnp.int32)


@eqx.filter_jit
def _reserve(pool: PagePool, tokens: Int[Array, " seqs"]) -> tuple[PagePool, Bool[Array, " seqs"]]:
    return pool.reserve(tokens)


@eqx.filter_jit
def _extend(pool: PagePool, tokens: Int[Array, " seqs"]) -> tuple[PagePool, Bool[Array, " seqs"]]:
    return pool.extend(tokens)


@eqx.filter_jit
def _release(pool: PagePool, is_released: Bool[Array, " seqs"]) -> PagePool:
    return pool.release(is_released)
