"""Planted bugs of the page pool and of layers that serve from pages."""

import equinox as eqx
import jax.numpy as jnp

from paged.lower import Attend, Sequences
from paged.runtime import PagePool, _pool_requests
from paged.runtime import cache as cache_module
from paged.runtime import pool as pool_module
from paged.runtime._pool_batches import PoolBatches
from paged.runtime.cache import PagedCache

from .base import Mutant
from .planting import attribute, method


def _with(field):
    """A method whose pool keeps this field of the pool before."""

    def mutant(original):
        def keeping(self, *args):
            pool = original(self, *args)
            return eqx.tree_at(lambda pool: getattr(pool, field), pool, getattr(self, field))

        return keeping

    return mutant


def _held_pages_too(original):
    def handed_out(ref_counts, *args):
        counts, tables = original(jnp.zeros_like(ref_counts), *args)
        return ref_counts + counts, tables

    return handed_out


def _from_the_first(original):
    return lambda pool, asked, ok, first: original(pool, asked, ok, jnp.zeros_like(first))


def _from_the_next(original):
    return lambda mask, positions, *args: original(mask, positions + 1, *args)


def _not_freed(pool):
    return jnp.sum(pool.block_tables >= 0, axis=1)


def _not_counted(original):
    return lambda ref_counts, *args: (ref_counts, original(ref_counts, *args)[1])


def _never_shared(original):
    def asked_of(*args):
        asked = original(*args)
        return asked._replace(is_shared=jnp.zeros_like(asked.is_shared))

    return asked_of


def _all_or_none(original):
    def serve(extra, fits, num_free):
        ok, first = original(extra, fits, num_free)
        return jnp.cumprod(ok.astype(jnp.int32)).astype(bool), first

    return serve


POOL = (
    Mutant(
        "pool", "held pages are handed out again", attribute(_pool_requests, "handed_out", _held_pages_too),
        "pool", "only free pages are handed out",
    ),
    Mutant(
        "pool", "two slots get the same pages", attribute(_pool_requests, "given_to", _from_the_first),
        "pool", "only free pages are handed out",
    ),
    Mutant(
        "pool", "released pages are not given back", method(PagePool, "release", _with("ref_counts")),
        "pool", "ref_counts",
    ),
    Mutant(
        "pool", "taken pages are not counted", attribute(_pool_requests, "handed_out", _not_counted),
        "pool", "ref_counts",
    ),
    Mutant(
        "pool", "tables outlive their slots", method(PagePool, "release", _with("block_tables")),
        "pool", "block_tables", in_every_run=False,
    ),
    Mutant(
        "pool", "lengths outlive their slots", method(PagePool, "release", _with("lengths")),
        "pool", "lengths", in_every_run=False,
    ),
    Mutant(
        "pool", "pages are freed while the next token sees them", attribute(pool_module, "kept_pages", _from_the_next),
        "pool, the shortest", "block_tables", in_every_run=False,
    ),
    Mutant(
        "pool", "new pages fill the entries of freed ones", method(PagePool, "entries", lambda _: _not_freed),
        "pool, the shortest", "block_tables", in_every_run=False,
    ),
    Mutant(
        "pool", "pages of several holders are written", attribute(_pool_requests, "asked_of", _never_shared),
        "pool", "only free pages are handed out", in_every_run=False,
    ),
    Mutant(
        "pool", "a step does not know what to copy",
        method(PoolBatches, "_copies_for", lambda of: lambda self, rows: jnp.full_like(of(self, rows), -1)),
        "pool", "tokens", in_every_run=False,
    ),
    Mutant(
        "pool", "a fork is no holder", method(PagePool, "attach", _with("ref_counts")),
        "pool", "ref_counts", in_every_run=False,
    ),
    Mutant(
        "pool", "one free page too many",
        method(PagePool, "num_free", lambda num_free: lambda self: num_free(self) + 1), "pool", "num_free",
    ),
    Mutant(
        "pool", "a slot that does not fit stops the next ones",
        attribute(_pool_requests, "served_in_order", _all_or_none), "pool, the shortest", "ok",
    ),
)  # fmt: skip


class _OfTheStep(Sequences):
    """Sequences whose rows are at the positions of the step, and not of their sequences."""

    def rows(self, tokens):
        slot, position, is_live = super().rows(tokens)
        return slot, jnp.arange(tokens, dtype=position.dtype), is_live


class _OffByOne(Sequences):
    """Sequences whose first row in a step is at the position before it."""

    def rows(self, tokens):
        slot, position, is_live = super().rows(tokens)
        return slot, position - (position == self.positions[slot]).astype(position.dtype), is_live


def _by_number(original):
    """Pages in the order of their numbers: right until a sequence gets a page below its others."""

    def attend_pages(self, q, k, v, pages, batch, sinks=None):
        tables = jnp.where(batch.block_tables < 0, 2**30, batch.block_tables)
        tables = jnp.where(jnp.sort(tables, axis=1) == 2**30, -1, jnp.sort(tables, axis=1))
        batch = eqx.tree_at(lambda batch: batch.block_tables, batch, tables)
        return original(self, q, k, v, pages, batch, sinks)

    return attend_pages


def _not_written(original):
    return lambda self, q, k, v, pages, batch, sinks=None: (self(q, pages, batch, sinks), pages)


def _written_afterwards(original):
    def update(self, q, k, v, pages, batch, sinks=None):
        return self(q, pages, batch, sinks), original(self, q, k, v, pages, batch, sinks)[1]

    return update


LAYERS = (
    Mutant(
        "layers", "rotary positions of the step", attribute(cache_module, "Sequences", lambda _: _OfTheStep),
        "layer", "served equals dense",
    ),
    Mutant(
        "layers", "rotary position of a step's first row off by one",
        attribute(cache_module, "Sequences", lambda _: _OffByOne), "layer", "served equals dense",
    ),
    Mutant(
        "layers", "pages in the order of their numbers", method(PagedCache, "attend_pages", _by_number),
        "layer", "served equals dense",
    ),
    Mutant("layers", "nothing is written", method(Attend, "update", _not_written), "layer", "served equals dense"),
    Mutant(
        "layers", "written after attending", method(Attend, "update", _written_afterwards),
        "layer", "served equals dense",
    ),
)  # fmt: skip
