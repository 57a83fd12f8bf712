"""In which order a `PrefixCache` gives up its nodes."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt

from . import _prefix_arrays as _arrays

Cache = Any  # a `PrefixCache`, whose module imports this one

# Smaller numbers go first. Up to the first one: nodes that nobody needs, by their last use. Up to the second one: nodes
# whose page no slot holds, but that of a node after them.
UNNEEDED, FREEING = np.uint32(2**31), np.uint32(2**32 - 2)
_FIXED = np.uint32(2**32 - 1)


def order_of_removal(cache: Cache, is_held: Bool[Array, " nodes"], is_fixed: Bool[Array, " nodes"]) -> UInt[Array, "*"]:
    """A number of each node, in the order in which they may go; at least `FREEING` for those that may not.

    **Arguments:**

    - `cache`: the cache.
    - `is_held`: of which nodes a slot holds the page.
    - `is_fixed`: which nodes must stay. So must those before them.
    """
    used = (cache.last_used + 1).astype(jnp.uint32)
    own = jnp.where(is_fixed, _FIXED, jnp.where(is_held, FREEING, used))
    own = jnp.where(cache.counts > 0, own, 0)  # a free node is before nobody
    # A node was used when one after it was: so none goes before those that come after it.
    latest = _arrays.with_ancestors(own, cache.parents)
    order = jnp.where(latest < UNNEEDED, latest, jnp.where(latest == FREEING, UNNEEDED + used, _FIXED))
    return jnp.where(is_held | is_fixed | (cache.counts == 0), _FIXED, order)
