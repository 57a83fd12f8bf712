"""Every JAX transform, crossed with every lowering: jit, vmap, scan, checkpoint and grad of these; no custom call."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.spec import Bias
from tests.support import PHASES, build, case_of, every_lowering, layers_of, lowered, real, state_of

every_phase = pytest.mark.parametrize("phase", PHASES)


def _close(a, b, scale=10.0):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=2e-6 * scale)


@every_lowering
@every_phase
def test_forward_update_and_gradient_hold_no_custom_call(lowering, phase):
    """Pure JAX: nothing in the program but StableHLO's own operations."""
    built = build(case_of("rich", phase))
    attend = lowered(lowering, built.case)

    def loss(q, arrays, sinks):
        return attend(q, built.case.layout.wrap(*arrays), built.batch, sinks).sum()

    programs = {
        "state": (attend.state, (built.q, built.pages, built.batch, built.sinks)),
        "update": (attend.update, (built.q, built.k, built.v, built.pages, built.batch, built.sinks)),
        "gradient": (jax.grad(loss, argnums=(0, 1, 2)), (built.q, built.pages.arrays, built.sinks)),
    }
    for name, (fn, args) in programs.items():
        text = jax.jit(fn).lower(*args).as_text()
        assert "stablehlo" in text and "custom_call" not in text, name


@every_lowering
def test_vmap_over_batches_is_a_loop_over_batches(lowering):
    """Stacked queries, pages, tables, lengths and sinks."""
    case = case_of("rich", "ragged")
    attend = lowered(lowering, case)
    builts = [
        build(case.replace(corner=corner, seed=i)) for i, corner in enumerate(("mixed", "exact pages", "all dead"))
    ]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *[(b.q, b.pages, b.batch, b.sinks) for b in builts])
    states = jax.jit(jax.vmap(attend.state))(*stacked)
    for i, built in enumerate(builts):
        one = state_of(attend, built)
        _close(states.out[i], one.out)
        np.testing.assert_array_equal(np.isneginf(states.lse[i]), np.isneginf(one.lse))
        finite = ~np.isneginf(np.asarray(one.lse))
        _close(np.asarray(states.lse[i])[finite], np.asarray(one.lse)[finite])


@every_lowering
def test_numbers_of_sequences_under_vmap_scan_and_jit(lowering):
    """One batch with several rows of numbers: mapped, scanned and one by one in one trace, the same."""
    built = build(case_of("values", "decode"))
    attend, traces = lowered(lowering, built.case), []

    @jax.jit
    def out(values):
        traces.append(values)
        return attend(built.q, built.pages, dataclasses.replace(built.batch, values=values))

    several = jax.tree.map(lambda x: jnp.stack([x, jnp.roll(x, 1, 0), x[::-1]]), built.batch.values)
    mapped = jax.vmap(out)(several)
    scanned = jax.lax.scan(lambda _, values: (None, out(values)), None, several)[1]
    ones = [out(jax.tree.map(lambda x, i=i: x[i], several)) for i in range(3)]
    _close(mapped, jnp.stack(ones))
    _close(scanned, jnp.stack(ones))
    assert len(traces) <= 3 and not np.array_equal(ones[0], ones[1])


@every_lowering
def test_vmap_over_queries_alone_shares_the_pages(lowering):
    built = build(case_of("plain", "decode"))
    attend = lowered(lowering, built.case)
    queries = jnp.stack([built.q, -built.q])
    outs = jax.vmap(lambda q: attend(q, built.pages, built.batch))(queries)
    for q, out in zip(queries, outs, strict=True):
        _close(out, attend(q, built.pages, built.batch))


@every_lowering
def test_scan_over_layers_that_share_a_batch(lowering):
    """A model's layers: pages stacked by layer, carried queries, one batch closed over."""
    case = case_of("plain", "ragged")
    attend = lowered(lowering, case)
    built = build(case)
    arrays = jnp.stack([built.pages.arrays[0], -built.pages.arrays[0]])
    batch, q = built.batch, built.q

    def layer(q, array):
        out = attend(q, case.layout.wrap(array), batch)
        return q + out, out

    def scanned(q):
        return jax.lax.scan(layer, q, arrays)[0]

    def unrolled(q):
        return layer(layer(q, arrays[0])[0], arrays[1])[0]

    last, gradient = jax.jit(jax.value_and_grad(lambda q: (scanned(q) ** 2).sum()))(q)
    expected, by_hand = jax.jit(jax.value_and_grad(lambda q: (unrolled(q) ** 2).sum()))(q)
    np.testing.assert_allclose(last, expected, rtol=1e-5)
    assert np.isfinite(np.asarray(gradient)).all()
    _close(gradient, by_hand, scale=10 * float(jnp.abs(by_hand).max()))


