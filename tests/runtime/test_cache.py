"""`PagedCache`: pages in the state, checks that are on by default and run once, and errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.runtime import PagedCache

SPEC = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, window=5)
LAYOUT = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)


_dense = jax.jit(paged.dense_attention, static_argnums=0)


def arrays(tokens, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [3 * jax.random.normal(key, (tokens, heads, 8)) for key, heads in zip(keys, (4, 2, 2), strict=True)]


def make(**options):
    return eqx.nn.make_with_state(PagedCache)(SPEC, LAYOUT, 6, **options)


def test_prefill_in_chunks_then_decode_equals_dense():
    cache, state = make()
    q, k, v = arrays(11)
    table, outs = jnp.array([4, 0, 2]), []
    for start, stop in [(0, 6), (6, 9), (9, 10), (10, 11)]:
        batch = paged.RaggedBatch.prefill(stop, table, stop - start)
        out, state = cache(q[start:stop], k[start:stop], v[start:stop], batch, state)
        outs.append(out)
    dense = _dense(SPEC, q[None], k[None], v[None])[0]
    np.testing.assert_allclose(jnp.concatenate(outs), dense, atol=1e-5)


def test_functional_core_is_the_call():
    cache, state = make()
    q, k, v = arrays(5)
    batch = paged.RaggedBatch.prefill(5, [1, 3], 5)
    out, pages = cache.attend_pages(q, k, v, state.get(cache.index), batch)
    expected, state = cache(q, k, v, batch, state)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(pages.arrays[0], state.get(cache.index).arrays[0])


def test_quantised_pages_keep_their_scales_in_the_state():
    layout = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.int8, scales="token")
    cache, state = eqx.nn.make_with_state(PagedCache)(SPEC, layout, 6)
    q, k, v = arrays(5)
    out, state = cache(q, k, v, paged.RaggedBatch.prefill(5, [1, 3], 5), state)
    exact = _dense(SPEC, q[None], k[None], v[None])[0]
    # int8 steps of about 0.05 (a largest value of 6 over 127) in scores whose queries are about 3 in each of 8 dims.
    assert 0 < float(jnp.abs(out - exact).max()) < 0.5
    assert float(state.get(cache.index).k_scale[1].max()) < 0.1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("is_jitted", [False, True])
def test_a_stale_table_is_found_by_default(is_jitted):
    cache, state = make()
    q, k, v = arrays(5)
    batch = paged.RaggedBatch.prefill(5, [1, -1], 5)
    run = eqx.filter_jit(cache) if is_jitted else cache
    with pytest.raises(Exception, match=r"block_tables\[0, 1\] = -1 \(sequence 0\) is no page of the pool"):
        jax.block_until_ready(run(q, k, v, batch, state)[0])


def test_check_false_leaves_the_hole_invisible():
    cache, state = make(check=False)
    q, k, v = arrays(5)
    out, _ = cache(q, k, v, paged.RaggedBatch.prefill(5, [1, -1], 5), state)
    assert bool(jnp.isfinite(out).all())


def test_a_checked_batch_is_not_checked_again_under_jit():
    """The program of a checked batch calls no host; an unchecked one does."""
    cache, state = make()
    q, k, v = arrays(5)
    batch = paged.RaggedBatch.prefill(5, [1, 3], 5)

    def text(batch):
        return str(jax.make_jaxpr(lambda q: cache.attend_pages(q, k, v, state.get(cache.index), batch)[0])(q))

    everything = SPEC.replace(causal=False, window=None)
    checked = paged.check(everything, state.get(cache.index), batch, 5)
    lowered = [
        jax.jit(cache.attend_pages).lower(q, k, v, state.get(cache.index), b).as_text() for b in (batch, checked)
    ]
    assert ["callback" in program for program in lowered] == [True, False]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: PagedCache(SPEC.replace(head_dim=16), LAYOUT, 4), ValueError, "layout.head_dim must equal"),
        (lambda: PagedCache(SPEC, LAYOUT, 0), ValueError, "num_pages must be at least 1; got 0."),
        (lambda: PagedCache(SPEC, LAYOUT, 4, target="cuda"), ValueError, "target must be one of"),
    ],
)
def test_error_texts(call, error, text):
    with pytest.raises(error, match=text):
        call()
