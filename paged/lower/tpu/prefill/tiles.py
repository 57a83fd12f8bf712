"""How the query rows of a batch are cut into tiles."""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from ...program import QueryRows, Sequences, count_up_to, position_range


def most_tiles(tokens: int, slots: int, rows: int) -> int:
    """The most tiles of ``rows`` query rows that `cut` makes of ``tokens`` query rows in ``slots`` sequence slots.

    Every sequence has at most one tile that is not full, and so have the rows before and after all sequences.
    """
    return tokens // rows + min(slots + 2, tokens)


def cut(seqs: Sequences, is_tiled: Bool[Array, " seqs"], tokens: int, rows: int, most: int) -> Sequences:
    """Tiles of up to ``rows`` consecutive query rows of one sequence, as if each were a sequence of its own.

    Rows of sequences that are not ``is_tiled`` have no tile. Rows of no sequence have tiles that see no key: so it is
    the kernel that puts zeros there. These rows are those before the first sequence's and those after the last one's,
    because sequences' rows follow one another. There are ``most`` tiles. Those with rows come first: those of the
    sequences, in their order, and then those of no sequence.
    """
    before, end = owned(seqs)
    starts = _with(seqs.starts, 0, end)
    counts = _with(jnp.where(is_tiled, seqs.counts, 0), before, tokens - end)
    positions, lengths = _with(seqs.positions, 0, 0), _with(seqs.lengths, 0, 0)
    per_seq = (counts + rows - 1) // rows
    ends = jnp.cumsum(per_seq, dtype=jnp.int32)
    tile = jnp.arange(most, dtype=jnp.int32)
    seq = jnp.sum(ends[None] <= tile[:, None], axis=1, dtype=jnp.int32)
    is_live, seq = seq < ends.shape[0], jnp.minimum(seq, ends.shape[0] - 1)
    first = (tile - (ends - per_seq)[seq]) * rows
    counts = jnp.where(is_live, jnp.clip(counts[seq] - first, 0, rows), 0)
    slot = jnp.minimum(seq, seqs.tables.shape[0] - 1)
    places = starts[seq] + first, counts, positions[seq] + first, lengths[seq]
    return Sequences(*places, seqs.tables[slot], seqs.numbers_of(slot))


def query_rows(seqs: Sequences, tiles: Sequences) -> QueryRows:
    """The rows of tiles, as coverage sees them, if the batch brings positions."""
    assert seqs.own is not None
    slot = jnp.minimum(count_up_to(seqs.starts + seqs.counts, tiles.starts), seqs.starts.shape[0] - 1)
    row = jnp.arange(seqs.own.positions.shape[0], dtype=jnp.int32)[None] - tiles.starts[:, None]
    first, end = position_range(seqs.own.positions[None], (row >= 0) & (row < tiles.counts[:, None]))
    return QueryRows(first, end, tiles.lengths, dict(tiles.numbers), seqs.positions[slot])


def owned(seqs: Sequences) -> tuple[Array, Array]:
    """The first row that a sequence owns, and the row after the last one. Rows of sequences follow one another."""
    # Slots of dead sequences say anything of where their rows would begin.
    end = jnp.max(jnp.where(seqs.counts > 0, seqs.starts + seqs.counts, 0))
    return jnp.minimum(seqs.starts[0], end), end


def _with(x: Array, *more: int | Array) -> Array:
    return jnp.concatenate([x, jnp.stack([jnp.int32(number) for number in more])])
