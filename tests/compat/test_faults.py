"""What an entry point alone can get wrong. `tests/test_lowerings.py` asks of it what every attention promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged.compat import page_attention, ragged_page_attention_v2, ragged_page_attention_v3
from tests.tpu.interpreter import params, watched

from .entries import ENTRIES, RICH, SPEC, arrays_of, built_for, native_results, results

slow = pytest.mark.slow


class Xla:
    """XLA, with small pages; traces are shared with `test_entry_points`."""

    page_size = 4

    def run(self, name, built, **arguments):
        return results(name, built, target="xla", **arguments)


class Tpu:
    """Interpreted kernels, with the smallest pages that they accept."""

    page_size = 8

    def run(self, name, built, **arguments):
        on_tpu = functools.partial(results, target="tpu", interpret=params(), **arguments)
        return watched(on_tpu, name, built)


@pytest.fixture(params=[Xla(), pytest.param(Tpu(), marks=slow)], ids=["xla", "tpu"])
def target(request):
    return request.param


def case_of(target, name, spec=RICH, **facts):
    spec = spec.replace(sinks=spec == RICH and ENTRIES[name].takes_sinks)
    return ENTRIES[name].case(spec, page_size=target.page_size, **facts)


@slow
def test_the_page_order_is_not_guessed_from_divisibility(target):
    """The shape could mean four pages of two heads or two pages of four: the caller must say which."""
    size = target.page_size
    q, k, v = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(1, 4, 8), *[(4, 2, size, 8)] * 2]))
    how = {} if isinstance(target, Xla) else {"target": "tpu", "interpret": params()}
    with pytest.raises(ValueError, match="both fit query's 4 heads"):
        page_attention(q, k, v, [3], [[1]], **how)
    out = page_attention(q, k, v, [3], [[1]], cache_order="heads_first", **how)
    scores = jnp.einsum("hd,hjd->hj", q[0], k[:, 1, :3]) / 8**0.5
    np.testing.assert_allclose(out[0], jnp.einsum("hj,hjd->hd", jax.nn.softmax(scores), v[:, 1, :3]), atol=1e-2)


@slow
def test_sums_are_not_in_bfloat16():
    """A bfloat16 sum of 512 equal weights stops at 256, which would make the mean twice as large."""
    kv_pages = jnp.ones((64, 8, 2, 8), jnp.bfloat16)
    table = jnp.arange(64)[None]
    out = ragged_page_attention_v2(jnp.ones((1, 2, 8), jnp.bfloat16), kv_pages, [512], table, [0, 1], 1)
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.ones((1, 2, 8)))


@slow
def test_decode_does_not_make_scores_of_all_positions_with_all():
    shape = jax.ShapeDtypeStruct
    i32, f32 = jnp.int32, jnp.float32
    new, ints = shape((4, 2, 8), f32), [shape(s, i32) for s in ((4,), (4 * 64,), (5,), (3,))]
    jitted = jax.jit(functools.partial(ragged_page_attention_v3, target="xla"), donate_argnums=3)
    compiled = jitted.lower(shape((4, 4, 8), f32), new, new, shape((256, 64, 4, 8), f32), *ints).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 4096


@pytest.mark.parametrize("ends", [(0, 0), (0, 5), (2, 3), (5, 5)])
def test_of_a_distribution_only_the_number_of_sequences_matters(target, ends):
    built = built_for("v3", case_of(target, "v3", corner="mixed"))
    want = target.run("v3", built)
    args = arrays_of("v3", built)
    args[7] = np.array([*ends, 5], np.int32)
    how = {"target": "xla"} if isinstance(target, Xla) else {"target": "tpu", "interpret": params()}
    got = ragged_page_attention_v3(*args, **ENTRIES["v3"].arguments(RICH), **how)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@slow
def test_max_context_len_changes_nothing_within_it_and_cuts_what_is_beyond():
    built = built_for("page", ENTRIES["page"].case(SPEC, corner="exact pages"))
    args = arrays_of("page", built)
    want = page_attention(*args)
    np.testing.assert_array_equal(page_attention(*args, max_context_len=16), want)
    np.testing.assert_array_equal(page_attention(*args, max_context_len=10**9), want)
    cut = page_attention(*args[:3], jnp.minimum(args[3], 6), args[4])
    np.testing.assert_allclose(page_attention(*args, max_context_len=6), cut, rtol=0, atol=1e-5)
    assert np.abs(cut - want).max() > 0.1


@slow
@pytest.mark.parametrize("name", ENTRIES)
def test_kernels_equal_the_native_surface_bitwise(name):
    target = Tpu()
    built = built_for(name, case_of(target, name))
    got = target.run(name, built)
    jax.tree.map(np.testing.assert_array_equal, got, native_results(name, built, target="tpu", interpret=params()))
