"""What a batch brings for its query rows, as the prefill kernel reads it beside the queries."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from ...program import OwnRows
from ..chips import LANES, SUBLANES
from .intervals import TileWork
from .loops import Index, div, multiple
from .refs import Refs


class OwnShape(NamedTuple):
    """How much a batch brings for its query rows: ``tokens`` rows, and for each ``words`` of ancestors."""

    tokens: int
    words: int

    @classmethod
    def of(cls, own: OwnRows | None, has_ancestors: bool) -> "OwnShape | None":
        """The shape of what a batch brings, with words if a term asks for ancestors; None if it brings nothing."""
        if own is None:
            return None
        words = 0 if not has_ancestors or own.ancestors is None else own.ancestors.shape[1]
        return cls(own.positions.shape[0], words)

    @property
    def registers(self) -> int:
        """Registers of a row's position and its words."""
        return -(-(1 + self.words) // LANES)

    @property
    def lanes(self) -> tuple[int, int]:
        """The shape of all positions along lanes, see `OwnOperands`."""
        return -(-self.tokens // LANES) + 1, LANES


class OwnOperands(NamedTuple):
    """The positions of query rows, and the words of their ancestors.

    * ``rows`` i32[tokens, registers, lanes]: of each row its position, and then its words. In HBM.
    * ``lanes`` i32[rows of lanes, lanes]: the position of each row, one row after the other along the lanes, and zeros
      at the end. In vector memory. Rows are keys as well, and these lie along the lanes.
    """

    rows: Int[Array, "tokens registers lanes"]
    lanes: Int[Array, "rows lanes"]

    @classmethod
    def of(cls, own: OwnRows | None, shape: OwnShape | None) -> "OwnOperands | None":
        """The operands of what a batch brings, of that shape."""
        if own is None or shape is None:
            return None
        columns = [own.positions[:, None]]
        if shape.words and own.ancestors is not None:
            columns.append(own.ancestors)
        rows = jnp.pad(jnp.concatenate(columns, axis=1), ((0, 0), (0, shape.registers * LANES - 1 - shape.words)))
        lanes = jnp.pad(own.positions, (0, shape.lanes[0] * LANES - shape.tokens))
        return cls(rows.reshape(shape.tokens, shape.registers, LANES), lanes.reshape(shape.lanes))


_HBM: Any = pltpu.HBM
_VMEM: Any = pltpu.VMEM
# The memory of each operand.
OWN_MEMORY = OwnOperands(_HBM, _VMEM)


def store_own_positions(refs: Refs, item: Index, half: Index, i: Index, keys: int) -> None:
    """Store the positions that the batch brings in place of those of keys that are tokens of the step, in the first
    ``keys`` columns of an item's block ``i``, whose places are stored.

    The positions lie along the lanes of `OwnOperands.lanes`, one batch row after the other. For every run of pages with
    such tokens the lanes are rolled to where the run's keys are.
    """
    scratch, work, size = refs.scratch, refs.stream.work, refs.stream.transfers.layout.page_size
    own, first = work.own[item], work.entry(item, i, refs.stream.pages_per_block)
    row_at_0 = work.row[item] - work.position[item]  # the batch row of a token, less its place
    lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)

    def put(begin: Index, count: int, place: Index, group: Index) -> None:
        """Into a group of 128 columns, of a run of ``count`` keys from a column on, at places from ``place`` on."""
        at = multiple(group, LANES)
        column, columns = at + lane, pl.ds(at, LANES)
        places = scratch.key_place[half, :, columns]
        is_own = (places >= own) & (places < work.length[item]) & (column >= begin) & (column < begin + count)
        # As if all lanes were of this run.
        positions = _lanes_from(refs, place + row_at_0 + at - begin)
        others = scratch.key_position[half, :, columns]
        scratch.key_position[half, :, columns] = jnp.where(is_own, positions, others)

    def of_page(entry: Index, _: None) -> None:
        begin, place = entry * size, work.index_of(item, first + entry) * size

        @pl.when(place + size > own)
        def _():
            for ahead in range(_most_groups(size)):
                group = div(begin, LANES) + ahead
                pl.when(group < keys // LANES)(functools.partial(put, begin, size, place, group))

    if not isinstance(work, TileWork):
        jax.lax.fori_loop(0, refs.stream.pages_of(item, i), of_page, None)
        return
    # The block is one run. In one straight line of code, rolls do not wait for each other.
    place = work.index_of(item, first) * size

    @pl.when(place + keys > own)
    def _():
        for group in range(keys // LANES):
            put(0, keys, place, group)


def _most_groups(keys: int) -> int:
    """The most groups of 128 columns in which so many consecutive columns lie, that begin at a multiple of ``keys``."""
    if keys % LANES == 0:
        return keys // LANES
    return 1 if LANES % keys == 0 else (keys + LANES - 2) // LANES + 1


def _lanes_from(refs: Refs, row: Index) -> Any:
    """i32[8, 128]: the positions of 128 rows of the batch from ``row`` on along the lanes, in every row the same.

    Lanes of rows that the batch does not have hold anything.
    """
    lanes = refs.inputs.own.lanes
    last, begin = lanes.shape[0] - 1, jnp.bitwise_and(row, LANES - 1)
    at = jax.lax.shift_right_arithmetic(row, LANES.bit_length() - 1)
    here, following = (lanes[pl.ds(jnp.clip(at + i, 0, last), 1)] for i in range(2))
    here, following = (jnp.broadcast_to(x, (SUBLANES, LANES)) for x in (here, following))
    lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    return pltpu.roll(jnp.where(lane < begin, following, here), jnp.bitwise_and(-begin, LANES - 1), axis=1)
