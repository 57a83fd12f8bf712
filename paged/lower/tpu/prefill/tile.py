"""One tile of many query rows over the visible pages of its sequence, near the matrix units' rate.

A tile's rows come in parts of up to 384, each of one KV head. For a block of keys, every part goes through two stages:
its scores, and then its weights and their product with the values. One part's scores are computed beside the weights of
the part before it, in one straight line of code, so that the matrix units have work while exponentials are taken; over
blocks that are visible in full this goes on without an end from block to block.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ...program import Terms, raise_top
from ..pages import Stream, dot
from .refs import LANES, SUBLANES, Block, Body, Refs, Strides
from .shape import TileShape

Ref = Any
# Parts in one straight line of code: with fewer, the matrix units wait where lines meet.
MOST_UNROLLED = 16


@dataclasses.dataclass(frozen=True)
class Tile:
    """The kernel for tiles of one shape. ``bodies`` are smallest first; the last is the whole block. With
    ``fetches_beside`` the copies of a block's pages may begin beside products."""

    shape: TileShape
    strides: Strides
    bodies: tuple[Body, ...]
    most_unrolled: int
    fetches_beside: bool

    def run(self, refs: Refs, item: Any, end: Any, place: Any, slot: Any, before_results: Callable[[], None]) -> Any:
        """Attend one item, whose queries are in ``place`` and first block in ``slot``, up to results in the buffer;
        the slot of the next item's first block."""
        self._start(refs, place)
        slot = self._over_blocks(refs, item, end, slot)
        before_results()
        self._finish(refs)
        return slot

    def _start(self, refs: Refs, place: Any) -> None:
        """Put the queries of each head together."""
        shape, lanes = self.shape, refs.queries.shape[1]

        def begin(strip):
            rows = self._strip_rows(strip)
            for column in range(self.strides.q_columns):
                x = refs.q_buffer[place, self._positions(strip, self.strides.q, self.strides.q_columns, column)]
                width = min(LANES, lanes - column * LANES)
                refs.queries[rows, pl.ds(column * LANES, width)] = x[:, :width].astype(refs.queries.dtype)

        _unrolled_loop(shape.strips, self.most_unrolled // 2, begin)

    def clear(self, refs: Refs) -> None:
        """The state of no key at all, as every tile finds and leaves it, in all rows."""
        _unrolled_loop(self.shape.parts, self.most_unrolled // 2, functools.partial(self._clear, refs))

    def _clear(self, refs: Refs, part: Any) -> None:
        for state, nothing in ((refs.top, -jnp.inf), (refs.total, 0.0), (refs.values, 0.0)):
            state[self._part_rows(part)] = jnp.full((self.shape.rows, state.shape[1]), nothing, jnp.float32)

    def _over_blocks(self, refs: Refs, item: Any, end: Any, slot: Any) -> Any:
        """Fold the item's blocks: those visible in full, and then the others."""
        stream, whole_body = refs.stream, self.bodies[-1]
        size = stream.pages_per_block
        count, begin = stream.work.count[item], stream.work.begin[item]
        whole, total = jax.lax.div(stream.work.num_full[item], size), jax.lax.div(count + size - 1, size)

        def block(i, slot):
            return Block(slot, jax.lax.rem(i, 2), begin + i * size)

        def whole_block(i, slot):
            fetch = self._fetch(stream, end, stream.before(slot))
            here, there, is_last = block(i, slot), block(i + 1, stream.after(slot)), i + 1 == whole

            @pl.when(jnp.logical_not(is_last))
            def _():
                stream.wait_whole(stream.after(slot))
                self._prepare(refs, whole_body, item, there, size, is_masked=False)

            # After the last block there is nothing to go on to; its own first scores again are as good as any.
            self._fold(refs, whole_body, item, here, _choose(is_last, here, there), is_masked=False, beside=fetch)
            return stream.after(slot)

        def other_block(i, slot):
            stream.fetch_next(end, stream.before(slot))
            stream.wait(item, i, slot)
            stream.silence(item, i, slot)
            pages = stream.pages_of(item, i)
            enough = sum((pages > body.views.pages_per_block).astype(jnp.int32) for body in self.bodies[:-1])
            branches = [functools.partial(self._masked_block, refs, body, item) for body in self.bodies]
            jax.lax.switch(enough, branches, block(i, slot), pages)
            return stream.after(slot)

        @pl.when(whole > 0)
        def _():
            stream.wait_whole(slot)
            self._prepare(refs, whole_body, item, block(0, slot), size, is_masked=False)
            self._score(refs, whole_body, item, block(0, slot), 0, 0, is_masked=False)

        slot = jax.lax.fori_loop(0, whole, whole_block, slot)
        return jax.lax.fori_loop(whole, total, other_block, slot)

    def _fetch(self, stream: Stream, end: Any, slot: Any) -> Callable[[int], None] | None:
        """Fetch the next block into ``slot``: by calls of the result beside every part, if all are in one line of code,
        and else at once. Of two slots the other's block is waited for before any part, so it must be on its way."""
        is_line = _unrolled(self.shape.parts, self.most_unrolled) == self.shape.parts
        if self.fetches_beside and is_line and stream.buffers > 2:
            return stream.fetch_beside(end, slot, self.shape.parts)
        return stream.fetch_next(end, slot)

    def _masked_block(self, refs: Refs, body: Body, item: Any, here: Block, pages: Any) -> None:
        self._prepare(refs, body, item, here, pages, is_masked=True)
        self._mask(refs, body, item, here)
        self._score(refs, body, item, here, 0, 0, is_masked=True)
        self._fold(refs, body, item, here, here, is_masked=True)

    def _fold(
        self,
        refs: Refs,
        body: Body,
        item: Any,
        here: Block,
        after: Block,
        is_masked: bool,
        beside: Callable[[int], None] | None = None,
    ) -> None:
        """All parts over one block, the first of which has its scores; ``after`` is the block whose first part's scores
        are computed at the end."""
        parts = self.shape.parts
        unrolled = _unrolled(parts, self.most_unrolled // (2 if is_masked else 1))

        def some(turn):
            for step in range(unrolled):
                part, goes_on = turn * unrolled + step, step + 1 < unrolled
                place, next_place = step % 2, (step + 1) % unrolled % 2
                then, next_part = here, part + 1
                if not goes_on and parts == unrolled:
                    then, next_part = after, 0
                elif not goes_on:
                    is_end = part + 1 == parts
                    then, next_part = _choose(is_end, after, here), jnp.where(is_end, 0, part + 1)
                score = functools.partial(self._score, refs, body, item, then, next_part, next_place, is_masked)
                weigh = functools.partial(self._weigh, refs, body, here, part, place, is_masked)
                # Where both stages are in one place, the new scores take that of the old ones.
                for stage in (score, weigh) if place != next_place else (weigh, score):
                    stage()
                if beside is not None:
                    beside(step)

        _loop(parts // unrolled, some)

    def _score(self, refs: Refs, body: Body, item: Any, block: Block, part: Any, place: int, is_masked: bool) -> None:
        """The first stage: a part's scores in units of log 2, -inf where invisible, and the largest of each lane."""
        rows, keys = self.shape.rows, body.keys
        head = _div(part, self.shape.parts_per_head)
        s = dot(refs.queries[self._part_rows(part)], self._stored(refs, body, block, head, 0), contract=1)
        factor = body.scores.factor
        s = s * (factor if refs.k_scale is None else factor * refs.k_scale[head])
        if refs.token_scales is not None:
            s = s * _token_scale(refs.token_scales, block, head, keys)
        if body.has_score_ops:
            p = j = None
            if body.scores.scores_use_positions:
                p = self._query_positions(refs, item, part, keys)
                j = refs.key_position[block.place, pl.ds(0, 1), pl.ds(0, keys)]
                j = jnp.broadcast_to(j, (rows, keys))
            heads = [self._strip_head(strip) for strip in self._strips(part)]
            s = body.scores.scores(_of_heads(refs.arrays, body.scores, heads, rows), s, p, j)
        if is_masked:
            s = jnp.where(self._seen(refs, part, keys), s, -jnp.inf)
        refs.block_top[place, pl.ds(0, rows)] = functools.reduce(jnp.maximum, _lane_groups(s))
        refs.scores[place, pl.ds(0, rows), pl.ds(0, keys)] = s

    def _weigh(self, refs: Refs, body: Body, block: Block, part: Any, place: int, is_masked: bool) -> None:
        """The second stage, one step of the online softmax: weights, and their sums with and without values."""
        rows, keys, own = self.shape.rows, body.keys, self._part_rows(part)
        head = _div(part, self.shape.parts_per_head)
        largest = jnp.max(refs.block_top[place, pl.ds(0, rows)], axis=1, keepdims=True)
        # A score is -inf where it is masked or where a bias says so.
        is_finite = not is_masked and not body.has_score_ops
        largest = jnp.broadcast_to(largest, (rows, LANES))
        refs.top[own], origin, decay = raise_top(refs.top[own], largest, jnp.exp2, is_finite=is_finite)
        s = refs.scores[place, pl.ds(0, rows), pl.ds(0, keys)]
        weights = [jnp.exp2(group - origin) for group in _lane_groups(s)]
        refs.total[own] = decay * refs.total[own] + sum(weights[1:], weights[0])
        v = self._stored(refs, body, block, head, 1)
        weights = _side_by_side(weights)
        if refs.token_scales is not None:
            heads = self.shape.num_q_heads // self.shape.group
            weights = weights * _token_scale(refs.token_scales, block, heads + head, keys)
        lanes = pl.ds(0, v.shape[1])
        decay = _side_by_side([decay] * (refs.values.shape[1] // LANES))[:, : v.shape[1]]
        refs.values[own, lanes] = decay * refs.values[own, lanes] + dot(weights.astype(v.dtype), v, contract=0)

    def _prepare(self, refs: Refs, body: Body, item: Any, block: Block, pages: Any, is_masked: bool) -> None:
        """What all parts need of a block that has arrived, of which ``pages`` are there."""
        views, work, buffers = body.views, refs.stream.work, refs.stream.transfers.buffers
        keys = pl.ds(0, body.keys)
        if refs.apart is not None:
            views.set_apart(buffers, block.slot, refs.apart.at[block.place])
        if not (is_masked or body.scores.scores_use_positions or refs.token_scales is not None):
            return
        j = views.positions(lambda at: jnp.where(at < pages, work.index[block.base + at], views.nowhere))
        refs.key_position[block.place, :, keys] = j
        if refs.token_scales is not None:
            heads = views.layout.num_kv_heads
            k_scale, v_scale = (views.scales(buffer, block.slot) for buffer in buffers[-2:])
            v_scale = jnp.where(j[:1] < work.length[item], v_scale, 0.0)
            scales = jnp.concatenate([k_scale, v_scale], axis=0)
            for row in range(2 * heads):
                at = pl.ds(row * SUBLANES, SUBLANES)
                refs.token_scales[block.place, at, keys] = jnp.broadcast_to(
                    scales[row : row + 1], (SUBLANES, body.keys)
                )

    def _mask(self, refs: Refs, body: Body, item: Any, block: Block) -> None:
        """Which pairs of a block are visible, once for all heads."""
        work, shape = refs.stream.work, (body.mask_rows, body.keys)
        j = jnp.broadcast_to(refs.key_position[block.place, pl.ds(0, 1), pl.ds(0, body.keys)], shape)
        arrays = _of_heads(refs.arrays, body.mask, [0], body.mask_rows)

        def some(turn):
            first = turn * body.mask_rows
            p = work.position[item] + first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            seen = body.mask.visible(arrays, p, j, work.length[item])
            refs.seen[pl.ds(first, body.mask_rows), pl.ds(0, body.keys)] = seen.astype(jnp.int32)

        _loop(self.shape.positions // body.mask_rows, some)

    def _seen(self, refs: Refs, part: Any, keys: int) -> Any:
        """The mask of a part's rows."""
        seen = [refs.seen[pl.ds(self._offset(strip), self.shape.span), pl.ds(0, keys)] for strip in self._strips(part)]
        return _one_above_another(seen) != 0

    def _query_positions(self, refs: Refs, item: Any, part: Any, keys: int) -> Any:
        """The position of each row of a part."""
        shape = (self.shape.span, keys)
        row = refs.stream.work.position[item] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return _one_above_another([row + self._offset(strip) for strip in self._strips(part)])

    def _stored(self, refs: Refs, body: Body, block: Block, head: Any, which: int) -> Any:
        """A head's keys (``which`` 0) or values (1)."""
        if refs.apart is not None:
            return body.views.read_apart(refs.apart.at[block.place], head, which)
        read = body.views.values if which else body.views.keys
        return read(refs.stream.transfers.buffers, block.slot, head)

    def _finish(self, refs: Refs) -> None:
        """Put sums and maxima of all heads of a position next to each other, and clear the state for the next tile; XLA
        normalises them in passing."""
        shape, strides = self.shape, self.strides
        lane = jax.lax.broadcasted_iota(jnp.int32, (shape.span, LANES), 1)
        registers = refs.sums.shape[0]

        def store(part):
            own = self._part_rows(part)
            values, top = refs.values[own], refs.top[own]
            total = jnp.broadcast_to(jnp.sum(refs.total[own], axis=1, keepdims=True), top.shape)
            for i, strip in enumerate(self._strips(part)):
                rows, head = slice(i * shape.span, (i + 1) * shape.span), self._strip_head(strip)
                for column in range(strides.out_columns):
                    at = self._positions(strip, strides.out, strides.out_columns, column)
                    refs.out_buffer[at] = values[rows, column * LANES : (column + 1) * LANES]
                numbered = [(head, total), (shape.num_q_heads + head, top)]
                for together in [numbered] if registers == 1 else [[one] for one in numbered]:
                    register = 0 if registers == 1 else _div(together[0][0], LANES)
                    at = pl.ds(self._offset(strip), shape.span)
                    sums = refs.sums[register, at]
                    for number, x in together:
                        sums = jnp.where(lane == _rem(number, LANES), x[rows], sums)
                    refs.sums[register, at] = sums
            # Where lane sums are waited for these stores take little more than half of their own time (modelled).
            self._clear(refs, part)

        _unrolled_loop(shape.parts, self.most_unrolled, store)
        for register in range(registers):
            for first in range(0, shape.positions, shape.span):
                at = pl.ds(first * strides.out + strides.first_sum + register, shape.span, stride=strides.out)
                refs.out_buffer[at] = refs.sums[register, pl.ds(first, shape.span)]

    def _strips(self, part: Any) -> list[Any]:
        return [part * self.shape.strips_per_part + i for i in range(self.shape.strips_per_part)]

    def _strip_head(self, strip: Any) -> Any:
        return _div(strip, self.shape.spans)

    def _offset(self, strip: Any) -> Any:
        """A strip's first position, from the tile's."""
        return _rem(strip, self.shape.spans) * self.shape.span

    def _strip_rows(self, strip: Any) -> Any:
        return pl.ds(_multiple(strip, self.shape.span), self.shape.span)

    def _part_rows(self, part: Any) -> Any:
        return pl.ds(_multiple(part, self.shape.rows), self.shape.rows)

    def _positions(self, strip: Any, stride: int, columns: int, column: int) -> Any:
        """A strip's rows where every position has ``stride`` of them, ``columns`` to a head."""
        first = self._offset(strip) * stride + self._strip_head(strip) * columns + column
        return pl.ds(first, self.shape.span, stride=stride)


def _unrolled(parts: int, most: int) -> int:
    """Parts in one line of code: an even number, so that the two places of scores take turns, or all of them."""
    return max([n for n in range(2, most + 1, 2) if parts % n == 0], default=parts)


def _unrolled_loop(count: int, most: int, act: Callable[[Any], None]) -> None:
    """``act`` on every number below ``count``, up to ``most`` in one line of code."""
    step = max(n for n in range(1, most + 1) if count % n == 0)

    def some(turn):
        for i in range(step):
            act(turn * step + i)

    _loop(count // step, some)


def _loop(count: int, act: Callable[[Any], None]) -> None:
    """``act`` on every number below ``count``; where that is only 0, on a number that is known beforehand."""
    if count == 1:
        act(0)
    else:
        jax.lax.fori_loop(0, count, lambda i, _: act(i), None)


def _div(a: Any, b: int) -> Any:
    return a // b if isinstance(a, int) else jax.lax.div(a, b)


def _rem(a: Any, b: int) -> Any:
    return a % b if isinstance(a, int) else jax.lax.rem(a, b)


def _multiple(number: Any, of: int) -> Any:
    return number * of if isinstance(number, int) else pl.multiple_of(number * of, of)


def _choose(condition: Any, yes: Block, no: Block) -> Block:
    return Block(*(jnp.where(condition, x, y) for x, y in zip(yes, no, strict=True)))


def _of_heads(arrays: tuple[Ref, ...], terms: Terms, heads: list[Any], rows: int) -> tuple[Any, ...]:
    """What the terms need, in the shapes that they were traced with: rows are those of each head in turn."""
    shapes = jax.eval_shape(terms.early, jax.ShapeDtypeStruct((rows, 1), jnp.int32))
    found = []
    for ref, aval in zip(arrays, shapes, strict=True):
        if aval.size == 1:
            found.append(jnp.full(aval.shape, ref[heads[0]]))
        else:
            column = [jnp.full((rows // len(heads), 1), ref[head]) for head in heads]
            found.append(_one_above_another(column).reshape(aval.shape))
    return tuple(found)


def _token_scale(scales: Ref, block: Block, row: Any, keys: int) -> Any:
    """A head's scales of a block's keys (rows from 0 on) or values: a whole tile is read, since a TPU loads no single
    row of a number that is known only when it runs."""
    return scales[block.place, pl.ds(_multiple(row, SUBLANES), SUBLANES), pl.ds(0, keys)][:1]


def _lane_groups(x: Any) -> list[Any]:
    return [x[:, first : first + LANES] for first in range(0, x.shape[1], LANES)]


def _side_by_side(pieces: list[Any]) -> Any:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)


def _one_above_another(pieces: list[Any]) -> Any:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=0)
