"""`reference` against an oracle of scalar loops that was written from `docs/semantics.md` alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.spec import (
    PAGE_ORDERS,
    ALiBi,
    AttentionSpec,
    Bias,
    Chunk,
    Prefix,
    RaggedBatch,
    SoftCap,
    Where,
    Window,
    reference_state,
)
from paged.testing.specs import BROUGHT
from tests.support import CORNERS, Case, build, exact_state, real
from tests.support.oracle import attention_by_loops

SPECS = {
    "causal": {},
    "everything at once": {
        "window": 6,
        "soft_cap": 9.0,
        "sinks": True,
        "scale": 0.3,
        "mask": ~Prefix(1) | Window(2),
        "scores": (ALiBi(), SoftCap(11.0), Bias(lambda p, j, h: 0.3 * real(h) - 0.1 * real(p - j))),
    },
    "both sides": {"causal": False, "mask": (Prefix(3) | Chunk(6)) & Where(lambda p, j: (p + 2 * j) % 5 != 0)},
}
HEADS = {"causal": (6, 2), "everything at once": (5, 1), "both sides": (3, 3)}


def _assert_equals_loops(built):
    case, batch = built.case, built.batch
    k, v = (np.asarray(x, np.float64) for x in (built.pages.keys(), built.pages.values()))
    facts = (np.asarray(x) for x in (batch.lengths, batch.block_tables, batch.query_starts))
    q = np.asarray(built.q, np.float64)
    brought = {name: jax.tree.map(np.asarray, getattr(batch, name)) for name in ("values", "positions", "ancestors")}
    out, lse = attention_by_loops(case.spec, q, k, v, *facts, int(batch.num_seqs), built.sinks, brought)
    state = exact_state(built)
    np.testing.assert_allclose(state.out, out, rtol=0, atol=2e-6)  # sinks enter in float32
    np.testing.assert_allclose(state.lse, lse, rtol=3e-7, atol=3e-7)  # lse is float32
    return out


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("name", SPECS)
def test_equals_scalar_loops(name, corner):
    heads, kv_heads = HEADS[name]
    spec = AttentionSpec(num_q_heads=heads, num_kv_heads=kv_heads, head_dim=4, **SPECS[name])
    sinks = (heads,) if spec.sinks else None
    built = build(Case(spec=spec, page_size=2, corner=corner, sink_shape=sinks))
    out = _assert_equals_loops(built)
    assert (np.abs(out).max() > 0.1) == any(row is not None and len(row) > 0 for row in built.visible)


@pytest.mark.parametrize("name", BROUGHT)
def test_what_a_batch_brings_equals_scalar_loops(name):
    """Numbers of sequences, masks by head, a tree; and rows at any positions."""
    spec = BROUGHT[name]
    for corner, has_positions in (("mixed", None), ("more rows than tokens", None), ("exact pages", True)):
        sinks = (4,) if spec.sinks else None
        _assert_equals_loops(build(Case(spec=spec, corner=corner, sink_shape=sinks, has_positions=has_positions)))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3)])
def test_accepts_one_sink_or_several_of_each_query_head(shape):
    spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=4, sinks=True)
    _assert_equals_loops(build(Case(spec=spec, page_size=2, sink_shape=shape)))


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [("int8", "tensor"), ("int8", "head"), ("int8", "token"), ("float8_e4m3fn", "token"), ("float8_e5m2", "head")],
)
@pytest.mark.parametrize("order", PAGE_ORDERS)
def test_reads_every_page_order_and_scale(order, dtype, scales):
    """Pages of one content in every order, and stored as every dtype with scales, are one attention."""
    spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=4)
    built = build(Case(spec=spec, order=order, dtype=dtype, scales=scales, page_size=2))
    same = build(Case(spec=spec, page_size=2))
    _assert_equals_loops(built)
    assert np.abs(exact_state(built).out - exact_state(same).out).max() < 3, "quantisation lost the values"


def test_a_hole_hides_its_tokens():
    """A needed entry that is no page of the pool: as if the mask had hidden its tokens."""
    spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=4)
    built = build(Case(spec=spec, page_size=2, corner="one past a page"))
    tables = built.batch.block_tables.at[2, 1].set(-1).at[0, 0].set(10**6)
    batch = RaggedBatch(built.batch.lengths, tables, built.batch.query_starts, built.batch.num_seqs)
    k, v = (np.asarray(x, np.float64) for x in (built.pages.keys(), built.pages.values()))
    facts = (np.asarray(x) for x in (batch.lengths, batch.block_tables, batch.query_starts))
    out, lse = attention_by_loops(spec, np.asarray(built.q, np.float64), k, v, *facts, 5)
    state = jax.jit(reference_state, static_argnums=0)(spec, built.q, built.pages, batch)
    np.testing.assert_allclose(state.out, out, rtol=0, atol=1e-5)
    np.testing.assert_allclose(state.lse, lse, rtol=1e-6, atol=2e-6)


def test_a_stale_entry_for_a_hidden_page_may_lead_to_nan():
    """The window hides page 0 from the only row, so its entry may name a page that holds another sequence's NaN."""
    spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=4, window=2)
    layout = paged.PageLayout(page_size=2, num_kv_heads=1, head_dim=4, dtype=jnp.float32)
    pool = jnp.ones((3, 2, 1, 2, 4)).at[1].set(jnp.nan)
    batch = RaggedBatch.decode([4], [[1, 2]])
    out = jax.jit(paged.reference, static_argnums=0)(spec, jnp.ones((1, 2, 4)), layout.wrap(pool), batch)
    np.testing.assert_allclose(out, 1.0, rtol=1e-6)


def test_gradients_are_finite_in_empty_rows():
    spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=4, window=3, sinks=True)
    built = build(Case(spec=spec, page_size=2, corner="more rows than tokens", sink_shape=(4,)))

    def loss(q, arrays, sinks):
        pages = built.case.layout.wrap(*arrays)
        return paged.reference(spec, q, pages, built.batch, sinks).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(built.q, built.pages.arrays, built.sinks)
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(np.asarray(gradient)).all() and np.abs(np.asarray(gradient)).max() > 1e-3


def test_keeps_the_queries_dtype():
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=4)
        built = build(Case(spec=spec, page_size=2))
        state = jax.eval_shape(lambda q: reference_state(spec, q, built.pages, built.batch), built.q.astype(dtype))  # noqa: B023
        assert state.out.dtype == dtype and state.lse.dtype == jnp.float32


def test_sinks_are_given_exactly_when_the_spec_has_them():
    spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=4)
    built = build(Case(spec=spec, page_size=2))
    with pytest.raises(ValueError, match="sinks is missing"):
        paged.reference(spec.replace(sinks=True), built.q, built.pages, built.batch)
    with pytest.raises(ValueError, match="sinks=False"):
        paged.reference(spec, built.q, built.pages, built.batch, jnp.zeros(4))
