"""Trees of drafted tokens: their shapes, their batches, and what becomes of the accepted path.

A step of speculative decoding gives each sequence a few rows. Row 0 is the sequence's last token, and the others are
drafts: each follows another row, its *parent*. A mask with `Tree` lets a row see its ancestors alone, so that one step
scores every path of the tree (Miao et al., SpecInfer, arXiv:2305.09781). `commit` then moves the tokens of the accepted
path together.

>>> drafts = tree.from_topk((2, 1))  # two tokens after the last one, and one after each of these
>>> drafts.parents.tolist(), drafts.depth.tolist(), tree.paths(drafts)
([-1, 0, 0, 1, 2], [0, 1, 1, 2, 2], [(0, 1, 3), (0, 2, 4)])
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from paged.spec import LARGEST_INT32, Pages, RaggedBatch, require_positive_int

from .base import Lowering
from .program import Sequences
from .registry import select_write
from .require import require_batch, require_pages
from .xla import Places, stored_at, write_scales

_WORD = 32


class Drafts(NamedTuple):
    """The shape of a tree of ``rows`` rows; or of one for each sequence, with a leading axis.

    * ``parents`` i32[rows]: the row that each row follows; -1 for a row that follows what is stored already.
    * ``depth`` i32[rows]: how many rows each row descends from.
    * ``ancestors`` i32[rows, words]: these rows as bits, see `RaggedBatch`; a row's own bit is set too.
    """

    parents: Int[Array | np.ndarray, "*seqs rows"]
    depth: Int[Array | np.ndarray, "*seqs rows"]
    ancestors: Int[Array | np.ndarray, "*seqs rows words"]


def from_parents(parents: Any) -> Drafts:
    """The tree in which each row follows its parent.

    **Arguments:**

    - `parents` i32[rows] or i32[seqs, rows]: the parent of each row, a row before it; -1 for none. It may be traced.

    **Returns:** the shape of the tree. A parent that is not before its row counts as none; concrete ones raise
    ``ValueError``.

    >>> tree.from_parents([-1, 0, 0, 2]).ancestors[:, 0].tolist()
    [1, 3, 5, 13]
    """
    is_traced = isinstance(parents, jax.Array)
    xp: Any = jnp if is_traced else np
    parents = xp.asarray(parents, xp.int32)
    rows = parents.shape[-1]
    row = np.broadcast_to(np.arange(rows, dtype=np.int32), parents.shape)
    is_before = (parents >= -1) & (parents < row)
    if not is_traced and not is_before.all():
        raise ValueError(f"parents must be rows before their row, or -1; got {parents.tolist()}.")
    parents = xp.where(is_before, parents, -1)
    words = -(-rows // _WORD)
    own = np.zeros((rows, words), np.uint32)
    for i in range(rows):
        own[i, i // _WORD] = 1 << i % _WORD
    bits = xp.broadcast_to(own.view(np.int32), (*parents.shape, words))
    # Each turn doubles how many generations are known: the ancestors of a row, and the ancestor that comes next.
    depth, following = (parents >= 0).astype(xp.int32), parents
    for _ in range((rows - 1).bit_length()):
        has_one, at = following >= 0, xp.maximum(following, 0)
        depth = depth + xp.where(has_one, xp.take_along_axis(depth, at, axis=-1), 0)
        bits = bits | xp.where(has_one[..., None], xp.take_along_axis(bits, at[..., None], axis=-2), xp.int32(0))
        following = xp.where(has_one, xp.take_along_axis(following, at, axis=-1), -1)
    return Drafts(parents, depth, bits)


def chain(rows: int) -> Drafts:
    """The tree of one path: every row follows the row before it.

    **Arguments:**

    - `rows`: how many rows, the last stored token included.

    >>> tree.chain(3).parents.tolist()
    [-1, 0, 1]
    """
    require_positive_int("rows", rows)
    return from_parents(np.arange(rows) - 1)


def from_topk(branching: Sequence[int]) -> Drafts:
    """The tree in which every row of depth ``d`` is followed by ``branching[d]`` rows: the likeliest tokens after it.

    **Arguments:**

    - `branching`: how many rows follow each row of each depth.

    **Returns:** the tree, whose rows are in order of depth: row 0, then ``branching[0]`` rows, and so on. Rows of one
    parent lie side by side.

    >>> tree.from_topk((3, 1)).parents.tolist()
    [-1, 0, 0, 0, 1, 2, 3]
    """
    parents, level = [-1], [0]
    for depth, count in enumerate(branching):
        require_positive_int(f"branching[{depth}]", count)
        following = range(len(parents), len(parents) + count * len(level))
        parents += [parent for parent in level for _ in range(count)]
        level = list(following)
    return from_parents(parents)


def paths(drafts: Drafts) -> list[tuple[int, ...]]:
    """Every path of one tree, from a row without a parent to a row that none follows, in the order of the last rows.

    **Arguments:**

    - `drafts`: a tree of concrete numbers, for one sequence.
    """
    parents = np.asarray(drafts.parents).tolist()
    found = []
    for row in sorted(set(range(len(parents))) - set(parents)):
        path = [row]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        found.append(tuple(path))
    return found


def batch(
    lengths: Any,
    block_tables: Any,
    drafts: Drafts,
    num_seqs: Any = None,
    *,
    values: Mapping[str, Any] | None = None,
) -> RaggedBatch:
    """The step that scores the rows of a tree for every sequence.

    **Arguments:**

    - `lengths` i32[seqs]: tokens of each sequence, all rows of the tree included.
    - `block_tables`, `num_seqs`, `values`: as in `RaggedBatch`.
    - `drafts`: one tree for all sequences, or one for each.

    **Returns:** a batch with as many rows for each sequence as the tree has, with positions and ancestors, for a mask
    with a `Tree`. Row ``i`` is stored as the sequence's token ``lengths - rows + i``, until `commit` moves it.

    >>> step = tree.batch(lengths=[9], block_tables=[[3, 1, 2]], drafts=tree.from_topk((2, 1)))
    >>> step.positions.tolist(), step.ancestors[:, 0].tolist()
    ([4, 5, 5, 6, 6], [1, 3, 5, 11, 21])
    """
    rows, words = drafts.ancestors.shape[-2:]
    plain = RaggedBatch.decode(lengths, block_tables, num_seqs, query_rows=rows, values=values)
    slots = plain.num_slots
    positions = plain.lengths[:, None] - rows + jnp.broadcast_to(jnp.asarray(drafts.depth), (slots, rows))
    ancestors = jnp.broadcast_to(jnp.asarray(drafts.ancestors), (slots, rows, words))
    return RaggedBatch.decode(
        lengths, block_tables, num_seqs, query_rows=rows, values=values,
        positions=positions.reshape(-1), ancestors=ancestors.reshape(-1, words),
    )  # fmt: skip


def accepted_path(
    drafts: Drafts, is_accepted: Bool[Array, "seqs rows"]
) -> tuple[Int[Array, "seqs rows"], Int[Array, " seqs"]]:
    """The longest path of rows that are all accepted, for each sequence.

    **Arguments:**

    - `drafts`: one tree for all sequences, or one for each.
    - `is_accepted`: whether each row's token is what the model gives after its parent. Row 0 is no draft: pass True.

    **Returns:** the rows of the path in order, then zeros; and how many they are. Of paths of one length the one that
    ends first. What `commit` takes.

    >>> rows, count = tree.accepted_path(tree.from_topk((2, 1)), jnp.array([[True, False, True, False, True]]))
    >>> rows[0].tolist(), int(count[0])
    ([0, 2, 4, 0, 0], 3)
    """
    slots, rows = is_accepted.shape
    depth = jnp.broadcast_to(jnp.asarray(drafts.depth), (slots, rows))
    ancestors = jnp.broadcast_to(jnp.asarray(drafts.ancestors), (slots, *drafts.ancestors.shape[-2:]))
    row = jnp.arange(rows, dtype=jnp.int32)
    words = jnp.take(ancestors, row // _WORD, axis=2)
    is_ancestor = (jax.lax.shift_right_logical(words, jnp.broadcast_to(row % _WORD, words.shape)) & 1) == 1
    is_whole = jnp.all(~is_ancestor | is_accepted[:, None], axis=2)
    last = jnp.argmax(jnp.where(is_whole, depth, -1), axis=1)
    is_on_path = jnp.take_along_axis(is_ancestor, last[:, None, None], axis=1)[:, 0] & jnp.any(is_whole, 1)[:, None]
    count = jnp.sum(is_on_path, axis=1, dtype=jnp.int32)
    # A parent is before its row, so rows of a path are in order.
    order = jnp.argsort(~is_on_path, axis=1, stable=True).astype(jnp.int32)
    return jnp.where(row[None] < count[:, None], order, 0), count


def commit(
    pages: Pages,
    batch: RaggedBatch,
    rows: Int[Array, "seqs most"],
    count: Int[Array, " seqs"],
    target: str = "auto",
    *,
    interpret: Any = False,
) -> Pages:
    """Move the keys and values of accepted rows to consecutive places, after a step that scored a tree.

    The sequence's length is then ``lengths - n + count`` for ``n`` rows of the step. Rows that are not accepted are
    left where they are, past the new length, and the next step writes over them.

    **Arguments:**

    - `pages`: the pages of one layer, after the step. Donate them to ``jax.jit``, and they are updated in place.
      For layers in one pool, give each layer's shifted batch: see `RaggedBatch.for_layer`.
    - `batch`: the step's batch.
    - `rows`: for each sequence the accepted rows, increasing: numbers of its rows in this step.
    - `count`: how many of these are accepted, 0 for none.
    - `target`, `interpret`: see `paged.write`.

    **Returns:** the new pages: bits are moved as they are, with their scales. A row number that the sequence does not
    have is not moved. Raises ``ValueError`` or ``TypeError`` for wrong shapes and dtypes.

    >>> layout = PageLayout(page_size=2, num_kv_heads=1, head_dim=1, dtype=jnp.float32)
    >>> step = tree.batch(lengths=[5], block_tables=[[2, 0, 1]], drafts=tree.from_topk((2, 1)))
    >>> k = jnp.arange(5.0).reshape(5, 1, 1)
    >>> pages = write(k, k, layout.init(num_pages=3), step)
    >>> tree.commit(pages, step, jnp.array([[0, 2, 4]]), jnp.array([3])).keys()[jnp.array([2, 0]), 0, :, 0].tolist()
    [[0.0, 2.0], [4.0, 3.0]]
    """
    require_pages(None, pages)
    require_batch(batch)
    rows, count = jnp.asarray(rows), jnp.asarray(count)
    for name, array, rank in (("rows", rows, 2), ("count", count, 1)):
        if array.ndim != rank or array.shape[0] != batch.num_slots or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(
                f"{name} must be integers, with one entry of axis 0 for each of the {batch.num_slots} sequences; got "
                f"{array.dtype.name}{list(array.shape)}."
            )
    lowering = select_write(pages.layout, target)
    lowering = lowering.interpreted(interpret) if interpret else lowering
    return _commit(lowering, pages, batch, rows.astype(jnp.int32), count.astype(jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def _commit(lowering: Lowering, pages: Pages, batch: RaggedBatch, rows: Array, count: Array) -> Pages:
    layout, most = pages.layout, rows.shape[1]
    if not batch.num_slots or not most:
        return pages
    # The moved tokens as a step of their own: ``most`` rows for each sequence, of which it has the first ``count``.
    slots, tokens = batch.num_slots, batch.num_slots * most
    number = jnp.arange(most, dtype=jnp.int32)[None]
    starts = jnp.arange(slots, dtype=jnp.int32) * most
    step = _sequences(batch, layout.page_size)
    count = jnp.minimum(jnp.clip(count, 0, step.counts), most)
    is_moved = (number < count[:, None]) & (rows >= 0) & (rows < step.counts[:, None])
    # A sequence whose first row is before its first token has no tokens to move there.
    lengths = jnp.clip(step.positions + count, 0, step.lengths)
    moved = Sequences(starts, count, step.positions, lengths, step.tables)
    slot = jnp.arange(slots, dtype=jnp.int32)[:, None]
    source = step.positions[:, None] + jnp.where(is_moved, rows, number)
    # A row that is stored nowhere is not moved: the place that it would be moved to keeps its own token.
    is_stored = _is_stored(step, slot, source, layout.page_size, pages.num_pages)
    source = jnp.where(is_stored, source, step.positions[:, None] + number)
    k, v, scales = stored_at(pages, *_place(step, slot, source, layout.page_size, pages.num_pages))
    # Bits are moved: to the write they are keys and values of pages without scales.
    raw = Pages(pages.arrays, None, None, layout.replace(scales="tensor") if layout.is_quantised else layout)
    arrays = lowering.write(k, v, raw, moved, None).arrays
    places = Places.of(moved, tokens, layout.page_size, pages.num_pages)
    return Pages(arrays, *write_scales(scales, pages, places), layout=layout)


def _sequences(batch: RaggedBatch, page_size: int) -> Sequences:
    """The step's sequences, whatever the number of its query rows."""
    tokens = LARGEST_INT32 if batch.query_rows is None else batch.query_rows * batch.num_slots
    return Sequences.of(dataclasses.replace(batch, positions=None, ancestors=None), tokens, page_size)


def _is_stored(seqs: Sequences, slot: Array, place: Array, page_size: int, num_pages: int) -> Array:
    """Whether the table leads from a place to a page of the pool."""
    width = seqs.tables.shape[1]
    page = seqs.tables[slot, jnp.clip(place // page_size, 0, width - 1)]
    return (place >= 0) & (place < width * page_size) & (page >= 0) & (page < num_pages)


def _place(seqs: Sequences, slot: Array, place: Array, page_size: int, num_pages: int) -> tuple[Array, Array]:
    """The page and the offset of each place, flat; of any place where nothing is stored."""
    place = jnp.clip(place, 0, seqs.tables.shape[1] * page_size - 1)
    page = jnp.clip(seqs.tables[slot, place // page_size], 0, num_pages - 1)
    return page.reshape(-1), (place % page_size).reshape(-1)
