"""What the operations of `PagePool` compute: which slots are served, and how pages' counts change."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt

from paged.lower import vary_alike

# How many pages are handed out at once: they are compared with all slots and all words of flags.
_AT_ONCE = 64


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


@jax.jit
def served_in_order(
    extra: Int[Array, "seqs pools"], fits: Bool[Array, " seqs"], num_free: Int[Array, " pools"]
) -> tuple[Bool[Array, " seqs"], Int[Array, "seqs pools"]]:
    """Which slots get their ``extra`` pages, in all pools or in none; and how many of each pool others get before."""
    extra, fits, num_free = vary_alike(extra, fits, num_free)

    def through(ok: Array) -> tuple[Array, Array]:
        asked = jnp.cumsum(jnp.where(ok[:, None], extra, 0), axis=0, dtype=jnp.int32)
        return asked, ok & jnp.any(asked > num_free[None], axis=1)

    def without_first(carry: tuple[Array, tuple[Array, Array]]) -> tuple[Array, tuple[Array, Array]]:
        ok, (_, is_lacking) = carry
        ok = ok & (jnp.arange(ok.shape[0], dtype=jnp.int32) != jnp.argmax(is_lacking).astype(jnp.int32))
        return ok, through(ok)

    # A slot that pages lack for leaves those of the slots after it as they were: so one less in every turn.
    first = fits, through(fits)
    ok, (asked, _) = jax.lax.while_loop(lambda carry: jnp.any(carry[1][1]), without_first, first)
    return ok, asked - jnp.where(ok[:, None], extra, 0)


@jax.jit
def handed_out(
    ref_counts: Int[Array, " pages"],
    tables: Int[Array, "seqs pages_per_seq"],
    first: Int[Array, " seqs"],
    own: Int[Array, " seqs"],
    held: Int[Array, " seqs"],
    count: Int[Array, " seqs"],
) -> tuple[Int[Array, " pages"], Int[Array, "seqs pages_per_seq"]]:
    """The counts and the tables after slots have got free pages, in the order of their numbers.

    **Arguments:**

    - `ref_counts`, `tables`: those before.
    - `first`: which of the free pages is the first of each slot, 0 for the one of the smallest number.
    - `own`: the entry whose shared page the slot replaces by one of its own, the first that it gets; -1 for none.
    - `held`: the entry from which on it gets others.
    - `count`: how many it gets in all.
    """
    free, slots = Places.of(ref_counts == 0), jnp.arange(tables.shape[0], dtype=jnp.int32)
    ref_counts, tables, begin, end, own, held = vary_alike(ref_counts, tables, first, first + count, own, held)

    def some(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        done, counts, tables = carry
        number = done + jnp.arange(_AT_ONCE, dtype=jnp.int32)
        # The slot that gets the page of this number, and which of its pages it is.
        is_its = (begin[None] <= number[:, None]) & (number[:, None] < end[None])
        slot = jax.lax.optimization_barrier(jnp.max(jnp.where(is_its, slots[None], -1), axis=1))
        which = number - begin[slot]
        has_own = own[slot] >= 0
        entry = jnp.where(has_own & (which == 0), own[slot], held[slot] + which - has_own.astype(jnp.int32))
        page = jnp.where(slot >= 0, free.at(number), counts.shape[0])
        tables = tables.at[jnp.where(slot >= 0, slot, tables.shape[0]), entry].set(page, mode="drop")
        return done + _AT_ONCE, counts.at[page].add(1, mode="drop"), tables

    done, _ = vary_alike(jnp.zeros((), jnp.int32), end)
    total = jnp.max(end)
    return jax.lax.while_loop(lambda carry: carry[0] < total, some, (done, ref_counts, tables))[1:]


# Pages of a group, and tables. Each group has as many pages as it needs.
Held = tuple[Int[Array, " _"], Int[Array, "seqs pages_per_seq"]]


@jax.jit
def given_up(
    held: tuple[Held, ...],
    which: Bool[Array, " seqs"],
    gone: tuple[Bool[Array, "seqs entries"], ...],
    others: tuple[Int[Array, " seqs"], ...] | None = None,
) -> tuple[Held, ...]:
    """The counts and the tables of several pools after some slots have given up pages.

    They are gone through one by one: a scatter of all entries takes longer than a step.

    **Arguments:**

    - `held`: the counts and the tables of each pool before.
    - `which`: the slots.
    - `gone`: the entries that they give up; one column for all.
    - `others`: one page more that each slot gives up, -1 for none.
    """
    held, which, gone, others = vary_alike(held, which, gone, others)

    def one(slot: Array, held: tuple[Held, ...]) -> tuple[Held, ...]:
        after = []
        for pool, (counts, tables) in enumerate(held):
            row, more = tables[slot], jnp.full(1, -1, jnp.int32) if others is None else others[pool][slot][None]
            page = jnp.where(gone[pool][slot], row, -1)
            # Of the row that was read, so that XLA sets it in place.
            row = jnp.where(page >= 0, -1, row)
            after.append((counted(counts, jnp.concatenate([page, more]), -1), set_row(tables, slot, row)))
        return tuple(after)

    return for_each(which, one, held)


@jax.jit
def given_rows(held: Held, which: Bool[Array, " seqs"], new: Int[Array, "seqs pages_per_seq"]) -> Held:
    """The counts and the tables after some slots have got pages that others hold, in place of what they had."""
    held, which, new = vary_alike(held, which, new)
    return for_each(which, lambda at, held: (counted(held[0], new[at], 1), set_row(held[1], at, new[at])), held)


def for_each(which: Bool[Array, " seqs"], change: Callable[[Array, Any], Any], carry: Any) -> Any:
    """``carry`` after ``change(slot, carry)`` for each of some slots in order."""
    number = jnp.arange(which.shape[0], dtype=jnp.int32)

    def one(state: tuple[Array, Any]) -> tuple[Array, Any]:
        left, carry = state
        slot = jnp.argmax(left).astype(jnp.int32)
        return left & (number != slot), change(slot, carry)

    return jax.lax.while_loop(lambda state: jnp.any(state[0]), one, (which, carry))[1]


def set_row(tables: Int[Array, "seqs pages_per_seq"], slot: Array, row: Array) -> Int[Array, "seqs pages_per_seq"]:
    """The tables with another row: in place, and compiled in less time than a scatter."""
    return jax.lax.dynamic_update_index_in_dim(tables, row, slot, 0)


class Places(NamedTuple):
    """Where some of many flags are true, to be asked for a few of them: in words of 32 flags.

    * ``words`` u32[words]: the flags. * ``through`` i32[words]: how many are true up to the end of each word.
    """

    words: UInt[Array, " words"]
    through: Int[Array, " words"]

    @classmethod
    def of(cls, flags: Bool[Array, " flags"]) -> "Places":
        parts = jnp.pad(flags, (0, -flags.shape[0] % 32)).reshape(-1, 32)
        words = jnp.sum(
            jnp.where(parts, jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32)[None], 0), axis=1, dtype=jnp.uint32
        )
        return cls(words, jnp.cumsum(jax.lax.population_count(words).astype(jnp.int32), dtype=jnp.int32))

    def at(self, number: Int[Array, " some"]) -> Int[Array, " some"]:
        """The place of the true flag of each number, from 0 on in order; past all flags where there are fewer."""
        # Behind a barrier: XLA would count once more for each use of the number.
        word = jax.lax.optimization_barrier(jnp.sum(self.through[None] <= number[:, None], axis=1, dtype=jnp.int32))
        left = self.words.at[word].get(mode="fill", fill_value=0)
        rest = number - jnp.where(word > 0, self.through[jnp.maximum(word - 1, 0)], 0)
        place = word * 32
        for width in (16, 8, 4, 2, 1):  # is it in the lower half of the bits that are left?
            below = jax.lax.population_count(left & jnp.uint32(2**width - 1)).astype(jnp.int32)
            is_past = rest >= below
            rest, place = jnp.where(is_past, rest - below, rest), jnp.where(is_past, place + width, place)
            left = jnp.where(is_past, left >> width, left)
        return jnp.where(word < self.words.shape[0], place, self.words.shape[0] * 32)
