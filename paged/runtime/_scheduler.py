"""The host's side of `generate`: which sequence waits, prefills or decodes, who gets pages and who gives them up."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from paged.spec import Everything, GroupedBatch, RaggedBatch

from . import _pool_steps as steps
from ._groups import Masks, keeps_all, mask_of, most_pages
from ._pool_steps import Pool, padded
from .grouped_pool import GroupedPool
from .pool import PagePool
from .prefix_cache import PrefixCache

Batch = RaggedBatch | GroupedBatch


@dataclasses.dataclass
class Request:
    """One prompt on its way through the server.

    * ``index``: the prompt's place among those of the call.
    * ``sample``, ``place``: which sample of the prompt it is, and its place among all results.
    * ``draw``: the number from which its draws follow, besides the number of each token.
    * ``prompt``: its token ids.
    * ``max_new_tokens``: the most tokens to draw.
    * ``known``: the prompt and every token drawn so far.
    * ``cached``: how many of the known tokens have their keys and values in pages.
    * ``is_begun``: whether a step has computed some of these, since it got its slot.
    * ``preemptions``: how often the sequence gave up its pages.
    * ``values``: the prompt's numbers, by name, that the model's specs name by `Value`.
    * ``cuts`` bool[most_cached + 1]: where its tokens may be cut into steps; None for everywhere.
    * ``finish_reason``: why the sequence ended, None while it has not.
    * ``followers``: the other samples of the prompt, which begin when it is prefilled.

    A running sequence that lacks one known token decodes: that token is its row, and the next token its result. A
    sequence that lacks more than one prefills, and so does one with followers.
    """

    index: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    known: list[int]
    cached: int = 0
    is_begun: bool = False
    preemptions: int = 0
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cuts: np.ndarray | None = None
    finish_reason: Literal["eos", "length", "no_token"] | None = None
    sample: int = 0
    place: int = 0
    draw: int = 0
    followers: list["Request"] = dataclasses.field(default_factory=list)

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
        """Whether all but the last known token are cached, and no other sample waits for that token's step."""
        return len(self.known) - self.cached == 1 and not self.followers


