"""`PrefixHit`: what a lookup in a `PrefixCache` has found."""

import equinox as eqx
from jaxtyping import Array, Int


class PrefixHit(eqx.Module):
    """What `PrefixCache.lookup` has found.

    * ``count`` i32[]: how many tokens.
    * ``nodes`` i32[entries]: the node of each page in token order, -1 past them. Where the last one is of a page whose
      first tokens only are wanted, the slot that writes on gets a copy of it.
    * ``pages`` i32[groups, entries]: the pages, as a block table has them.
    """

    count: Int[Array, ""]
    nodes: Int[Array, " entries"]
    pages: Int[Array, "groups entries"]
