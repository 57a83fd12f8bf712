"""What the scores of a block need beside products: positions, what is visible, and per-token scales."""

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from paged.spec import LARGEST_INT32, NOTHING_GIVEN, Given

from ...program import Program, Running, Terms, is_ancestor
from ..pages import Views
from .refs import Refs


class Block(NamedTuple):
    """Block ``i`` of an item, which has arrived in a stage of the stream, with the item's queries for every tile.

    ``running`` is the softmax of the blocks before, for every tile; None if the item has only this block.
    """

    item: Any
    i: Any
    stage: Any
    q: list
    running: tuple[Running, ...] | None


class Seen(NamedTuple):
    """What the scores of a block need beside products.

    * ``given``: the numbers that the batch brings for the sequence.
    * ``p``, ``j``: positions of query rows and of keys; None if neither scores nor a mask need them.
    * ``visible``: which pairs are visible, once for all tiles or once for each; None if all are.
    * ``scales``: per-token scales of keys and of values; None if there are none.
    """

    given: Given
    p: Any
    j: Any
    visible: tuple[Any, ...] | None
    scales: list | None

    def visible_in(self, tile: int) -> Any:
        """Which pairs of a tile are visible; None if all are."""
        return None if self.visible is None else self.visible[tile % len(self.visible)]


@dataclasses.dataclass(frozen=True)
class Sight:
    """What is visible, by static facts.

    * ``pages_per_block``: pages of a whole block.
    * ``hides_unseen``: whether a block that needs a mask may have pages that no row sees.
    """

    program: Program
    pages_per_block: int
    hides_unseen: bool

    def of_block(self, refs: Refs, block: Block, is_masked: bool, body: tuple[Views, Terms]) -> Seen:
        """What the scores of a block need, by the views and terms of its body."""
        (views, terms), work = body, refs.work
        values, given = self.program.values, NOTHING_GIVEN
        if values:
            given = Given(work.brought_for(block.item).numbers(values))
        p: Any = None
        place: Any = None
        if is_masked or terms.scores_use_positions:
            p = self._query_positions(refs, block, views)
            place = work.key_positions(views, block.item, block.i, self.pages_per_block)
        own = views.is_own_key()
        if not is_masked:
            # Of the step's own tokens no block is visible in full: the keys' positions are their places.
            return Seen(given, p, place, None if own is None else (own,), self._scales(refs, block, views))
        j = self._key_positions(refs, block, place)
        seen = self._visible(refs, block, body, given, p, j, place)
        present = refs.stream.present(views, block.stage)
        seen = seen if present is None else [x & present for x in seen]
        of_any = functools.reduce(operator.or_, seen)
        if self.hides_unseen:
            # Before any product reads the values.
            refs.stream.hide_unseen(block.item, block.i, block.stage, views.seen_pages(of_any))
        scales = self._scales(refs, block, views)
        if scales is not None:
            # Past the length, and where a block has no page, scales may be NaN. A key's is masked with its score; a
            # value's would meet a weight of 0.
            is_live = place[:1] < work.end_of_keys(block.item, views.layout.page_size)
            is_live = is_live if present is None else is_live & present[:1]
            if self.hides_unseen:
                is_live &= jnp.max(jnp.where(of_any, 1.0, 0.0), axis=0, keepdims=True) > 0
            scales[1] = jnp.where(is_live, scales[1], 0.0)
        return Seen(given, p, j, tuple(seen if own is None else (x & own for x in seen)), scales)

    def _query_positions(self, refs: Refs, block: Block, views: Views) -> Int[Array, "tile_rows columns"]:
        """The position of each row's query."""
        brought = refs.work.brought_for(block.item)
        if brought.has_own_rows:
            return views.by_row(brought.positions())
        return refs.work.position[block.item] + views.query_row()

    def _key_positions(self, refs: Refs, block: Block, place: Any) -> Int[Array, "tile_rows columns"]:
        """The position of each column's key: its place, or that of its row if it is one of the step's own tokens."""
        brought, j = refs.work.brought_for(block.item), place
        if brought.has_own_rows:
            number = place - refs.work.position[block.item]
            for i, position in enumerate(brought.positions()):
                j = jnp.where(number == i, position, j)
        return j

    def _visible(
        self, refs: Refs, block: Block, body: tuple[Views, Terms], given: Given, p: Any, j: Any, place: Any
    ) -> list[Any]:
        """Which pairs are visible: for all tiles at once, or for each where heads differ."""
        (views, terms), work = body, refs.work
        tiles = range(views.tiles) if self.program.has_heads else range(1)
        arrays = [tuple(ref[tile] for ref in refs.inputs.arrays) for tile in tiles]
        brought, length = work.brought_for(block.item), work.length[block.item]
        if not brought.has_own_rows:
            return [terms.visible(of_tile, given, p, j, length) for of_tile in arrays]
        if self.program.has_ancestors:
            words, number = [views.by_row(word) for word in brought.words()], place - work.position[block.item]
            given = given._replace(is_ancestor=is_ancestor(words, views.query_row(), number))
        # Positions may be any numbers: whether a key exists is told by its place.
        exists, any_length = place < length, jnp.int32(LARGEST_INT32)
        return [terms.visible(of_tile, given, p, j, any_length) & exists for of_tile in arrays]

    def _scales(self, refs: Refs, block: Block, views: Views) -> list | None:
        """Per-token scales of the block's keys and of its values."""
        if views.layout.scales != "token":
            return None
        return [views.scales(buffer, block.stage) for buffer in refs.stream.transfers.buffers[-2:]]
