"""The walk over tiles that the forward pass and its gradient share: which tiles there are, and what each means.

A tile is one row block, of one sequence, against one page block: some of the pages that the rows can see.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from paged.spec import LARGEST_INT32, Given, Pages

from ..program import Program, Sequences, Terms, Visits, is_ancestor
from .blocks import RowBlock, RowBlocks
from .lists import visits_of
from .schedule import IN_TURN


def dot_products(
    q: Float[Array, "kv_heads group_rows head_dim"], k: Float[Array, "kv_heads keys head_dim"]
) -> Float[Array, "kv_heads group_rows keys"]:
    """Products of queries and keys, in full float32."""
    return jnp.einsum("hrd,hkd->hrk", q, k, precision="highest")


class Operands(NamedTuple):
    """Everything traced: what gradients flow to, and the integers that say where it lies."""

    q: Float[Array, "tokens q_heads head_dim"]
    pages: Pages
    constants: Any
    seqs: Sequences
    row_blocks: RowBlocks


class Parts(NamedTuple):
    """The parts of operands that derivatives have: the queries, the arrays of float pages, and float constants.

    A part that is absent is None; absent ``arrays`` are ``()``. Scales of quantised pages are constants.
    """

    q: Any
    arrays: tuple[Any, ...]
    constants: tuple[Any, ...]

    @classmethod
    def of(cls, operands: Operands, like: "Parts | None" = None) -> "Parts":
        """The parts of operands; only those that are in ``like``, if it is given."""
        arrays = () if operands.pages.layout.is_quantised else operands.pages.arrays
        constants = tuple(c if jnp.issubdtype(c.dtype, jnp.inexact) else None for c in operands.constants)
        return cls(operands.q, arrays, constants).only(like)

    def only(self, like: "Parts | None") -> "Parts":
        """The parts that are in ``like`` too."""
        if like is None:
            return self
        constants = (c if one is not None else None for c, one in zip(self.constants, like.constants, strict=True))
        return Parts(None if like.q is None else self.q, self.arrays if like.arrays else (), tuple(constants))

    def put_in(self, operands: Operands) -> Operands:
        """The operands with these parts in place of their own."""
        pages = operands.pages
        return operands._replace(
            q=operands.q if self.q is None else self.q,
            pages=dataclasses.replace(pages, arrays=self.arrays) if self.arrays else pages,
            constants=self.put_constants(operands.constants),
        )

    def put_constants(self, constants: Any) -> tuple[Any, ...]:
        """The constants, with those that are parts in place of them."""
        return tuple(c if own is None else own for c, own in zip(constants, self.constants, strict=True))


class PageBlock(NamedTuple):
    """Pages that one row block visits: where they lie in the pool, and each key's place and position.

    The two are equal but for tokens of this step, where the batch brings positions.

    The last page block is filled up by repeating a page; ``is_visit`` is False there.
    """

    ids: Int[Array, " pages_per_block"]
    place: Int[Array, "1 1 keys"]
    j: Int[Array, "1 1 keys"]
    is_visit: Bool[Array, "1 1 keys"]


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """The static facts of a walk.

    ``rows`` are the query rows of a row block, and ``row_blocks_at_once`` of these are worked on side by side. A page
    block has ``pages_per_block`` pages, and one step of the softmax takes ``blocks_per_step`` of these. ``form`` is the
    schedule's.

    Arrays of a tile have an axis ``group_rows``: the query heads that share a KV head, and for each the rows.
    """

    program: Program
    terms: Terms
    rows: int
    pages_per_block: int
    blocks_per_step: int
    row_blocks_at_once: int
    form: str = IN_TURN

    def fold(self, x: Float[Array, "rows q_heads dim"]) -> Float[Array, "kv_heads group_rows dim"]:
        """Rows of all query heads, as rows of KV heads."""
        split = x.reshape(self.rows, self.program.num_kv_heads, self.program.group, -1)
        return jnp.moveaxis(split, 0, 2).reshape(self.program.num_kv_heads, self.program.group * self.rows, -1)

    def unfold(self, x: Float[Array, "kv_heads group_rows dim"]) -> Float[Array, "rows q_heads dim"]:
        """The inverse of `fold`."""
        split = x.reshape(self.program.num_kv_heads, self.program.group, self.rows, -1)
        return jnp.moveaxis(split, 2, 0).reshape(self.rows, self.program.num_q_heads, -1)

    def rows_of(self, row_block: RowBlock, x: Float[Array, "tokens q_heads dim"]) -> Array:
        """The row block's rows of an array, folded; 0 for rows that its sequence does not have."""
        rows = jnp.where(row_block.is_row[:, None, None], x[row_block.row].astype(jnp.float32), 0.0)
        return self.fold(rows)

    def visits(self, row_block: RowBlock, operands: Operands) -> Visits:
        """The pages that the row block visits: as they were listed for the step, or else listed here."""
        if row_block.visits is not None:
            return row_block.visits
        pages = operands.pages
        return visits_of(self.program, row_block, operands.seqs, pages.layout.page_size, pages.num_pages, self.form)

    def num_page_blocks(self, visits: Visits) -> Int[Array, ""]:
        """How many page blocks the visits make."""
        return -(-visits.count // self.pages_per_block)

    def over_page_blocks(self, first: Any, last: Any, visits: Visits, step: Callable[..., Any], start: Any) -> Any:
        """Fold ``carry = step(i, carry, is_masked)`` over the page blocks ``first <= i < last``.

        Page blocks that are visible in full come first, with ``is_masked`` False.
        """
        masked = jnp.clip(visits.num_full // self.pages_per_block, first, last)
        carry = jax.lax.fori_loop(first, masked, functools.partial(step, is_masked=False), start)
        return jax.lax.fori_loop(masked, last, functools.partial(step, is_masked=True), carry)

    def page_block(self, which: Any, visits: Visits, row_block: RowBlock, page_size: int) -> PageBlock:
        """Page block number ``which`` of the visited pages."""
        entry = which * self.pages_per_block + jnp.arange(self.pages_per_block, dtype=jnp.int32)
        is_visit = entry < visits.count
        entry = jnp.minimum(entry, jnp.maximum(visits.count - 1, 0))
        if visits.is_seen is not None:
            is_visit = is_visit & visits.is_seen[entry]
        place = visits.index[entry][:, None] * page_size + jnp.arange(page_size, dtype=jnp.int32)[None]
        place, own = place.reshape(1, 1, -1), row_block.own
        j = place
        if own is not None:
            row = jnp.clip(own.start + own.number_of(place), 0, own.positions.shape[0] - 1)
            j = jnp.where((own.number_of(place) >= 0) & (place < row_block.length), own.positions[row], place)
        return PageBlock(visits.page[entry], place, j, jnp.repeat(is_visit, page_size).reshape(1, 1, -1))

    def visible(
        self, page_block: PageBlock, row_block: RowBlock, constants: Any
    ) -> Bool[Array, "kv_heads_or_1 group_rows keys"]:
        """Which pairs of the tile are visible: the same for every KV head, unless visibility differs by query head."""
        p, is_row = self.positions(row_block), self._of_rows(row_block.is_row)
        given, length, own = Given(row_block.numbers), row_block.length, row_block.own
        exists = page_block.is_visit & is_row
        if own is not None:
            # Positions may be any numbers: whether a key exists is told by its place.
            exists, length = exists & (page_block.place < length), jnp.int32(LARGEST_INT32)
            if self.program.has_ancestors and own.words is not None:
                words = [self._of_rows(own.words[:, i]) for i in range(own.words.shape[1])]
                of_row = is_ancestor(words, self._of_rows(own.number), own.number_of(page_block.place))
                given = given._replace(is_ancestor=of_row)
        return self.terms.visible(constants, given, p, page_block.j, length, self.heads) & exists

    def scores(
        self,
        q: Array,
        k: Array,
        constants: Any,
        p: Int[Array, "1 group_rows 1"],
        j: Int[Array, "1 1 keys"],
        numbers: Mapping[str, Any],
        product: Callable[[Array, Array], Array] = dot_products,
    ) -> Float[Array, "kv_heads group_rows keys"]:
        """The tile's scores before the mask, from folded queries and the tile's keys, both float32."""
        return self.terms.scores(constants, Given(numbers), product(q * self.program.scale, k), p, j, self.heads)

    def positions(self, row_block: RowBlock) -> Int[Array, "1 group_rows 1"]:
        """The position of each row of a tile."""
        return self._of_rows(row_block.position)

    def _of_rows(self, x: Shaped[Array, " rows"]) -> Shaped[Array, "1 group_rows 1"]:
        return jnp.tile(x, self.program.group).reshape(1, -1, 1)

    @property
    def heads(self) -> Int[Array, "kv_heads group_rows 1"]:
        """The query head of each row of a tile."""
        program = self.program
        head = jnp.arange(program.num_q_heads, dtype=jnp.int32).reshape(program.num_kv_heads, program.group)
        return jnp.repeat(head, self.rows, axis=1)[..., None]