class Scheduler:
    """Requests, sequence slots and the page pool. It decides what the next step is, and runs nothing.

    Requests are admitted in order, each when a slot is free and the pool has pages for all of its known tokens; of a
    group whose masks free pages, as many as the request will hold at once. When the pool has no pages for a step, the
    sequence that was admitted last is preempted: it gives back its pages and waits at the head of the queue, to be
    prefilled again with the tokens drawn so far. So the oldest sequence always advances, and a request that fits an
    empty pool always finishes.
    """

    def __init__(self, pool: Pool, requests: Sequence[Request], chunk_size: int = 64, cache: PrefixCache | None = None):
        self.pool = pool
        self.cache = cache
        self.chunk_size = chunk_size
        self.waiting = collections.deque(requests)
        self.running: dict[int, Request] = {}  # by slot, in order of admission
        self.freed: Any = None  # pages of each group that were freed by masks before the latest step
        self.reused = self.evicted = 0  # tokens found in the cache, and pages that it gave up, since the latest report
        masks = pool.masks if isinstance(pool, GroupedPool) else ((Everything(),),)
        self._is_keeping = np.array([keeps_all(group) for group in masks])  # such a group has room or is not ok
        # What a slot without a request brings: numbers that nobody reads.
        self.examples = requests[0].values if requests else {}

    def admit(self) -> None:
        """Start waiting requests, in order, until one does not fit."""
        while self.waiting and (slot := self._free_slot()) is not None:
            if not self._begin(slot, self.waiting[0], self.pool):
                return
            self.running[slot] = self.waiting.popleft()

    def begin_prefill(self, slot: int) -> None:
        """Look again for the beginning of a sequence of which nothing is prefilled yet.

        Since it was admitted others may have computed the same tokens.
        """
        request = self.running[slot]
        if self.cache is None or request.is_begun:
            return
        found = int(steps.lookup(self.cache, *self._tokens_to_find(request)))
        if found > request.cached:
            released = steps.release(self.pool, self._is_in([slot]))
            self._begin(slot, request, released)

    def _begin(self, slot: int, request: Request, pool: Pool) -> bool:
        """Give an empty slot of ``pool`` what the cache has of a request's tokens, and pages for the others."""
        cache, found = self.cache, 0
        if cache is not None:
            cache, with_found, count = steps.attach(cache, pool, jnp.asarray(slot), *self._tokens_to_find(request))
            found = int(count)
            if found and self._reserve(slot, request, with_found, cache, found):
                return True
        # A page whose beginning only is shared needs a copy beside it, for which there may be no room.
        return self._reserve(slot, request, pool, self.cache, 0)

    def _reserve(self, slot: int, request: Request, pool: Pool, cache: PrefixCache | None, found: int) -> bool:
        """Reserve pages for a request's known tokens, of which ``found`` are there, with room made in the cache."""
        tokens, evicted = self._per_slot({slot: len(request.known)}), 0
        # With what was found a page may be shared of which the slot needs a copy.
        needed = self._needed(request) - (np.asarray(steps.pages_held(pool, jnp.asarray(slot))) - 1 if found else 0)
        for _ in range(2):
            reserved, ok, free = steps.reserve(pool, tokens)
            if ok[slot] and np.all(self._is_keeping | (needed <= np.asarray(free))):
                self.reused += max(found - request.cached, 0)
                self.pool, self.cache, request.cached = reserved, cache, found
                self.evicted += evicted
                return True
            if cache is None:
                return False
            cache, pool, gone = steps.make_room(cache, pool, jnp.asarray(needed, jnp.int32))
            evicted = int(np.sum(gone))
            if not evicted:
                return False
        return False

    def keep(self, slot: int, *, has_partial: bool = False) -> None:
        """Let the cache keep the pages of a slot's cached tokens, the last one too if its sequence goes no further."""
        if self.cache is None:
            return
        request = self.running[slot]
        tokens = padded(request.known[: request.cached], self.pool.capacity)
        arguments = jnp.asarray(slot), jnp.asarray(tokens), jnp.asarray(request.cached)
        is_whole = jnp.asarray(has_partial)
        self.cache, self.pool = steps.insert(self.cache, self.pool, *arguments, has_partial=is_whole)

    def fork(self, slot: int, followers: Sequence[Request]) -> None:
        """Give each of these requests a free slot with all tokens of ``slot``. Those without one wait, first of all."""
        placed, source = 0, self.running[slot]
        for request in followers:
            free = self._free_slot()
            if free is None:
                break
            self.pool, _ = steps.fork(self.pool, self._per_slot({free: slot}, -1))
            self.running[free], request.cached, request.is_begun = request, source.cached, True
            placed += 1
        self.waiting.extendleft(reversed(followers[placed:]))

    def _free_slot(self) -> int | None:
        return next((slot for slot in range(self.pool.num_slots) if slot not in self.running), None)

    def _tokens_to_find(self, request: Request) -> tuple[Array, Array]:
        """The known tokens, and how many may be found: the last one is computed, because the next follows from it."""
        return jnp.asarray(padded(request.known, self.pool.capacity)), jnp.asarray(len(request.known) - 1)

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
            return np.asarray([-(-tokens // pool.page_size)])
        sizes = tokens, pool.page_size, self.chunk_size
        return np.asarray([request.most_pages(masks, *sizes) for masks in pool.masks])

    def extend_prefill(self, slot: int, tokens: int) -> bool:
        """Count the next ``tokens`` of a slot as cached, preempting the newest sequence until there is room.

        Pages of layers that free none were reserved at admission. Returns whether the slot's sequence goes on: False
        where it was the newest, and is preempted itself.
        """
        while slot in self.running:
            if self._extend({slot: tokens}):
                return True
            self._preempt_newest()
        return False

    def extend_decoding(self) -> list[int]:
        """Make room for one more token in every decoding sequence, preempting the newest until there is room.

        Returns the slots of the sequences that go on, in order of admission.
        """
        while slots := self.decoding():
            if self._extend(dict.fromkeys(slots, 1)):
                return slots
            self._preempt_newest()
        return []

    def _extend(self, counts: dict[int, int]) -> bool:
        """Count more tokens of slots as cached, if there are pages for all, with room made in the cache."""
        tokens, values, slots = self._per_slot(counts), self._values_of_slots(), list(counts)
        cache, pool, evicted = self.cache, self.pool, 0
        for _ in range(2):
            extended, ok, freed = steps.extend(pool, tokens, values)
            if np.asarray(ok)[slots].all():
                self.pool, self.cache, self.freed = extended, cache, freed
                self.evicted += evicted
                for slot, count in counts.items():
                    self.running[slot].is_begun = True
                    self.running[slot].cached += count
                return True
            if cache is None:
                return False
            # At most the pages of these tokens, and for each slot one more: in place of one that others hold.
            wanted = sum(-(-count // pool.page_size) + 1 for count in counts.values())
            cache, pool, gone = steps.make_room(cache, pool, jnp.asarray(wanted, jnp.int32))
            evicted = int(np.sum(gone))
            if not evicted:
                return False
        return False

    def prefill_batch(self, slot: int, rows: int) -> Batch:
        """A step of the last ``rows`` cached tokens of a slot."""
        # As arrays: Python ints would be static, and every slot and every length would compile a program.
        batch = steps.prefill_batch(self.pool, jnp.asarray(slot), jnp.asarray(rows))
        return self._with_values(batch, [self.running.get(slot)])

    def decode_batch(self, slots: Sequence[int]) -> Batch:
        """A step of one row for every slot, of which those in ``slots`` are live."""
        batch = steps.decode_batch(self.pool, self._is_in(slots))
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
        for slot in slots:
            self.keep(slot, has_partial=True)
        self.pool = steps.release(self.pool, self._is_in(slots))
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
        request.cached, request.is_begun = 0, False
        request.preemptions += 1
        self.waiting.appendleft(request)

    def _per_slot(self, counts: dict[int, int], other: int = 0) -> Int[Array, " seqs"]:
        """Numbers of some slots, and another for all others."""
        return jnp.asarray([counts.get(slot, other) for slot in range(self.pool.num_slots)], jnp.int32)

    def _is_in(self, slots: Sequence[int]) -> Bool[Array, " seqs"]:
        return jnp.asarray(np.isin(np.arange(self.pool.num_slots), list(slots)))
