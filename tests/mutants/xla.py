"""Planted bugs of what lowerings share, tried on XLA: visits, the softmax, the batch, writes, sinks and merging."""

import jax.numpy as jnp
import numpy as np

from paged.spec import AttentionState, Coverage

from .base import Mutant
from .planting import function, method


def _coverage(mutant):
    return method("lower.program.Program", "coverage", lambda _: mutant)


def _last_page_dropped(original):
    def visits_by_scatter(*args):
        visits = original(*args)
        count = jnp.maximum(visits.count - 1, 0)
        return visits._replace(count=count, num_full=jnp.minimum(visits.num_full, count))

    return visits_by_scatter


def _reversed_scores(program, s, p, j, h, given):
    for op in reversed(program.score_ops):
        s = op(s, p, j, h)
    return s


def _unguarded_weights(original):
    def weigh(self, s):
        top = jnp.maximum(self.top, jnp.max(s, axis=-1, keepdims=True))
        weights, decay = jnp.exp(s - top), jnp.exp(self.top - top)
        total = decay * self.total + weights.sum(-1, keepdims=True)
        return type(self)(top, total, decay * self.values), weights

    return weigh


def _undecayed_values(original):
    def weigh(self, s):
        running, weights = original(self, s)
        return running._replace(values=self.values), weights

    return weigh


def _base_two(original):
    def finish(self):
        out, lse = original(self)
        return out, lse / np.log(2.0).astype(np.float32)

    return finish


def _dead_slots_live(original):
    def of(cls, batch, tokens, page_size):
        live = type(batch)(
            batch.lengths, batch.block_tables, batch.query_starts, batch.num_slots, query_rows=batch.query_rows
        )
        return original(cls, live, tokens, page_size)

    return of


def _positions_cut_to_the_table(original):
    def of(cls, batch, tokens, page_size):
        seqs = original(cls, batch, tokens, page_size)
        return seqs._replace(positions=seqs.lengths - seqs.counts)

    return of


def _past_the_table_to_its_last_place(original):
    def rows(self, tokens):
        slot, position, is_live = original(self, tokens)
        return slot, jnp.minimum(position, 16 * self.tables.shape[1] - 1), is_live

    return rows


def _before_the_first_token(original):
    def rows(self, tokens):
        slot, position, _ = original(self, tokens)
        return slot, position % 4, self.owner(tokens)[1]

    return rows


def _all_written(original):
    def of(cls, *args):
        places = original(cls, *args)
        is_written = jnp.ones_like(places.is_written)
        return places._replace(is_written=is_written, count=jnp.sum(is_written, dtype=jnp.int32))

    return of


VISITS = (
    Mutant(
        "visits", "full ignores the length",
        _coverage(
            lambda self, p0, p1, j0, j1, n, *_: self.visibility.coverage(p0, p1, j0, j1) & Coverage(j0 < n, j1 == j1)
        ),
        "xla, decode, no mask", "equals the reference",
    ),
    Mutant(
        "visits", "pages end a page early",
        _coverage(
            lambda self, p0, p1, j0, j1, n, *_: self.visibility.coverage(p0, p1, j0, j1) & Coverage(j1 <= n, j1 <= n)
        ),
        "xla, decode", "equals the reference",
    ),
    Mutant(
        "visits", "the last page is dropped", function("lower.program.visits.visits_by_scatter", _last_page_dropped),
        "xla, decode", "equals the reference",
    ),
)  # fmt: skip
AT_ONCE = (
    Mutant(
        "at once", "the list of pages is too short",
        function("lower.program.visits.most_pages_of_any", lambda most: lambda *sizes: max(1, most(*sizes) - 1)),
        "xla at once, decode", "equals the reference", in_every_run=False,
    ),
    Mutant(
        "at once", "the last step is left out",
        function(
            "lower.xla.at_once.repeat",
            lambda repeat: lambda most, fixed, needed, *rest: repeat(most, fixed, lambda: needed() - 1, *rest),
        ),
        "xla at once, decode", "equals the reference", in_every_run=False,
    ),
    Mutant(
        "at once", "values are only weighted",
        function(
            "lower.xla.at_once._weighted_sums",
            lambda sums: lambda weights, v, is_visible: sums(weights, v, jnp.ones_like(is_visible)),
        ),
        "xla at once, decode", "equals the reference", "not finite", in_every_run=False,
    ),
    Mutant(
        "at once", "a page in place is seen",
        function(
            "lower.program.visits.visits_in_place",
            lambda visits: lambda *what: visits(*what)._replace(is_seen=None),
        ),
        "xla at once, holes", "holes are invisible", in_every_run=False,
    ),
)  # fmt: skip
SOFTMAX = (
    Mutant(
        "softmax", "values are not selected",
        function("lower.program.softmax.select_values", lambda _: lambda is_visible, v: v),
        "xla, decode", "equals the reference", "not finite",
    ),
    Mutant(
        "softmax", "-inf minus -inf", method("lower.program.Running", "weigh", _unguarded_weights),
        "xla, ragged", "equals the reference", "not finite",
    ),
    Mutant(
        "softmax", "values do not decay", method("lower.program.Running", "weigh", _undecayed_values),
        "xla, ragged", "equals the reference",
    ),
    Mutant(
        "softmax", "lse in base two", method("lower.program.Running", "finish", _base_two),
        "xla, decode", "equals the reference",
    ),
    Mutant(
        "softmax", "scores out of order", method("lower.program.Program", "apply_scores", lambda _: _reversed_scores),
        "xla, decode", "equals the reference",
    ),
    Mutant(
        "softmax", "a sink is taken twice",
        function("spec.state.add_sinks", lambda add: lambda state, sinks: add(add(state, sinks), sinks)),
        "xla, decode", "equals the reference", "lse of empty row",
    ),
    Mutant(
        "softmax", "merge adds up",
        function(
            "spec.state.merge", lambda merge: lambda a, b: AttentionState(a.out + b.out, merge(a, b).lse)
        ),
        "xla, split and merge", "split and merge",
    ),
)  # fmt: skip
BATCH = (
    Mutant(
        "batch", "dead slots are live", method("lower.program.Sequences", "of", _dead_slots_live),
        "xla, decode", "equals the reference", "few live",
    ),
    Mutant(
        "batch", "positions are cut to the table",
        method("lower.program.Sequences", "of", _positions_cut_to_the_table),
        "xla, decode, past the table", "past the table",
    ),
)  # fmt: skip
WRITES = (
    Mutant(
        "writes", "rows past the table are written",
        method("lower.program.Sequences", "rows", _past_the_table_to_its_last_place),
        "xla, write", "writes", "past the table",
    ),
    Mutant(
        "writes", "rows before the first token are written",
        method("lower.program.Sequences", "rows", _before_the_first_token), "xla, write", "writes",
    ),
    Mutant(
        "writes", "every row to the next place",
        method(
            "lower.xla.write.Places", "of",
            lambda of: lambda cls, *args: of(cls, *args)._replace(offset=(of(cls, *args).offset + 1) % 16),
        ),
        "xla, write", "writes",
    ),
    Mutant(
        "writes", "shared pages are not copied first",
        method(
            "lower.program.PageCopies", "between",
            lambda of: lambda cls, source, target, *args: of(cls, source, jnp.full_like(target, -1), *args),
        ),
        "xla, write", "writes", "shared pages",
    ),
    Mutant(
        "writes", "rows into holes",
        method(
            "lower.xla.write.Places", "of",
            _all_written,
        ),
        "xla, write", "writes",
    ),
)  # fmt: skip
