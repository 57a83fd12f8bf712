"""The pool that serves a model, and whether a prefix cache may lie beside it."""

from collections.abc import Sequence

import equinox as eqx
import jax

from paged.spec import AttentionSpec, Pages

from ._groups import Masks, keeps_all
from ._held import GroupSizes
from .grouped_pool import GroupedPool
from .pool import PagePool
from .stacked_state import StackedState


def new_pool(groups: Sequence[Masks], sizes: GroupSizes, num_slots: int, pages_per_seq: int) -> PagePool | GroupedPool:
    """The pool of a model's groups. Where nothing is ever freed, one `PagePool`."""
    pools = [PagePool.init(pages, num_slots, pages_per_seq, sizes.page_size) for pages in sizes.num_pages]
    return pools[0] if len(groups) == 1 and keeps_all(groups[0]) else GroupedPool(pools, groups)


def why_not_shared(specs: Sequence[AttentionSpec], state: eqx.nn.State) -> str | None:
    """Why pages of equal tokens may differ, so that a prefix cache cannot share them; None where they may not."""
    if not specs:
        return "the model holds no attention whose mask is known"
    if any(spec.values for spec in specs):
        return f"a mask or a score names {sorted({v.name for s in specs for v in s.values})}, numbers of a request"
    if has_more_than_pages(state):
        return "the model's state holds more than pages, which later steps may need"
    return None


def has_more_than_pages(state: eqx.nn.State) -> bool:
    """Whether a model's state holds arrays that are no pages."""
    parts = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Pages | StackedState))
    of_stacks = [x.value for x in parts if isinstance(x, StackedState)]
    parts = [x for x in parts if not isinstance(x, StackedState)]
    parts += jax.tree.leaves(of_stacks, is_leaf=lambda x: isinstance(x, Pages))
    return any(eqx.is_array(x) for x in parts)
