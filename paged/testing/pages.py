"""Pages as tests need them: poison where no live token lies, another physical order, and what a step touched."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paged.lower import Attend
from paged.spec import Pages, RaggedBatch

from .failures import require


def poison(pages: Pages, batch: RaggedBatch) -> Pages:
    """The pages with NaN in every place that holds no live token of the batch; in int8 pages -128.

    Per-token scales of such places are NaN too. A result that changes has read what no sequence owns.

    **Arguments:**

    - `pages`: pages of any layout.
    - `batch`: its live sequences own the places of their first ``lengths[s]`` tokens.

    **Returns:** new pages.

    >>> layout = PageLayout(page_size=2, num_kv_heads=1, head_dim=4, dtype=jnp.float32)
    >>> batch = RaggedBatch.decode(lengths=[3], block_tables=[[2, 0]])
    >>> jnp.isnan(poison(layout.init(4), batch).keys()[:, 0, :, 0]).tolist()
    [[False, True], [True, True], [False, False], [True, True]]
    """
    layout, held = pages.layout, held_places(pages, batch)
    filler = -128 if layout.dtype == jnp.int8 else jnp.nan

    def keep(x: jax.Array) -> jax.Array:
        shape = [1] * x.ndim
        shape[layout.page_axis], shape[layout.offset_axis] = held.shape
        mask = held if layout.page_axis < layout.offset_axis else held.T
        return jnp.where(jnp.asarray(mask.reshape(shape)), x, jnp.asarray(filler, x.dtype))

    k_scale, v_scale = pages.k_scale, pages.v_scale
    if layout.scales == "token":
        k_scale, v_scale = (jnp.where(jnp.asarray(held)[:, None, :], x, jnp.nan) for x in (k_scale, v_scale))
    return Pages(tuple(keep(x) for x in pages.arrays), k_scale, v_scale, layout)


def held_places(pages: Pages, batch: RaggedBatch) -> np.ndarray:
    """Where the pages hold a live token of the batch: bool[pages, page_size]."""
    size, held = pages.layout.page_size, np.zeros((pages.num_pages, pages.layout.page_size), bool)
    for slot in range(int(batch.num_seqs)):
        j = np.arange(min(max(int(batch.lengths[slot]), 0), batch.pages_per_seq * size))
        page = np.asarray(batch.block_tables)[slot, j // size]
        is_real = (page >= 0) & (page < pages.num_pages)
        held[page[is_real], j[is_real] % size] = True
    return held


def shuffle_pages(pages: Pages, batch: RaggedBatch, seed: int = 0) -> tuple[Pages, RaggedBatch]:
    """The same tokens in other pages: the pool permuted, and the tables with it.

    **Arguments:**

    - `pages`, `batch`: of a step.
    - `seed`: of the permutation.

    **Returns:** the new pages and batch. Every result must be the same to the bit.

    >>> layout = PageLayout(page_size=2, num_kv_heads=1, head_dim=4)
    >>> _, batch = shuffle_pages(layout.init(4), RaggedBatch.decode(lengths=[3], block_tables=[[2, 0]]), seed=2)
    >>> batch.block_tables[0].tolist()
    [1, 2]
    """
    order = np.random.default_rng(seed).permutation(pages.num_pages)  # the new pool's page i is the old page order[i]
    new_of = np.argsort(order)
    table = np.asarray(batch.block_tables)
    is_real = (table >= 0) & (table < pages.num_pages)
    moved = np.where(is_real, new_of[np.where(is_real, table, 0)], table).astype(np.int32)
    axis, layout = pages.layout.page_axis, pages.layout
    k_scale, v_scale = pages.k_scale, pages.v_scale
    if layout.scales == "token":
        k_scale, v_scale = k_scale[order], v_scale[order]
    shuffled = Pages(tuple(jnp.take(x, order, axis) for x in pages.arrays), k_scale, v_scale, layout)
    return shuffled, dataclasses.replace(batch, block_tables=jnp.asarray(moved))


def assert_no_leak(before: Pages, after: Pages, batch: RaggedBatch) -> None:
    """Assert that a step wrote nothing but its own rows' places.

    **Arguments:**

    - `before`, `after`: the pages before and after the step.
    - `batch`: the step's batch. Sequence ``s`` may write the places of its last rows.

    **Raises:** `CheckFailure` with the page and the offset of a place that another sequence, or nobody, owns.

    >>> layout = PageLayout(page_size=2, num_kv_heads=1, head_dim=4, dtype=jnp.float32)
    >>> batch, rows = RaggedBatch.decode(lengths=[3], block_tables=[[2, 0]]), jnp.ones((1, 1, 4))
    >>> assert_no_leak(layout.init(4), paged.write(rows, rows, layout.init(4), batch), batch)
    """
    size, may = before.layout.page_size, np.zeros((before.num_pages, before.layout.page_size), bool)
    for slot in range(int(batch.num_seqs)):
        n = int(batch.query_starts[slot + 1]) - int(batch.query_starts[slot])
        for j in range(max(int(batch.lengths[slot]) - n, 0), int(batch.lengths[slot])):
            page = int(batch.block_tables[slot, j // size]) if j // size < batch.pages_per_seq else -1
            if 0 <= page < before.num_pages:
                may[page, j % size] = True
    changed = np.zeros_like(may)
    for old, new in zip(before.arrays, after.arrays, strict=True):
        axes = (before.layout.page_axis, before.layout.offset_axis)
        a, b = (np.moveaxis(np.asarray(x).view(np.uint8), axes, (0, 1)) for x in (old, new))
        changed |= (a != b).reshape(*a.shape[:2], -1).any(-1)
    wrong = np.argwhere(changed & ~may)
    where = [tuple(int(x) for x in place) for place in wrong[:4]]
    require(not len(wrong), "no leak", f"the step changed (page, offset) {where}, which no row of the batch owns.")


def assert_in_place(run: Callable[..., Any], *args: Any, donated: int, result: Callable[[Any], Any]) -> Any:
    """Assert that a jitted function gives back the memory of its donated pages.

    **Arguments:**

    - `run`: the function, not jitted yet.
    - `args`: its arguments. The donated one is copied first, so that the caller keeps his.
    - `donated`: the index of the argument that is donated.
    - `result`: picks what must lie where the donated argument lay from what ``run`` returns.

    **Returns:** what ``run`` returned. **Raises:** `CheckFailure` naming the arrays that were copied.

    >>> layout = PageLayout(page_size=2, num_kv_heads=1, head_dim=4, dtype=jnp.float32)
    >>> batch, rows = RaggedBatch.decode(lengths=[3], block_tables=[[2, 0]]), jnp.ones((1, 1, 4))
    >>> step = lambda pages: paged.write(rows, rows, pages, batch)
    >>> pages = assert_in_place(step, layout.init(4), donated=0, result=lambda pages: pages)
    """
    given = jax.tree.map(jnp.copy, args[donated])
    before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(given)]
    returned = jax.jit(run, donate_argnums=donated)(*args[:donated], given, *args[donated + 1 :])
    after = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(result(returned))]
    moved = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    require(not moved, "in place", f"arrays {moved} of argument {donated} were copied, and not updated in place.")
    return returned


def assert_pages_visited(attend: Attend, pages: Pages, batch: RaggedBatch, rows: int, expected: int) -> None:
    """Assert how many pages a call visits, over all sequences: exactly the pages that some row sees.

    **Arguments:**

    - `attend`: a lowered attention.
    - `pages`, `batch`: of the call.
    - `rows`: query rows of the call.
    - `expected`: pages.

    **Raises:** `CheckFailure` with both numbers.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, window=2)
    >>> layout = PageLayout(page_size=2, num_kv_heads=2, head_dim=8)
    >>> batch = RaggedBatch.decode(lengths=[7], block_tables=[[5, 1, 0, 2]])
    >>> assert_pages_visited(paged.lower(spec, layout), layout.init(8), batch, rows=1, expected=2)
    """
    spec = attend.spec
    q = jnp.zeros((rows, spec.num_q_heads, spec.head_dim), jnp.float32)
    got = attend.explain(q, pages, batch).pages_visited
    require(got == expected, "pages visited", f"the call visits {got} pages, and {expected} were expected.")
