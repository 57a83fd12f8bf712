"""`GroupedBatch`: each spec finds the table of its group, and what is common to all groups is held once."""

import jax
import jax.numpy as jnp
import pytest

import paged
from paged import Causal, Everything, GroupedBatch, RaggedBatch, Window

LOCAL = paged.AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=4, window=4)
FULL = LOCAL.replace(window=None)
OTHER = LOCAL.replace(mask=paged.Where(lambda p, j: j % 2 == 0))
TABLES = ([[-1, 3, 1], [5, 0, -1]], [[4, 0, 2], [1, 3, -1]])


def grouped(keeps_all=True):
    batches = [RaggedBatch([9, 5], table, [0, 2, 3]) for table in TABLES]
    return GroupedBatch(batches, [[LOCAL.visibility], [FULL.visibility, *[Everything()] * keeps_all]])


def test_each_spec_finds_its_own_table_under_jit():
    @jax.jit
    def tables(batch):
        return [batch.for_spec(spec).block_tables for spec in (LOCAL, FULL, OTHER)]

    batch = grouped()
    assert [x.tolist() for x in tables(batch)] == [TABLES[0], TABLES[1], TABLES[1]], "a group keeps every page"
    assert len(jax.tree.leaves(batch)) == 5, "lengths, starts and the number of sequences are held once"
    shifted = batch.for_layer(1, num_pages=5, num_layers=2)
    assert shifted.for_spec(LOCAL).block_tables.tolist() == [[-1, 8, 6], [-1, 5, -1]]
    assert shifted.for_spec(FULL).block_tables.tolist() == [[9, 5, 7], [6, 8, -1]]
    facts = ("num_slots", "pages_per_seq", "query_rows", "positions", "ancestors", "values")
    assert [getattr(batch, name) for name in facts] == [2, 3, None, None, None, {}]
    assert batch.query_starts.tolist() == [0, 2, 3] and int(batch.num_seqs) == 2


def test_attentions_checks_and_plans_take_their_group():
    layout = paged.PageLayout(page_size=4, num_kv_heads=1, head_dim=4, dtype=jnp.float32)
    attend, pages, batch = paged.lower(LOCAL, layout), layout.init(6), grouped()
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (3, heads, 4)) for key, heads in zip(keys, (2, 1, 1), strict=True))
    want, own = attend.update(q, k, v, pages, batch.for_spec(LOCAL))
    for step in (batch, attend.plan(q, pages, batch)):
        out, new = attend.update(q, k, v, pages, step)
        assert (out == want).all() and all(map(jnp.array_equal, new.arrays, own.arrays))
    explained, own = attend.explain(q, pages, batch), attend.explain(q, pages, batch.for_spec(LOCAL))
    assert explained == own and (explained.pages_freed, explained.bytes_saved) == (1, 128)
    assert str(explained).endswith("1 pages (0.00 MiB) were freed by the mask")
    checked = paged.check(LOCAL, pages, batch, 3)
    assert [b.checked_for is not None for b in checked.batches] == [True, False]
    assert [b.checked_for is not None for b in paged.check(FULL, pages, checked, 3).batches] == [True, True]
    wider = LOCAL.replace(window=8)
    with pytest.raises(ValueError, match=r"block_tables\[0, 0\] = -1 \(sequence 0\) is no page"):
        paged.check(wider, pages, GroupedBatch(batch.batches, [[wider.visibility], [FULL.visibility]]), 3)


def test_error_texts():
    with pytest.raises(ValueError, match=r"no block table for the mask .*groups for .*p - j < 4.*; j <= p"):
        grouped(keeps_all=False).for_spec(OTHER)
    with pytest.raises(ValueError, match="masks must be 2 groups, one for each batch; got 1"):
        GroupedBatch(grouped().batches, [[Causal()]])
    with pytest.raises(ValueError, match="A mask belongs to one group"):
        GroupedBatch(grouped().batches, [[Causal()], [Causal()]])
    with pytest.raises(ValueError, match=r"block_tables of one shape; got \[\(1, 1\), \(2, 3\)\]"):
        GroupedBatch([grouped().common, RaggedBatch.decode([1], [[0]])], [[Causal()], [Window(2)]])
    layout = paged.PageLayout(page_size=4, num_kv_heads=1, head_dim=4)
    with pytest.raises(TypeError, match=r"got GroupedBatch. Pass batch.for_spec\(spec\)"):
        paged.write(jnp.ones((3, 1, 4)), jnp.ones((3, 1, 4)), layout.init(6), grouped())
