"""Planted bugs that the tests must kill: each mutant replaces one small function, and the compact suite must fail.

The suite is five batches against the reference, an update, and a merge. A mutant that survives says that a property
lost its teeth. The reference's results are computed before the bug is planted, since it shares masks and scores.
"""

import dataclasses
import importlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower import Program
from paged.spec import AttentionState, Causal, Coverage, SoftCap, Window
from tests.support import Case, assert_states_close, build, case_of, exact_state
from tests.support.lowerings import ALL_LOWERINGS
from tests.support.mutants import plant_method
from tests.support.specs import PLAIN

CASES = (
    case_of("rich", "ragged", corner="more rows than tokens"),
    case_of("rich", "ragged", corner="first page masked"),
    case_of("plain", "ragged", corner="mixed"),
    case_of("plain", "ragged", corner="few live"),
    # Under a causal mask no pair is visible past the length, so only this one sees whether the length is heeded.
    Case(spec=PLAIN.replace(causal=False), corner="one past a page"),
)
FIRST = ALL_LOWERINGS["xla-blocks"]


@pytest.fixture(scope="module")
def expected():
    """Each case's arrays and its exact state; and an update's pages."""
    builts = [build(case) for case in CASES]
    update = build(case_of("plain", "ragged", corner="more rows than tokens"), hold_new=False)
    return [(built, exact_state(built)) for built in builts], update


def run_suite(expected, index):
    """Raise ``AssertionError`` unless every check passes.

    A scale of ``2 ** index`` times the spec's, with queries divided by it, is the same attention exactly, under a name
    that no trace is cached for.
    """
    states, update = expected
    for built, want in states:
        spec = built.case.spec.replace(scale=built.case.spec.softmax_scale * 2.0**index)
        attend = _lower(spec, built.case.layout)
        got = attend.state(built.q * 2.0**-index, built.pages, built.batch, built.sinks)
        assert_states_close(got, want, built.error_unit, "float32")
    _check_long_lengths(index)
    _check_update(update, index)
    _check_merge()


def _lower(spec, layout):
    """One page a block and two blocks a step, so that a few pages are several steps of several blocks."""
    own = FIRST.schedule(Program.from_spec(spec), layout)
    own = own.replace(pages_per_block=1, rows_per_tile=4, blocks_per_step=2)
    return paged.lower(spec, layout, FIRST.target, schedule=own)


def _check_long_lengths(index):
    """Past the table's capacity, positions still follow the length, keys do not exist, and rows are not written."""
    built = build(case_of("plain", "decode", corner="exact pages"))
    spec = built.case.spec.replace(scale=0.25 * 2.0**index, window=5)
    attend = _lower(spec, built.case.layout)
    long = built.batch.lengths.at[3].set(17)
    assert int(built.batch.lengths[3]) == 16
    batch = paged.RaggedBatch.decode(long, built.batch.block_tables)
    want = exact_state(dataclasses.replace(built, case=built.case.replace(spec=spec), batch=batch)).out
    np.testing.assert_allclose(attend(built.q, built.pages, batch), want, rtol=0, atol=1e-4)
    # Not the tokens that the pages hold already, and more padding rows, so that the write is traced anew.
    k, v = (jnp.concatenate([x, x[:index]]) + 1 for x in (built.k, built.v))
    keys = paged.write(k, v, built.pages, batch).keys()
    np.testing.assert_array_equal(keys[batch.block_tables[3]], built.pages.keys()[batch.block_tables[3]])


