"""The stream of pages: blocks of all items follow one another into a ring of slots, fetched ahead of the work.

The place from which to fetch, the *cursor*, is a block of an item; while one block is worked on, the next ones are on
their way, those of the next item too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .transfer import Transfers
from .work import Work

Ref = Any


@dataclasses.dataclass(frozen=True)
class Stream:
    """Blocks of pages, in the order of ``work``. Block ``i`` of an item is its pages from ``i * pages_per_block`` on;
    whoever works on the blocks takes them in order, from slot 0 on, and fetches one for each that is done.

    ``cursor`` i32[2] is an item and a block; ``is_clean`` i32[buffers] tells which slots hold finite values only.
    """

    work: Work
    transfers: Transfers
    cursor: Ref
    is_clean: Ref

    @property
    def buffers(self) -> int:
        """Slots, which are blocks in flight."""
        return self.transfers.buffers[0].shape[0]

    @property
    def pages_per_block(self) -> int:
        """Pages that a slot holds."""
        return self.transfers.buffers[0].shape[1]

    def before(self, slot: Any) -> Any:
        """The slot that is free while this one is worked on."""
        return jnp.where(slot == 0, self.buffers - 1, slot - 1)

    def after(self, slot: Any) -> Any:
        """The slot of the block after this slot's."""
        return jnp.where(slot == self.buffers - 1, 0, slot + 1)

    def begin(self, first: Any, end: Any) -> None:
        """Set the stream of items ``first`` to ``end`` going: all slots but the last."""
        self.cursor[0] = self.work.busy[first]
        self.cursor[1] = 0
        for slot in range(self.buffers):
            self.is_clean[slot] = 0
        for slot in range(self.buffers - 1):
            self.fetch_next(end, slot)

    def fetch_next(self, end: Any, slot: Any) -> None:
        """Begin to fetch the block at the cursor into ``slot``, and move on; nothing at the end of the stream."""
        item, i, block = self.cursor[0], self.cursor[1], self.pages_per_block

        @pl.when(item < end)
        def _():
            base, pages = self.work.begin[item] + i * block, self.work.count[item] - i * block

            def fetch(at):
                self.transfers.start(self.work.page[base + at], slot, at)

            @pl.when(pages >= block)
            def _():
                for at in range(block):
                    fetch(at)

            @pl.when(pages < block)
            def _():
                _for_each(pages, fetch)

            self.move_cursor(item, i)

    def fetch_in_parts(self, item: Any, i: Any, slot: Any, parts: int) -> Callable[[int], None]:
        """Fetch block ``i``, a whole one, by calls of the result with 0 to ``parts - 1``, so that addresses are
        computed beside products. Then `move_cursor`."""
        block = self.pages_per_block
        base = self.work.begin[item] + i * block

        def fetch(part):
            for at in range(part * block // parts, (part + 1) * block // parts):
                self.transfers.start(self.work.page[base + at], slot, at)

        return fetch

    def fetch_beside(self, end: Any, slot: Any, parts: int) -> Callable[[int], None]:
        """`fetch_next` in parts, by calls of the result with 0 to ``parts - 1``, in order: for straight lines of code,
        where whether there is a page to fetch must not be a branch."""
        block = self.pages_per_block
        item, i = self.cursor[0], self.cursor[1]
        is_more = item < end
        one = jnp.minimum(item, end - 1)
        base = self.work.begin[one] + i * block
        pages = jnp.where(is_more, self.work.count[one] - i * block, 0)

        def fetch(part):
            for at in range(part * block // parts, (part + 1) * block // parts):

                @pl.when(at < pages)
                def _(at=at):
                    self.transfers.start(self.work.page[base + at], slot, at)

            if part == parts - 1:
                pl.when(is_more)(lambda: self.move_cursor(item, i))

        return fetch

    def move_cursor(self, item: Any, fetched: Any) -> None:
        """To the block after block ``fetched`` of ``item``."""
        is_last = (fetched + 1) * self.pages_per_block >= self.work.count[item]
        self.cursor[0] = jnp.where(is_last, self.work.busy[item + 1], item)
        self.cursor[1] = jnp.where(is_last, 0, fetched + 1)

    def pages_of(self, item: Any, i: Any) -> Any:
        """How many pages block ``i`` of an item has."""
        return jnp.minimum(self.work.count[item] - i * self.pages_per_block, self.pages_per_block)

    def wait_whole(self, slot: Any) -> None:
        """Wait until a whole block has arrived in a slot."""
        self.transfers.wait(slot, self.pages_per_block)

    def wait(self, item: Any, i: Any, slot: Any) -> None:
        """Wait until block ``i`` of an item, of any number of pages, has arrived in its slot."""
        self.transfers.wait_for(slot, self.pages_of(item, i))

    def silence(self, item: Any, i: Any, slot: Any) -> None:
        """Values that no live token has must be finite, since a weight of 0 would not silence them: those past the
        length in a sequence's last page, and those of places where no page has ever arrived."""
        size, block, pages = self.transfers.layout.page_size, self.pages_per_block, self.pages_of(item, i)
        last = self.work.begin[item] + i * block + pages - 1
        live = self.work.length[item] - self.work.index[last] * size

        @pl.when(live < size)
        def _():
            self.transfers.silence(slot, pages - 1, live)

        @pl.when((pages < block) & (self.is_clean[slot] == 0))
        def _():
            jax.lax.fori_loop(pages, block, lambda at, _: self.transfers.silence(slot, at, 0), None)
            self.is_clean[slot] = 1


def _for_each(number: Any, act: Callable[[Any], None]) -> None:
    """``act`` on every number of ``range(number)``, four at a turn as long as there are."""

    def four(i, _):
        for at in range(4):
            act(4 * i + at)

    fours = jax.lax.div(number, 4)
    jax.lax.fori_loop(0, fours, four, None)
    jax.lax.fori_loop(4 * fours, number, lambda i, _: act(i), None)
