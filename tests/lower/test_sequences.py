"""`Sequences`: made without loops, and from starts that are known without reading any."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower import Sequences
from paged.spec import RaggedBatch
from tests.support import Case, build
from tests.support.jaxprs import primitives
from tests.support.specs import PLAIN

CASES = {
    "decode": Case(spec=PLAIN, phase="decode"),
    "decode of two rows": Case(spec=PLAIN, phase="decode", rows=2, corner="few live"),
    "prefill": Case(spec=PLAIN, phase="prefill", rows=7),
    "ragged": Case(spec=PLAIN, phase="ragged", corner="few live"),
}


def _everything(batch, tokens):
    seqs = Sequences.of(batch, tokens, 4)
    return seqs, seqs.owner(tokens), seqs.rows(tokens)


@pytest.mark.parametrize("name", CASES)
def test_no_loop_is_run_to_make_or_to_read_them(name):
    built = build(CASES[name])
    jaxpr = jax.make_jaxpr(_everything, static_argnums=1)(built.batch, built.q.shape[0])
    found = set(primitives(jaxpr.jaxpr))
    assert not found & {"while", "scan", "sort"}
    assert ("cummax" in found) == (name == "ragged")


@pytest.mark.parametrize("name", [name for name in CASES if name != "ragged"])
def test_even_starts_are_those_that_a_batch_would_state(name):
    built = build(CASES[name])
    batch, tokens = built.batch, built.q.shape[0]
    stated = dataclasses.replace(batch, has_even_starts=False)
    for one, other in zip(*(jax.tree.leaves(_everything(x, tokens)) for x in (batch, stated)), strict=True):
        live = slice(None) if one.shape != (batch.num_slots,) else np.arange(batch.num_slots) < batch.num_seqs
        np.testing.assert_array_equal(one[live], other[live])


def test_starts_that_a_batch_states_are_read():
    """Though ``query_rows`` says otherwise."""
    even = RaggedBatch.decode([9, 7], [[0, 1, 2], [3, 4, 5]], query_rows=2)
    stated = RaggedBatch(even.lengths, even.block_tables, [0, 1, 4], query_rows=2)
    assert Sequences.of(even, 4, 4).counts.tolist() == [2, 2]
    assert Sequences.of(stated, 4, 4).counts.tolist() == [1, 3]


def test_even_starts_stay_known():
    layout = paged.PageLayout(page_size=4, num_kv_heads=PLAIN.num_kv_heads, head_dim=PLAIN.head_dim)
    batch = RaggedBatch.decode([9, 7], [[0, 1, 2], [3, 4, 5]])
    assert batch.has_even_starts
    assert paged.check(PLAIN, layout.init(6), batch, 2).has_even_starts
    assert RaggedBatch.stack([batch, batch]).has_even_starts
    stated = dataclasses.replace(batch, has_even_starts=False)
    assert not RaggedBatch.stack([batch, stated]).has_even_starts
    with pytest.raises(ValueError, match="has_even_starts needs query_rows"):
        RaggedBatch(jnp.array([9]), jnp.array([[0]]), jnp.array([0, 1]), has_even_starts=True)
