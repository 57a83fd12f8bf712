"""The work of one tile on one block of keys: its scores, and its weights with their products with the values.

Both are done for one strip group at a time. `TileKernel` decides in which order: it computes the scores of one strip
group beside the weights of the strip group before it.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from paged.spec import LARGEST_INT32, Given

from ...program import Program, Terms, is_ancestor, update_maximum
from ..chips import LANES, SUBLANES
from ..pages import Views, dot
from ..references import Ref
from .loops import Index, div, loop, multiple, rem
from .own import store_own_positions
from .refs import Refs
from .shape import TileShape

# Runs of heads that one word of `Scratch.visible` has a bit for.
BITS = 32


class Block(NamedTuple):
    """A block of keys that has arrived.

    * ``stage``: its place in the stream's ring of page buffers.
    * ``half``: the half of the double buffers that holds what is prepared of it, such as the positions of its keys.
    * ``i``: its number in the item.
    """

    stage: Index
    half: Index
    i: Index


@dataclasses.dataclass(frozen=True)
class BlockKernel:
    """Code for one tile shape and the first pages of a block: as many pages as ``views`` has. It ignores later pages.

    Its methods apply the mask if ``is_masked`` is True. A block whose keys are all visible needs no mask.

    * ``shape``: the tile that meets the block.
    * ``scores``: the program's score operations for the rows of a strip group. Their results are in units of log 2.
    * ``mask``: the program's mask for ``mask_rows`` positions.
    * ``hides_unseen``: whether a block that needs a mask may have pages that no row sees.
    * ``own_words``: words of ancestors that the batch brings for each row, 0 where the program asks for none.
    """

    program: Program
    shape: TileShape
    views: Views
    scores: Terms
    mask: Terms
    mask_rows: int
    hides_unseen: bool
    own_words: int

    @property
    def keys(self) -> int:
        """Keys that scores are computed for."""
        return self.views.columns

    @property
    def has_score_ops(self) -> bool:
        """Whether the program has any score operations."""
        return bool(self.program.score_ops)

    def prepare(self, refs: Refs, item: Index, block: Block, is_masked: bool) -> None:
        """Compute what all strip groups need of a block: positions and scales of keys, the mask, and heads laid apart.

        The block must have arrived. All but the mask goes to the block's own half of the double buffers, because strip
        groups may still read the other half for the block before.
        """
        scratch = refs.scratch
        if is_masked or self.scores.scores_use_positions or scratch.token_scales is not None:
            self._store_positions(refs, item, block, is_masked)
        seen = self._find_visible(refs, item, block) if is_masked else None
        if scratch.token_scales is not None:
            self._store_scales(refs, item, block, seen)
        # At last, when values that must be 0 are 0.
        if scratch.deinterleaved is not None:
            self.views.deinterleave(refs.stream.transfers.buffers, block.stage, scratch.deinterleaved.at[block.half])

    def _store_positions(self, refs: Refs, item: Index, block: Block, is_masked: bool) -> None:
        """Store the positions of the block's keys."""
        # Places without a page get a position past every length, so that the mask hides them.
        j = refs.stream.work.key_positions(self.views, item, block.i, refs.stream.pages_per_block)
        present = refs.stream.present(self.views, block.stage) if is_masked else None
        if present is not None:
            j = jnp.where(present, j, self.views.absent_index * self.views.layout.page_size)
        refs.scratch.key_position[block.half, :, pl.ds(0, self.keys)] = j
        if refs.scratch.key_place is not None:
            refs.scratch.key_place[block.half, :, pl.ds(0, self.keys)] = j
            if is_masked:
                store_own_positions(refs, item, block.half, block.i, self.keys)

    def _store_scales(self, refs: Refs, item: Index, block: Block, seen: Any) -> None:
        """Store the per-token scales of the block's keys and values. ``seen`` is what `_find_visible` returned.

        Scales of keys that no row sees may be NaN. The mask replaces the scores of such keys. Their weights are 0, and
        0 times a value's scale of NaN would be NaN.
        """
        work, heads, keys = refs.stream.work, self.views.layout.num_kv_heads, pl.ds(0, self.keys)
        k_scale, v_scale = (self.views.scales(buffer, block.stage) for buffer in refs.stream.transfers.buffers[-2:])
        end = work.end_of_keys(item, self.views.layout.page_size)
        places = refs.scratch.key_position if refs.scratch.key_place is None else refs.scratch.key_place
        is_live = places[block.half, pl.ds(0, 1), keys] < end
        if seen is not None:
            is_live &= seen
        scales = jnp.concatenate([k_scale, jnp.where(is_live, v_scale, 0.0)], axis=0)
        for row in range(2 * heads):
            refs.scratch.token_scales[block.half, pl.ds(row * SUBLANES, SUBLANES), keys] = jnp.broadcast_to(
                scales[row : row + 1], (SUBLANES, self.keys)
            )

    def _find_visible(self, refs: Refs, item: Index, block: Block) -> Any:
        """Evaluate the mask for a block whose positions are stored, once for all heads. Values of pages that no row
        sees become 0.

        Returns which keys some row sees, bool[1, keys]; None if the block has no page that no row sees.

        There is one array of visible pairs. It is overwritten only when every strip group is done with the block
        before, so it needs no second half. Where visibility differs by head, heads that are known to have the same mask
        share a bit of it.
        """
        scratch, shape = refs.scratch, (self.mask_rows, self.keys)
        j = jnp.broadcast_to(scratch.key_position[block.half, pl.ds(0, 1), pl.ds(0, self.keys)], shape)
        arrays = _of_heads(refs.inputs.arrays, self.mask, [0], self.mask_rows)

        def find(turn: Index) -> None:
            first = turn * self.mask_rows
            p = self._positions(refs, item, first, self.mask_rows)
            if self.program.has_heads:
                self._find_by_head(refs, item, block, p, j, first)
            else:
                visible = self._evaluate(refs, item, block, arrays, p, j, first)
                scratch.visible[pl.ds(first, self.mask_rows), pl.ds(0, self.keys)] = visible.astype(jnp.int32)

        loop(self.shape.positions // self.mask_rows, find)
        if not self.hides_unseen:
            return None
        seen = self._seen_by_a_row(refs, item)
        refs.stream.hide_unseen(item, block.i, block.stage, self.views.seen_pages(seen))
        return seen

    def _find_by_head(self, refs: Refs, item: Index, block: Block, p: Any, j: Any, first: Index) -> None:
        """Evaluate the mask for some rows: a bit for each run of heads that have the same, 32 of these in a word."""
        alike = self.program.heads_alike
        for word in range(visible_words(self.program)):

            def add(bit: Index, seen: Any, word: int = word) -> Any:
                arrays = _of_heads(refs.inputs.arrays, self.mask, [(word * BITS + bit) * alike], self.mask_rows)
                visible = self._evaluate(refs, item, block, arrays, p, j, first).astype(jnp.int32)
                return seen | jax.lax.shift_left(visible, jnp.full(visible.shape, bit))

            runs = min(BITS, self.shape.num_q_heads // alike - word * BITS)
            seen = jax.lax.fori_loop(0, runs, add, jnp.zeros(p.shape, jnp.int32))
            rows = pl.ds(word * self.shape.positions + first, self.mask_rows)
            refs.scratch.visible[rows, pl.ds(0, self.keys)] = seen

    def _evaluate(
        self, refs: Refs, item: Index, block: Block, arrays: tuple[Any, ...], p: Any, j: Any, first: Index
    ) -> Any:
        """The mask for the rows of the tile from ``first`` on, at positions ``p``, and keys at ``j``."""
        given, length = self._given(refs, item), refs.stream.work.length[item]
        if refs.scratch.key_place is None:
            return self.mask.visible(arrays, given, p, j, length)
        place = jnp.broadcast_to(refs.scratch.key_place[block.half, pl.ds(0, 1), pl.ds(0, self.keys)], p.shape)
        if self.program.has_ancestors:
            own = refs.stream.work.own[item]
            words = [self._brought(refs, 1 + word, first, self.mask_rows) for word in range(self.own_words)]
            row = jax.lax.broadcasted_iota(jnp.int32, p.shape, 0) + refs.stream.work.position[item] - own + first
            given = given._replace(is_ancestor=is_ancestor(words, row, place - own))
        # Positions may be any numbers: whether a key exists is told by its place.
        return self.mask.visible(arrays, given, p, j, jnp.int32(LARGEST_INT32)) & (place < length)

    def _given(self, refs: Refs, item: Index) -> Given:
        """The numbers that the batch brings for the item's sequence."""
        return Given(refs.stream.work.brought_for(item).numbers(self.program.values))

    def _brought(self, refs: Refs, column: int, first: Index, rows: int) -> Any:
        """A column of what the batch brings for some rows, ``[rows, 1]``: 0 is their positions, and from 1 on the words
        of their ancestors."""
        register, lane = divmod(column, LANES)
        return refs.scratch.own_rows[register, pl.ds(first, rows)][:, lane : lane + 1]

    def _seen_by_a_row(self, refs: Refs, item: Index) -> Any:
        """bool[1, keys]: whether a row of the item sees the key. Spare rows of a tile do not count."""
        shape = (self.mask_rows, self.keys)

        def add(turn: Index, seen: Any) -> Any:
            first = turn * self.mask_rows
            is_row = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0) < refs.stream.work.rows[item]
            visible = refs.scratch.visible[pl.ds(first, self.mask_rows), pl.ds(0, self.keys)]
            if self.program.has_heads:
                for word in range(1, visible_words(self.program)):
                    rows = pl.ds(word * self.shape.positions + first, self.mask_rows)
                    visible |= refs.scratch.visible[rows, pl.ds(0, self.keys)]
                visible = (visible != 0).astype(jnp.int32)
            return jnp.maximum(seen, jnp.where(is_row, visible, 0).astype(jnp.float32))

        seen = jax.lax.fori_loop(0, self.shape.positions // self.mask_rows, add, jnp.zeros(shape, jnp.float32))
        return jnp.max(seen, axis=0, keepdims=True) > 0

    def score(self, refs: Refs, item: Index, block: Block, strip_group: Index, half: int, is_masked: bool) -> None:
        """Compute a strip group's scores into a half of the scratch memory, and the largest score of every lane.

        Scores are in units of log 2, and -inf where the key is invisible. A maximum over lanes takes long. So it is
        left to `weigh`, which runs beside the next strip group's products.
        """
        scratch, rows, keys = refs.scratch, self.shape.strip_group_rows, self.keys
        head = self.shape.kv_head_of(strip_group)
        q = scratch.queries[self.shape.rows_of_strip_group(strip_group)]
        s = dot(q, self._stored(refs, block, head, 0), contract=1)
        factor = self.scores.factor
        s = s * (factor if refs.inputs.k_scale is None else factor * refs.inputs.k_scale[head])
        if scratch.token_scales is not None:
            s = s * _token_scale(scratch.token_scales, block, head, keys)
        if self.has_score_ops:
            p = j = None
            if self.scores.scores_use_positions:
                p = self._query_positions(refs, item, strip_group)
                j = scratch.key_position[block.half, pl.ds(0, 1), pl.ds(0, keys)]
                j = jnp.broadcast_to(j, (rows, keys))
            heads = [self.shape.q_head_of(strip) for strip in self.shape.strips_of(strip_group)]
            arrays = _of_heads(refs.inputs.arrays, self.scores, heads, rows)
            s = self.scores.scores(arrays, self._given(refs, item), s, p, j)
        if is_masked:
            s = jnp.where(self._visible(refs, strip_group), s, -jnp.inf)
        scratch.block_top[half, pl.ds(0, rows)] = functools.reduce(jnp.maximum, _lane_groups(s))
        scratch.scores[half, pl.ds(0, rows), pl.ds(0, keys)] = s

    def weigh(self, refs: Refs, block: Block, strip_group: Index, half: int, is_masked: bool) -> None:
        """One step of the online softmax: add the weights of the scores in a half, and weights times values."""
        scratch, rows, keys = refs.scratch, self.shape.strip_group_rows, self.keys
        group_rows = self.shape.rows_of_strip_group(strip_group)
        head = self.shape.kv_head_of(strip_group)
        largest = jnp.max(scratch.block_top[half, pl.ds(0, rows)], axis=1, keepdims=True)
        # A score is -inf if it is masked or if a bias makes it so. Without either, `update_maximum` need not care.
        is_finite = not is_masked and not self.has_score_ops
        largest = jnp.broadcast_to(largest, (rows, LANES))
        scratch.top[group_rows], origin, decay = update_maximum(
            scratch.top[group_rows], largest, jnp.exp2, is_finite=is_finite
        )
        s = scratch.scores[half, pl.ds(0, rows), pl.ds(0, keys)]
        weights = [jnp.exp2(lanes - origin) for lanes in _lane_groups(s)]
        # Sums stay apart in their lanes. `TileKernel` adds the lanes up once, when the tile is done.
        scratch.total[group_rows] = decay * scratch.total[group_rows] + sum(weights[1:], weights[0])
        v = self._stored(refs, block, head, 1)
        weights = _side_by_side(weights)
        if scratch.token_scales is not None:
            kv_heads = self.shape.num_q_heads // self.shape.group
            weights = weights * _token_scale(scratch.token_scales, block, kv_heads + head, keys)
        lanes = pl.ds(0, v.shape[1])
        decay = _side_by_side([decay] * (scratch.values.shape[1] // LANES))[:, : v.shape[1]]
        scratch.values[group_rows, lanes] = decay * scratch.values[group_rows, lanes] + dot(
            weights.astype(v.dtype), v, contract=0
        )

    def _visible(self, refs: Refs, strip_group: Index) -> Any:
        """Which keys the rows of a strip group see. Unless visibility differs by head, strips of the same positions see
        the same keys."""
        shape, keys = self.shape, pl.ds(0, self.keys)

        def of_strip(strip: Index) -> Any:
            if not self.program.has_heads:
                return refs.scratch.visible[pl.ds(shape.first_position_of(strip), shape.strip_rows), keys]
            run = div(shape.q_head_of(strip), self.program.heads_alike)
            first = multiple(div(run, BITS), shape.positions) + shape.first_position_of(strip)
            bits = refs.scratch.visible[pl.ds(first, shape.strip_rows), keys]
            return jax.lax.shift_right_logical(bits, jnp.full(bits.shape, rem(run, BITS))) & 1

        return _one_above_another([of_strip(strip) for strip in shape.strips_of(strip_group)]) != 0

    def _query_positions(self, refs: Refs, item: Index, strip_group: Index) -> Any:
        """The position of each row of a strip group, for every key."""
        shape = self.shape
        if refs.scratch.own_rows is not None:
            strips = shape.strips_of(strip_group)
            p = [self._brought(refs, 0, shape.first_position_of(strip), shape.strip_rows) for strip in strips]
            return jnp.broadcast_to(_one_above_another(p), (shape.strip_group_rows, self.keys))
        p = refs.stream.work.position[item] + jax.lax.broadcasted_iota(jnp.int32, (shape.strip_rows, self.keys), 0)
        return _one_above_another([p + shape.first_position_of(strip) for strip in shape.strips_of(strip_group)])

    def _positions(self, refs: Refs, item: Index, first: Index, rows: int) -> Any:
        """The positions of some rows of the tile from row ``first`` on, for every key."""
        shape = (rows, self.keys)
        if refs.scratch.own_rows is not None:
            return jnp.broadcast_to(self._brought(refs, 0, first, rows), shape)
        return refs.stream.work.position[item] + first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)

    def _stored(self, refs: Refs, block: Block, head: Index, which: int) -> Any:
        """A KV head's keys (``which`` 0) or values (1)."""
        if refs.scratch.deinterleaved is not None:
            return self.views.read_deinterleaved(refs.scratch.deinterleaved.at[block.half], head, which)
        read = self.views.values if which else self.views.keys
        return read(refs.stream.transfers.buffers, block.stage, head)


def visible_words(program: Program) -> int:
    """Words of `Scratch.visible`: one, or as many as it takes for a bit of each run of heads with the same mask."""
    return -(-program.num_q_heads // program.heads_alike // BITS) if program.has_heads else 1


def _of_heads(arrays: tuple[Ref, ...], terms: Terms, heads: list[Index], rows: int) -> tuple[Any, ...]:
    """The values that the terms need, for ``rows`` rows that are divided evenly among ``heads``, in order.

    ``arrays`` have one number per query head. The terms expect one number per row, or one number for all rows if it is
    the same for all heads.
    """
    shapes = jax.eval_shape(terms.early, jax.ShapeDtypeStruct((rows, 1), jnp.int32))
    found = []
    for ref, aval in zip(arrays, shapes, strict=True):
        if aval.size == 1:
            found.append(jnp.full(aval.shape, ref[heads[0]]))
        else:
            column = [jnp.full((rows // len(heads), 1), ref[head]) for head in heads]
            found.append(_one_above_another(column).reshape(aval.shape))
    return tuple(found)


def _token_scale(scales: Ref, block: Block, row: Index, keys: int) -> Any:
    """Row ``row`` of a block's per-token scales: KV heads' scales of keys come first, of values second.

    A TPU cannot load one row whose number is known only when the kernel runs. So every row is stored 8 times, and all
    8 are loaded.
    """
    return scales[block.half, pl.ds(multiple(row, SUBLANES), SUBLANES), pl.ds(0, keys)][:1]


def _lane_groups(x: Any) -> list[Any]:
    return [x[:, first : first + LANES] for first in range(0, x.shape[1], LANES)]


def _side_by_side(pieces: list[Any]) -> Any:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)


def _one_above_another(pieces: list[Any]) -> Any:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=0)
