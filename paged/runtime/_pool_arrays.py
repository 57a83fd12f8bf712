"""What the operations of `PagePool` compute: which slots are served, and how pages' counts change."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged.lower import vary_alike


def entries_held(tables: Int[Array, "seqs pages_per_seq"]) -> Int[Array, " seqs"]:
    """How many table entries each slot uses: up to its last page, whether or not those before it are freed."""
    entry = jnp.arange(1, tables.shape[1] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(tables >= 0, entry, 0), axis=1)


def entries_missing(
    tables: Int[Array, "seqs pages_per_seq"], tokens: Int[Array, " seqs"], page_size: int
) -> Int[Array, " seqs"]:
    """How many pages of so many tokens each slot does not have: those that were freed."""
    entry = jnp.arange(tables.shape[1], dtype=jnp.int32)[None]
    return jnp.sum((entry < -(-tokens // page_size)[:, None]) & (tables < 0), axis=1, dtype=jnp.int32)


def counted(ref_counts: Int[Array, " pages"], pages: Int[Array, "..."], change: int) -> Int[Array, " pages"]:
    """The counts after each of ``pages`` has got so many holders more; negative numbers are no pages."""
    return ref_counts.at[jnp.where(pages >= 0, pages, ref_counts.shape[0])].add(change, mode="drop")


def free_pages(ref_counts: Int[Array, " pages"]) -> Int[Array, " pages"]:
    """The free pages in order, and then as many of the number of pages as there are others."""
    size, is_free = ref_counts.shape[0], ref_counts == 0
    place = jnp.where(is_free, jnp.cumsum(is_free, dtype=jnp.int32) - 1, size)
    return jnp.full(size, size, jnp.int32).at[place].set(jnp.arange(size, dtype=jnp.int32), mode="drop")


def served_in_order(
    extra: Int[Array, "seqs pools"], fits: Bool[Array, " seqs"], num_free: Int[Array, " pools"]
) -> tuple[Bool[Array, " seqs"], Int[Array, "seqs pools"], Int[Array, " pools"]]:
    """Which slots get their ``extra`` pages, in all pools or in none.

    Also how many pages of each pool are handed out before each slot's, and how many in all.
    """
    extra, fits, num_free = vary_alike(extra, fits, num_free)

    def first_of(ok: Array) -> Array:
        asked = jnp.where(ok[:, None], extra, 0)
        return jnp.cumsum(asked, axis=0, dtype=jnp.int32) - asked

    def lacks(ok: Array) -> Array:
        return ok & jnp.any(first_of(ok) + extra > num_free[None], axis=1)

    def without_first(ok: Array) -> Array:
        is_lacking = lacks(ok)
        return ok & ~(is_lacking & (jnp.cumsum(is_lacking, dtype=jnp.int32) == 1))

    # A slot that pages lack for leaves those of the slots after it as they were: so one less in every turn.
    ok = jax.lax.while_loop(lambda ok: jnp.any(lacks(ok)), without_first, fits)
    return ok, first_of(ok), jnp.sum(jnp.where(ok[:, None], extra, 0), axis=0, dtype=jnp.int32)


def taken(ref_counts: Int[Array, " pages"], used: Int[Array, ""]) -> Int[Array, " pages"]:
    """The counts after the first ``used`` free pages have got a holder."""
    is_free = ref_counts == 0
    return ref_counts + (is_free & (jnp.cumsum(is_free, dtype=jnp.int32) <= used)).astype(jnp.int32)