@every_lowering
@pytest.mark.parametrize("phase", [pytest.param(x, marks=[pytest.mark.kernels] * (x == "prefill")) for x in PHASES])
def test_vmap_and_scan_over_the_caches_of_layers_are_a_loop_over_layers(lowering, phase):
    """They share a batch, and each writes and reads its own pages."""
    case = case_of("plain", phase)
    attend = lowered(lowering, case)
    built = build(case, hold_new=False)
    arrays, stacked = layers_of(built, 3)

    def layer(q, k, v, pages):
        return attend.update(q, k, v, pages, built.batch)

    ones = [layer(*one) for one in arrays]
    mapped = jax.jit(jax.vmap(layer))(*stacked)
    scanned = jax.jit(lambda xs: jax.lax.scan(lambda _, x: (None, layer(*x)), None, xs)[1])(stacked)
    for got in (mapped, scanned):
        for i, (out, pages) in enumerate(ones):
            _close(got[0][i], out)
            np.testing.assert_array_equal(got[1].arrays[0][i], pages.arrays[0])


@pytest.mark.kernels
@every_lowering
def test_vmap_of_derivatives_is_a_loop_over_them(lowering):
    """Queries and directions are stacked, pages are shared."""
    built = build(case_of("plain", "decode"))
    attend, pages = lowered(lowering, built.case), built.pages

    def loss(q):
        return jnp.sum(attend(q, pages, built.batch) ** 2)

    def derivatives(q, along):
        return jax.jvp(jax.grad(loss), (q,), (along,))

    queries, along = jnp.stack([built.q, -built.q]), jnp.stack([built.q[::-1], built.q])
    found = jax.jit(jax.vmap(derivatives))(queries, along)
    one = jax.jit(derivatives)
    for i in range(2):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(one(queries[i], along[i])), strict=True):
            _close(a[i], b, scale=float(10 * jnp.abs(b).max()))


@pytest.mark.kernels
@every_lowering
def test_checkpoint_changes_no_gradient(lowering):
    built = build(case_of("rich", "ragged"))
    attend = lowered(lowering, built.case)

    def loss(q):
        return (attend(q, built.pages, built.batch, built.sinks) ** 2).sum()

    plain, saved = jax.jit(jax.grad(loss))(built.q), jax.jit(jax.grad(jax.checkpoint(loss)))(built.q)
    assert np.abs(np.asarray(plain)).max() > 0.1
    _close(saved, plain, scale=float(jnp.abs(plain).max()))


@every_lowering
def test_a_bias_over_a_traced_array_works_in_a_scan_and_is_never_stale(lowering):
    """One closure a step of the scan, each over that step's own table: no value of an earlier trace is kept."""
    case = case_of("plain", "decode")
    built = build(case)
    target = lowered(lowering, case).lowering.target
    tables = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)

    def step(total, table):
        spec = case.spec.replace(scores=(Bias(lambda p, j, h: table[h] * real(p - j)),))
        return total + paged.lower(spec, case.layout, target)(built.q, built.pages, built.batch), None

    scanned = jax.jit(lambda tables: jax.lax.scan(step, jnp.zeros_like(built.q), tables)[0])
    one = jax.jit(lambda table: step(jnp.zeros_like(built.q), table)[0])
    for values in (tables, 2 * tables):
        looped = sum(one(table) for table in values)
        _close(scanned(values), looped, scale=30.0)
    assert np.abs(np.asarray(scanned(tables) - scanned(2 * tables))).max() > 1e-2


@every_lowering
def test_donated_pages_are_updated_in_place(lowering):
    """Under jit with donation an update reuses the pool's buffer: a copy would double the cache."""
    built = build(case_of("plain", "decode"), hold_new=False)
    attend = lowered(lowering, built.case)
    step = jax.jit(attend.update, donate_argnums=3)
    pages = jax.tree.map(jnp.copy, built.pages)
    before = pages.arrays[0].unsafe_buffer_pointer()
    _, after = step(built.q, built.k, built.v, pages, built.batch)
    assert pages.arrays[0].is_deleted()
    assert after.arrays[0].unsafe_buffer_pointer() == before


def test_an_attend_is_a_value():
    """Equal declarations lower to equal, hashable functions, so that jit caches are shared."""
    case = case_of("rich", "decode")
    a, b = (paged.lower(case.spec.replace(), case.layout) for _ in range(2))
    assert a == b and hash(a) == hash(b)
    assert a != paged.lower(case.spec.replace(window=6), case.layout)