def _check_update(update, index):
    pages = _fresh_write(update, index)
    written = np.zeros(update.is_held.shape, bool)
    for row, owner in enumerate(update.row_of):
        if owner is not None and owner[1] >= 0:
            page, slot = int(update.batch.block_tables[owner[0], owner[1] // 4]), owner[1] % 4
            written[page, slot] = True
            np.testing.assert_array_equal(pages.keys()[page, :, slot], update.k[row])
    before, after = (np.asarray(p.arrays[0]).view(np.uint32) for p in (update.pages, pages))
    changed = (before != after).any(axis=(1, 2, 4))
    np.testing.assert_array_equal(changed, written)


def _fresh_write(update, index):
    """The write with ``index`` more padding rows, so that it is traced anew."""
    k, v = (jnp.concatenate([x, x[:index]]) if index else x for x in (update.k, update.v))
    return paged.write(k, v, update.pages, update.batch)


def _check_merge():
    out, lse = jnp.ones((1, 2, 3)), jnp.array([[1.0, -jnp.inf]])
    merged = paged.merge(
        AttentionState(jnp.where(lse[..., None] > 0, out, 0.0), lse), AttentionState(3 * out, jnp.array([[1.0, 2.0]]))
    )
    np.testing.assert_allclose(merged.out[0, :, 0], [2.0, 3.0], rtol=1e-6)
    np.testing.assert_allclose(merged.lse, [[1 + np.log(2), 2.0]], rtol=1e-6)


def _module(name):
    return importlib.import_module(f"paged.{name}")


def _replace_everywhere(patch, module, name, mutant):
    """Replace a function in every module of the library that holds it; an error if it is gone."""
    original = getattr(_module(module), name, None)
    assert original is not None, f"paged.{module}.{name} is gone: give this mutant a new home"
    for loaded_name, loaded in list(sys.modules.items()):
        if loaded_name.startswith("paged") and getattr(loaded, name, None) is original:
            patch.setattr(loaded, name, mutant(original))


def _method(module, owner, name, mutant):
    def plant(patch):
        cls = getattr(_module(module), owner, None)
        assert hasattr(cls, name), f"paged.{module}.{owner}.{name} is gone: give this mutant a new home"
        plant_method(patch, cls, name, mutant)

    return plant


def _function(module, name, mutant):
    return lambda patch: _replace_everywhere(patch, module, name, mutant)


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
        return slot, jnp.minimum(position, 4 * self.tables.shape[1] - 1), is_live

    return rows


def _last_page_dropped(original):
    def visits_by_scatter(*args):
        visits = original(*args)
        count = jnp.maximum(visits.count - 1, 0)
        return visits._replace(count=count, num_full=jnp.minimum(visits.num_full, count))

    return visits_by_scatter


def _before_the_first_token(original):
    def rows(self, tokens):
        slot, position, _ = original(self, tokens)
        return slot, position % 4, self.owner(tokens)[1]

    return rows


def _base_two(original):
    def finish(self):
        out, lse = original(self)
        return out, lse / np.log(2.0).astype(np.float32)

    return finish


MUTANTS = {
    "values not selected": _function("lower.program", "select_values", lambda _: lambda is_visible, v: v),
    "-inf minus -inf": _method("lower.program", "Running", "weigh", _unguarded_weights),
    "values not decayed": _method("lower.program", "Running", "weigh", _undecayed_values),
    "lse in base two": _method("lower.program", "Running", "finish", _base_two),
    "full ignores the length": _method(
        "lower.program",
        "Program",
        "coverage",
        lambda _: lambda self, p0, p1, j0, j1, n: self.visibility.coverage(p0, p1, j0, j1) & Coverage(j0 < n, j1 == j1),
    ),
    "pages end a page early": _method(
        "lower.program",
        "Program",
        "coverage",
        lambda _: lambda self, p0, p1, j0, j1, n: self.visibility.coverage(p0, p1, j0, j1) & Coverage(j1 <= n, j1 <= n),
    ),
    "scores out of order": _method("lower.program", "Program", "apply_scores", lambda _: _reversed_scores),
    "last page dropped": _function("lower.program", "visits_by_scatter", _last_page_dropped),
    "dead slots live": _method("lower.program", "Sequences", "of", _dead_slots_live),
    "positions cut to the table": _method("lower.program", "Sequences", "of", _positions_cut_to_the_table),
    "rows past the table written": _method("lower.program", "Sequences", "rows", _past_the_table_to_its_last_place),
    "writes before the first token": _method("lower.program", "Sequences", "rows", _before_the_first_token),
    "larger window kept": _method(
        "spec.masks", "Window", "implies", lambda _: lambda self, other: isinstance(other, Causal)
    ),
    "causal full off by one": _method(
        "spec.masks",
        "Causal",
        "coverage",
        lambda _: lambda self, p0, p1, j0, j1: Coverage(j0 <= p1 - 1, j1 - 1 <= p0 + 1),
    ),
    "window skips one too many": _method(
        "spec.masks",
        "Window",
        "coverage",
        lambda _: lambda self, p0, p1, j0, j1: Coverage(p0 - j1 + 2 < self.width, p1 - 1 - j0 < self.width),
    ),
    "j < p": _method("spec.masks", "Causal", "__call__", lambda _: lambda self, p, j: j < p),
    "window one wider": _method("spec.masks", "Window", "__call__", lambda _: lambda self, p, j: p - j <= self.width),
    "no cap": _method("spec.scores", "SoftCap", "__call__", lambda _: lambda self, s, p, j, h: s),
    "sink taken twice": _function(
        "spec.state", "add_sinks", lambda add: lambda state, sinks: add(add(state, sinks), sinks)
    ),
    "merge adds up": _function(
        "spec.state", "merge", lambda merge: lambda a, b: AttentionState(a.out + b.out, merge(a, b).lse)
    ),
}


def _reversed_scores(program, s, p, j, h):
    for op in reversed(program.score_ops):
        s = op(s, p, j, h)
    return s


def test_the_suite_passes_without_a_mutant(expected):
    run_suite(expected, 0)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_suite_kills(name, expected, monkeypatch):
    MUTANTS[name](monkeypatch)
    with pytest.raises(AssertionError):
        run_suite(expected, 1 + list(MUTANTS).index(name))


def test_mutants_are_of_what_the_library_uses():
    """The classes named here are those that specs hold."""
    assert _module("spec.masks").Window is Window and _module("spec.scores").SoftCap is SoftCap
