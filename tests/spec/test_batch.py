"""`RaggedBatch`: integers of any kind become int32 without a wrap, and what is no integer is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.spec import AttentionSpec, PageLayout, RaggedBatch

LEAST, MOST = -(2**31), 2**31 - 1
DECODE, PREFILL = RaggedBatch.decode, RaggedBatch.prefill

# What a caller may write: the field that comes of it, and its values.
ACCEPTED = {
    "int8": (lambda: DECODE(np.array([5], np.int8), [[3]]).lengths, [5]),
    "uint8": (lambda: PREFILL(np.uint8(3), [0], 2).lengths, [3]),
    "length of [1]": (lambda: PREFILL([5], [0], 2).lengths, [5]),
    "list of arrays": (lambda: DECODE([jnp.int32(3)], [[jnp.int32(1)]]).block_tables, [[1]]),
    "traced in a list": (lambda: jax.jit(lambda n: DECODE([n, 2], [[n], [0]]).lengths)(3), [3, 2]),
    "NumPy query_rows": (lambda: DECODE([5], [[0]], query_rows=np.int64(2)).query_starts, [0, 2]),
    # A number outside of int32 is the nearest inside: no page of any pool, past any table, or as 0.
    "entry past int32": (lambda: DECODE([5], np.array([[2**32 + 1]])).block_tables, [[MOST]]),
    "int64's least": (lambda: DECODE([5], np.array([[np.iinfo(np.int64).min]])).block_tables, [[LEAST]]),
    "a list's entry": (lambda: DECODE([5], [[2**70, -(2**70), -1]]).block_tables, [[MOST, LEAST, -1]]),
    "uint32": (lambda: DECODE([5], jnp.full((1, 1), 2**32 - 1, jnp.uint32)).block_tables, [[MOST]]),
    "negative length": (lambda: DECODE([-(2**40)], [[0]]).lengths, [LEAST]),
    "starts": (lambda: RaggedBatch([5], [[0]], [0, 2**40]).query_starts, [0, MOST]),
    "dead length": (lambda: DECODE([5, 2**40], [[0], [1]], 1).lengths, [5, MOST]),
    "perhaps dead": (lambda: DECODE([5, 2**40], [[0], [1]], jnp.int32(1)).lengths, [5, MOST]),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_integers_of_any_kind_become_int32_without_a_wrap(name):
    act, want = ACCEPTED[name]
    got = act()
    assert got.dtype == jnp.int32 and got.tolist() == want


def test_traced_int64_becomes_int32_without_a_wrap():
    def step(lengths, tables):
        return DECODE(lengths, tables)

    with jax.enable_x64(True):
        batch = jax.jit(step)(np.array([2**32 + 5]), np.array([[2**32 + 1, np.iinfo(np.int64).min, 7]]))
        assert batch.lengths.tolist() == [MOST] and batch.block_tables.tolist() == [[MOST, LEAST, 7]]
    traced = jax.make_jaxpr(step)(jnp.ones(1, jnp.int32), jnp.ones((1, 3), jnp.int32))
    assert not traced.jaxpr.eqns, "a batch of int32 arrays takes them as they are"


REFUSED = {
    "length past int32": (lambda: DECODE([3, 2**40], [[0], [1]]), ValueError, r"lengths\[1\] .*1099511627776"),
    "int64 length": (lambda: DECODE(np.array([2**32 + 5]), [[0]]), ValueError, r"lengths\[0\] .*got 4294967301"),
    "live length": (lambda: DECODE([2**40, 3], [[0], [1]], 1), ValueError, r"lengths\[0\] .*at most 2\*\*31 - 1"),
    "huge length": (lambda: DECODE([2**70], [[0]]), ValueError, r"lengths\[0\] .*positions are int32"),
    "prefill length": (lambda: PREFILL(np.int64(2**32 + 5), [0], 2), ValueError, r"lengths\[0\] .*4294967301"),
    "bool lengths": (lambda: DECODE([True], [[0]]), TypeError, "lengths must be int32; got bool"),
    "text lengths": (lambda: DECODE(["5"], [[0]]), TypeError, "lengths must be int32; got str"),
    "uneven lists": (lambda: DECODE([1, 2], [[1], [2, 3]]), ValueError, r"block_tables must be.*\[2, 3\]"),
    "bool tables": (lambda: DECODE([5], [[True]]), TypeError, "block_tables must be int32; got bool"),
    "float tables": (lambda: DECODE([5], np.zeros((1, 1))), TypeError, "block_tables must be int32; got float64"),
    "no entry": (lambda: DECODE([5], [[None]]), TypeError, "block_tables must be int32; got object"),
    "float starts": (lambda: RaggedBatch([5], [[0]], [0.0, 1.0]), TypeError, "query_starts must be int32; got float"),
    "bool num_seqs": (lambda: DECODE([5], [[0]], True), TypeError, "num_seqs must be int32; got bool"),
    "float num_seqs": (lambda: DECODE([5], [[0]], 1.0), TypeError, "num_seqs must be int32; got float64"),
    "huge num_seqs": (lambda: DECODE([5], [[0]], 2**40), ValueError, r"num_seqs must be in \[0, 1\].*1099511627776"),
    "text rows": (lambda: RaggedBatch([5], [[0]], [0, 1], query_rows="1"), TypeError, "query_rows must.*got '1'"),
    "bool rows": (lambda: DECODE([5], [[0]], query_rows=True), TypeError, "query_rows must.*got True"),
    "half a row": (lambda: DECODE([5], [[0]], query_rows=1.5), TypeError, "query_rows must.*got 1.5"),
    "negative rows": (lambda: PREFILL(5, [0], -1), TypeError, "query_rows must.*got -1"),
    "bool length": (lambda: PREFILL(True, [0], 1), TypeError, "lengths must be int32; got bool"),
    "two lengths": (lambda: PREFILL([5, 6], [0], 1), ValueError, r"length must be one number; got shape \(2,\)"),
    "tables of prefill": (lambda: PREFILL(5, [[0]], 1), ValueError, r"block_table must have 1 dimension"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_int32_is_refused_by_name(name):
    act, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text):
        act()


def test_an_entry_outside_of_int32_is_a_hole_and_reads_no_other_page():
    """An int64 entry of ``2**32 + 1`` would be page 1 if it were cut."""
    spec = AttentionSpec(num_q_heads=1, num_kv_heads=1, head_dim=8)
    layout = PageLayout(page_size=2, num_kv_heads=1, head_dim=8, dtype=jnp.float32)
    attend, pages = paged.lower(spec, layout, "xla"), layout.wrap(jnp.ones((3, 2, 1, 2, 8)))
    for entry in (2**32 + 1, np.iinfo(np.int64).min):
        batch = DECODE([2], np.array([[entry]]))
        state = attend.state(jnp.ones((1, 1, 8)), pages, batch)
        assert not np.asarray(state.out).any() and np.isneginf(state.lse).all()
        with pytest.raises(ValueError, match=r"block_tables\[0, 0\] = .* is no page of the pool"):
            paged.check(spec, pages, batch, 1)
