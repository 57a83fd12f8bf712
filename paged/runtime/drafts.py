"""`commit`: the accepted path of a tree of drafts, moved together in the pages of every layer."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged.lower import tree
from paged.spec import Pages, RaggedBatch

from .stacked_state import StackedState


def commit(
    state: eqx.nn.State,
    batch: RaggedBatch,
    rows: Int[Array, "seqs most"],
    count: Int[Array, " seqs"],
    target: str = "auto",
    *,
    interpret: Any = False,
) -> eqx.nn.State:
    """`paged.tree.commit` for the pages of all layers of a model.

    **Arguments:**

    - `state`: a model's Equinox state, after a step that scored a tree. Donate it to ``jax.jit``, and its pages are
      updated in place.
    - `batch`: the step's batch, as the model was called with.
    - `rows`, `count`: the accepted rows of each sequence, and how many, see `paged.tree.accepted_path`.
    - `target`, `interpret`: see `paged.write`.

    **Returns:** the new state. Raises as `paged.tree.commit` does.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, mask=paged.Tree())
    >>> layout = PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
    >>> layer, state = eqx.nn.make_with_state(PagedAttention)(spec, layout, 8, 32, key=jax.random.key(0))
    >>> drafts = paged.tree.from_topk((2, 1))
    >>> step = paged.tree.batch(lengths=[5], block_tables=[[3, 1]], drafts=drafts)
    >>> y, state = layer(jnp.ones((5, 32)), step, state)
    >>> rows, count = paged.tree.accepted_path(drafts, jnp.array([[True, False, True, False, True]]))
    >>> state = commit(state, step, rows, count)  # the sequence has 3 tokens now
    """

    def of_pages(pages: Pages, batch: RaggedBatch) -> Pages:
        return tree.commit(pages, batch, rows, count, target, interpret=interpret)

    def of_layer(i: Any, stacked: StackedState) -> StackedState:
        seen, layers = stacked.view(i), stacked.num_layers
        new = jax.tree.map(
            lambda x: of_pages(x, batch.for_layer(i, x.num_pages // layers, layers, stacked.parts[1])),
            seen,
            is_leaf=lambda x: isinstance(x, Pages),
        )
        return stacked.put(i, seen, new)

    def of_part(part: Any) -> Any:
        if isinstance(part, Pages):
            return of_pages(part, batch)
        if isinstance(part, StackedState):
            return jax.lax.fori_loop(jnp.int32(0), jnp.int32(part.num_layers), of_layer, part)
        return part

    return jax.tree.map(of_part, state, is_leaf=lambda x: isinstance(x, Pages | StackedState))
