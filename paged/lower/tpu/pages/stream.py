"""The stream of pages: the blocks of all items follow one another through a ring of buffers, fetched ahead of the work.

An *item* of the work list has a list of pages, and its *blocks* are ``pages_per_block`` pages of that list each, the
last one perhaps fewer. The stream is the blocks of all items of a core, in order. Each block is copied into the next
*stage* of the ring. Here item 0 has three blocks, items 1 and 2 have one and three, and the ring has 4 stages:

    block      0.0   0.1   0.2   1.0   2.0   2.1   2.2
    stage       0     1     2     3     0     1     2
                            ^     `-----'     ^
                     worked on   on their    cursor: fetched next,
                                   way       into the stage that block 0.1 has left

The *cursor* is the block to fetch next, as an item and a number of its block. It runs ``stages - 1`` blocks ahead of
the work and does not stop where an item ends. So HBM stays busy while a short sequence is finished and the next begun.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..references import Ref
from .intervals import IntervalWork
from .transfer import Transfers
from .views import BITS, SeenPages, Views
from .work import WorkList

# Entries of a stage that one turn of a loop sets to 0.
_ZEROED_AT_ONCE = 2


class Holes(NamedTuple):
    """What is known of the holes in each stage, in scalar memory.

    * ``seen`` i32[stages]: negative if an entry of the stage's block is a hole.
    * ``present`` i32[stages * words]: a bit for each entry that is no hole; written only where there are holes.
    """

    seen: Ref
    present: Ref

    @property
    def words(self) -> int:
        """Words of bits for each stage."""
        return self.present.shape[0] // self.seen.shape[0]

    @classmethod
    def scratch(cls, stages: int, pages_per_block: int) -> "Holes":
        """Memory for what is known of holes."""
        words = -(-pages_per_block // BITS)
        return cls(pltpu.SMEM((stages,), jnp.int32), pltpu.SMEM((stages * words,), jnp.int32))


Work = TypeVar("Work", bound=WorkList | IntervalWork)


@dataclasses.dataclass(frozen=True)
class Stream(Generic[Work]):
    """The blocks of pages of a work list, through the ring of ``transfers``.

    Whoever works on the blocks takes them in order, from stage 0 on. For each block it first has one more block
    fetched, into the stage `before` the block's own, and then waits for the block itself.

    * ``cursor`` i32[2]: the item and the number of the block to fetch next.
    * ``filled`` i32[stages]: the entries of a stage whose values may not be 0, see `zero_dead_values`.
    * ``holes``: what is known of entries whose page is not in the pool; None where the work has no such entry.
    """

    work: Work
    transfers: Transfers
    cursor: Ref
    filled: Ref
    holes: Holes | None = None

    @property
    def stages(self) -> int:
        """Stages of the ring. One holds the block that is worked on; the others are for blocks on their way."""
        return self.transfers.buffers[0].shape[0]

    @property
    def pages_per_block(self) -> int:
        """Pages that a stage holds."""
        return self.transfers.buffers[0].shape[1]

    def before(self, stage: Any) -> Any:
        """The stage that is free while the block in ``stage`` is worked on: that of the block before it."""
        return jnp.where(stage == 0, self.stages - 1, stage - 1)

    def after(self, stage: Any) -> Any:
        """The stage of the next block."""
        return jnp.where(stage == self.stages - 1, 0, stage + 1)

    def begin(self, first: Any, end: Any) -> None:
        """Start to fetch the first blocks of the items ``first`` to ``end``: one for each stage but the last.

        The last stage is the one before stage 0. It is filled when the first block is worked on, as every stage is.
        """
        self.cursor[0] = self.work.item_after(first - 1, True)
        self.cursor[1] = 0
        for stage in range(self.stages):
            # Memory that nothing was written to may hold NaN.
            self.filled[stage] = self.pages_per_block
        for stage in range(self.stages - 1):
            self.fetch_next(end, stage)

    def fetch_next(self, end: Any, stage: Any) -> None:
        """Start to fetch the block at the cursor into a free stage, and move the cursor on.

        At the end of the stream nothing happens. A stage is free when every load from it is earlier in the program:
        pages that arrive would otherwise replace a block that is still read.
        """
        item, i, block = self.cursor[0], self.cursor[1], self.pages_per_block

        @pl.when(item < end)
        def _():
            first, pages = self.work.entry(item, i, block), self.work.count[item] - i * block

            def fetch(entry, seen):
                return self._start(first, stage, entry, seen)

            @pl.when(pages >= block)
            def _():
                seen = functools.reduce(lambda seen, entry: fetch(entry, seen), range(block), self._none_seen)
                self._note_holes(stage, seen)

            @pl.when(pages < block)
            def _():
                self._note_holes(stage, for_each(pages, fetch, self._none_seen))

            self.move_cursor(item, i)

    def _start(self, first: Any, stage: Any, entry: Any, seen: Any) -> Any:
        """Start to copy the page of one entry of the block that begins at entry ``first``.

        Returns ``seen``, which is negative once a page was not in the pool. Nothing is known of such a page but that
        its keys are invisible: any other page is copied in its place, so that every block is as many bytes.
        """
        page = self.work.page[first + entry]
        if self.holes is not None:
            is_hole = hole_sign(page, self.transfers.num_pages)
            seen, page = seen | is_hole, jnp.where(is_hole < 0, 0, page)
        self.transfers.start(page, stage, entry)
        return seen

    @property
    def _none_seen(self) -> Any:
        """What is known of a block before its first page: a hole makes it negative."""
        return None if self.holes is None else jnp.int32(0)

    def _note_holes(self, stage: Any, seen: Any) -> None:
        if self.holes is not None:
            self.holes.seen[stage] = seen

    def has_holes(self, stage: Any) -> Any:
        """Whether an entry of the block in a stage is a hole."""
        return False if self.holes is None else self.holes.seen[stage] < 0

    def until_hole(self, first: Any, end: Any, step: Callable[[Any, Any], Any], start: Any) -> Any:
        """Take ``step(i, carry)`` for the blocks ``first`` to ``end``, and stop before a block with a hole.

        The first part of the carry is the stage of the block. Returns the block before which it stopped, and the carry.
        """
        if self.holes is None:
            return jnp.maximum(first, end), jax.lax.fori_loop(first, end, step, start)

        def goes_on(i: Any, carry: Any) -> Any:
            return (i < end) & jnp.logical_not(self.has_holes(carry[0]))

        def turn(state: Any) -> Any:
            _, i, carry = state
            carry = step(i, carry)
            return goes_on(i + 1, carry), i + 1, carry

        return jax.lax.while_loop(lambda state: state[0], turn, (goes_on(first, start), first, start))[1:]

    def hide_holes(self, item: Any, i: Any, stage: Any) -> None:
        """Set the values of holes to 0 in an item's block ``i``, which must have arrived, and note which they are."""
        holes = self.holes
        if holes is None:
            return

        @pl.when(self.has_holes(stage))
        def _():
            first = self.work.entry(item, i, self.pages_per_block)
            for word in range(holes.words):
                holes.present[stage * holes.words + word] = -1

            def hide(entry, _):
                @pl.when(hole_sign(self.work.page[first + entry], self.transfers.num_pages) < 0)
                def _():
                    self.transfers.zero_values(stage, entry)
                    word = stage * holes.words + jax.lax.div(entry, BITS)
                    bit = jax.lax.shift_left(jnp.int32(1), jax.lax.rem(entry, BITS))
                    holes.present[word] = holes.present[word] & ~bit

            jax.lax.fori_loop(0, self.pages_of(item, i), hide, None)

    def present(self, views: Views, stage: Any) -> Any:
        """Which columns of the block in a stage are of pages in the pool; None where all are. After `hide_holes`."""
        holes = self.holes
        if holes is None:
            return None
        words = [holes.present[stage * holes.words + word] for word in range(holes.words)]
        return views.present([jnp.where(self.has_holes(stage), word, -1) for word in words])

    def hide_unseen(self, item: Any, i: Any, stage: Any, seen: SeenPages) -> None:
        """Set the values of pages that no query row sees to 0 in an item's block ``i``, which must have arrived.

        Their table entries may hold anything. So such a page may be another sequence's, or memory that nobody wrote.
        """

        pages = self.pages_of(item, i)

        def hide(entry, _):
            pl.when(jnp.logical_not(seen.has(entry)))(lambda: self.transfers.zero_values(stage, entry))

        # Most blocks have no such page. To look at each page would then take most of the time (modelled).
        pl.when(seen.lack(pages))(lambda: jax.lax.fori_loop(0, pages, hide, None))

    def fetch_whole_piecewise(self, item: Any, i: Any, stage: Any, pieces: int) -> Callable[[int], None]:
        """A function that starts to fetch a piece of an item's block ``i``, which must be a whole block.

        Call it with 0 to ``pieces - 1``, each time after a product: addresses are then computed while the matrix unit
        works. The cursor stays; call `move_cursor` when the last such block is fetched.
        """
        block = self.pages_per_block
        first, seen = self.work.entry(item, i, block), self._none_seen

        def fetch(piece):
            nonlocal seen
            for entry in range(piece * block // pieces, (piece + 1) * block // pieces):
                seen = self._start(first, stage, entry, seen)
            if piece == pieces - 1:
                self._note_holes(stage, seen)

        return fetch

    def fetch_next_piecewise(self, end: Any, stage: Any, pieces: int) -> Callable[[int], None]:
        """`fetch_next` as a function that fetches one piece of the block at each call.

        Call it with 0 to ``pieces - 1``, in order. It is for straight lines of code: whether there is a page to fetch
        is decided page by page, and never by a branch around the whole block.
        """
        block = self.pages_per_block
        item, i = self.cursor[0], self.cursor[1]
        is_more = item < end
        # At the end of the stream the cursor is past the last item, whose entries can still be looked up.
        looked_up = jnp.minimum(item, end - 1)
        first, last = self.work.entry(looked_up, i, block), self.work.page.shape[0] - 1
        if self.holes is not None:
            # Between products there is no time to look for holes. So a block that may have one is fetched now.
            work: Any = self.work
            has_holes = work.has_holes(looked_up)
            self.holes.seen[stage] = 0
            pl.when(is_more & has_holes)(lambda: self.fetch_next(end, stage))
            is_more &= jnp.logical_not(has_holes)
        pages = jnp.where(is_more, self.work.count[looked_up] - i * block, 0)
        # Here and not between the pieces: to find the next item may take a loop, which would break the straight line.
        pl.when(is_more)(lambda: self.move_cursor(item, i))

        def fetch(piece):
            for entry in range(piece * block // pieces, (piece + 1) * block // pieces):
                # Outside of the condition, so that there is no branch: another page is looked up where there is none.
                page = self.work.page[jnp.minimum(first + entry, last)]
                pl.when(entry < pages)(functools.partial(self.transfers.start, page, stage, entry))

        return fetch

    def move_cursor(self, item: Any, fetched: Any) -> None:
        """Move the cursor to the block after block ``fetched`` of ``item``, perhaps the first of the next item with
        pages."""
        is_last = (fetched + 1) * self.pages_per_block >= self.work.count[item]
        self.cursor[0] = self.work.item_after(item, is_last)
        self.cursor[1] = jnp.where(is_last, 0, fetched + 1)

    def pages_of(self, item: Any, i: Any) -> Any:
        """The number of pages of an item's block ``i``."""
        return jnp.minimum(self.work.count[item] - i * self.pages_per_block, self.pages_per_block)

    def wait_whole(self, stage: Any) -> None:
        """Wait until a whole block has arrived in a stage."""
        self.transfers.wait(stage, self.pages_per_block)
        self.filled[stage] = self.pages_per_block

    def wait(self, item: Any, i: Any, stage: Any) -> None:
        """Wait until an item's block ``i``, of any number of pages, has arrived in its stage. `zero_dead_values` must
        follow, which notes how many entries are filled."""
        self.transfers.wait_for(stage, self.pages_of(item, i))

    def zero_dead_values(self, item: Any, i: Any, stage: Any) -> None:
        """Set to 0 the values that belong to no live token in an item's block ``i``, which must have arrived.

        A masked key has weight 0, but 0 times NaN is NaN. Two kinds of values may be NaN: those past the length in the
        last page of a sequence, and those of entries that hold no page of this block. Such an entry was never written,
        or it still holds a page of an earlier block, which may belong to another sequence.
        """
        size, block, pages = self.transfers.layout.page_size, self.pages_per_block, self.pages_of(item, i)
        last = self.work.index_of(item, self.work.entry(item, i, block) + pages - 1)
        live = self.work.length[item] - last * size

        # At every visit, because the page has just been copied from the pool again.
        @pl.when(live < size)
        def _():
            self.transfers.zero_dead_values(stage, pages - 1, live)

        # Only entries that were filled since they were last set to 0: blocks of as many pages each leave none.
        def zero(turn, _):
            for ahead in range(_ZEROED_AT_ONCE):
                # One entry more is 0 already, or the last one, which has no page either.
                entry = jnp.minimum(pages + turn * _ZEROED_AT_ONCE + ahead, block - 1)
                self.transfers.zero_values(stage, entry)

        turns = jax.lax.div(self.filled[stage] - pages + _ZEROED_AT_ONCE - 1, _ZEROED_AT_ONCE)
        jax.lax.fori_loop(0, turns, zero, None)
        self.filled[stage] = pages


def hole_sign(page: Any, num_pages: int) -> Any:
    """A number that is negative where a page is not in the pool: one of both is, or overflows to a negative one."""
    return page | (num_pages - 1 - page)


def for_each(count: Any, act: Callable[[Any, Any], Any], start: Any) -> Any:
    """``act(i, carry)`` for every ``i < count``, four in each turn of a loop while there are four. ``start`` is the
    first carry, and the last one is returned."""

    def four(i, carry):
        return functools.reduce(lambda carry, step: act(4 * i + step, carry), range(4), carry)

    fours = jax.lax.div(count, 4)
    carry = jax.lax.fori_loop(0, fours, four, start)
    return jax.lax.fori_loop(4 * fours, count, act, carry)
