"""`Chains`: the nodes of a `PrefixCache` by the hash of their keys, so that few of them are compared."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt


class Chains(eqx.Module):
    """Lists of nodes: those in one list have keys of one hash.

    A hash says only where to look. Whoever looks compares what it finds.

    - `first` i32[chains]: the first node of each list, -1 for none. At least two lists for each node, and a power of
      two.
    - `after` i32[nodes]: the node after each one in its list, -1 for none. Of a node in no list, anything.
    """

    first: Int[Array, " chains"]
    after: Int[Array, " nodes"]

    @classmethod
    def init(cls, nodes: int) -> "Chains":
        """Lists without nodes."""
        return cls(jnp.full(2 << (nodes - 1).bit_length(), -1, jnp.int32), jnp.full(nodes, -1, jnp.int32))

    def of(self, keys: UInt[Array, " some"]) -> Int[Array, " some"]:
        """The list of each key."""
        return ((keys ^ (keys >> 15)) & jnp.uint32(self.first.shape[0] - 1)).astype(jnp.int32)

    def found(
        self, keys: UInt[Array, " some"], is_wanted: Callable[[Int[Array, " some"]], Bool[Array, " some"]]
    ) -> Int[Array, " some"]:
        """In the list of each key the first node for which ``is_wanted(nodes)`` says so; -1 for none."""

        def wrong(nodes: Array) -> Array:
            return (nodes >= 0) & ~is_wanted(nodes)

        def step(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            nodes, is_wrong = carry
            nodes = jnp.where(is_wrong, self.after[nodes], nodes)
            return nodes, wrong(nodes)

        nodes = self.first[self.of(keys)]
        return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), step, (nodes, wrong(nodes)))[0]

    def plus(self, nodes: Int[Array, " some"], keys: UInt[Array, " some"]) -> "Chains":
        """The lists with nodes that are in none, each before those of its list; -1 for no node."""
        number, at = jnp.arange(nodes.shape[0], dtype=jnp.int32), jnp.where(nodes >= 0, self.of(keys), -1)
        is_alike = (at[:, None] == at[None]) & (at >= 0)[None]
        before = jnp.max(jnp.where(is_alike & (number[None] < number[:, None]), number[None], -1), axis=1)
        is_last = ~jnp.any(is_alike & (number[None] > number[:, None]), axis=1)
        after = jnp.where(before >= 0, nodes[before], self.first[at])
        past, none = self.first.shape[0], self.after.shape[0]
        return Chains(
            self.first.at[jnp.where(is_last & (at >= 0), at, past)].set(nodes, mode="drop"),
            self.after.at[jnp.where(nodes >= 0, nodes, none)].set(after, mode="drop"),
        )

    def minus(self, is_gone: Bool[Array, " nodes"]) -> "Chains":
        """The lists without some nodes."""

        def leads_to_gone(nodes: Array) -> Array:
            return (nodes >= 0) & is_gone[nodes]

        def step(after: Array) -> Array:  # also of those that are gone: so each turn passes twice as many of them
            return jnp.where(leads_to_gone(after), after[after], after)

        after = jax.lax.while_loop(lambda after: jnp.any(leads_to_gone(after)), step, self.after)
        return Chains(jnp.where(leads_to_gone(self.first), after[self.first], self.first), after)
