"""Each entry point equals the native surface, bitwise, and so the reference; accepted shapes; donated arrays."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.compat import (
    page_attention,
    prefill_page_attention,
    ragged,
    ragged_page_attention_v2,
    ragged_page_attention_v3,
    split,
    static,
)
from tests.support import build

from .entries import (
    CLOSE,
    ENTRIES,
    RICH,
    SPEC,
    arrays_of,
    built_for,
    by_loops,
    native,
    native_batch,
    native_results,
    numpy,
    output,
    results,
)

every_entry = pytest.mark.parametrize("name", ENTRIES)
slow = pytest.mark.slow
# Most of the fast tests share one shape and one set of static arguments, because compiling takes most of their time.
SPECS = {"rich": RICH, "plain": SPEC}
JITTED = {"page": split._decode, "prefill": split._prefill, "v2": ragged.attend, "v3": ragged.update}


def _case(name, terms="rich", **facts):
    spec = SPECS[terms]
    return ENTRIES[name].case(spec.replace(sinks=terms == "rich" and ENTRIES[name].takes_sinks), **facts)


@every_entry
@pytest.mark.parametrize("terms", ["rich", pytest.param("plain", marks=slow)])
def test_equals_the_native_surface_bitwise_and_the_reference(name, terms):
    for corner in ("mixed", "more rows than tokens", "few live"):
        built = built_for(name, _case(name, terms, corner=corner))
        got = results(name, built)
        jax.tree.map(np.testing.assert_array_equal, got, native_results(name, built))
        out = got[0] if name == "v3" else got
        np.testing.assert_allclose(out, by_loops(name, build(built.case)), rtol=0, atol=CLOSE, err_msg=corner)


@every_entry
def test_one_trace_while_values_vary(name):
    results(name, built_for(name, _case(name)))
    before = JITTED[name]._cache_size()
    for corner in ("one token", "few live", "exact pages"):
        results(name, built_for(name, _case(name, corner=corner)))
    assert JITTED[name]._cache_size() == before


@every_entry
@pytest.mark.parametrize("q_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_output_has_the_querys_shape_and_dtype_whatever_the_pages(name, q_dtype, dtype):
    built = built_for(name, _case(name, q_dtype=q_dtype, dtype=dtype))
    out = jax.eval_shape(lambda *args: ENTRIES[name].call(*args), *arrays_of(name, built))
    out = out[0] if name == "v3" else out
    assert (out.shape, out.dtype) == (built.q.shape, built.q.dtype)


@slow
@every_entry
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "bfloat16")])
def test_every_dtype_is_the_native_one_bitwise(name, dtypes):
    built = built_for(name, _case(name, q_dtype=dtypes[0], dtype=dtypes[1]))
    got, want = (jax.tree.map(numpy, x) for x in (results(name, built), native_results(name, built)))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_v3_donates_its_pages_alone():
    args = arrays_of("v3", built_for("v3", _case("v3")))
    ENTRIES["v3"].call(*args, **ENTRIES["v3"].arguments(RICH), target="xla")
    assert args[3].is_deleted() and not any(args[i].is_deleted() for i in (0, 1, 2, 4, 5))


@slow
def test_v3_inside_of_jit_donates_what_is_donated_there():
    args = arrays_of("v3", built_for("v3", _case("v3")))
    compiled = jax.jit(ragged_page_attention_v3, donate_argnums=3).lower(*args).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == args[3].nbytes
    compiled(*args)
    assert args[3].is_deleted()


def _packed(cache, pack):
    pages, size, heads, dim = cache.shape
    return cache.reshape(pages, size, heads // pack, pack, dim)


@pytest.mark.parametrize("pack", [2, pytest.param(1, marks=slow), pytest.param(4, marks=slow)])
def test_packed_pages_are_the_same_bytes_and_come_back_as_they_came(pack):
    built = built_for("v3", _case("v3"))
    args, want = arrays_of("v3", built), results("v3", built)
    args[3] = _packed(args[3], pack)
    got = ragged_page_attention_v3(*args, **ENTRIES["v3"].arguments(RICH), target="xla")
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], _packed(want[1], pack))


@slow
def test_packed_pages_are_read_as_well():
    built = built_for("v2", ENTRIES["v2"].case())
    args = arrays_of("v2", built)
    want = ragged_page_attention_v2(*args)
    np.testing.assert_array_equal(ragged_page_attention_v2(args[0], _packed(args[1], 2), *args[2:]), want)


@slow
def test_a_head_dimension_padded_to_whole_lanes_is_taken_and_kept_zero():
    """The padding of a live token is 0. The padding of all other places is poison."""
    built = built_for("v3", ENTRIES["v3"].case(RICH))
    args, spare = arrays_of("v3", built), jnp.isnan(built.pages.arrays[0][..., :1])
    padding = jnp.where(spare, jnp.nan, jnp.zeros((*args[3].shape[:-1], 120)))
    said = ENTRIES["v3"].arguments(RICH)
    want = ragged_page_attention_v3(*arrays_of("v3", built), **said)
    args[3] = jnp.concatenate([args[3], jnp.where(jnp.isfinite(args[3][..., :1]), 0.0, padding)], axis=-1)
    out, kv_pages = ragged_page_attention_v3(*args, **said)
    assert out.shape == want[0].shape
    np.testing.assert_allclose(out, want[0], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(kv_pages[..., :8], want[1])
    is_written = np.isfinite(np.asarray(want[1])).all(axis=-1)
    assert is_written.any() and not np.asarray(kv_pages)[is_written][:, 8:].any()


def test_the_default_scale_is_that_of_the_dimension_before_padding():
    options = static.Options.of("auto", False, ("softmax_scale", None), ("logits_soft_cap", None), None)
    for padded in (80, 128):
        layout = paged.PageLayout(page_size=8, num_kv_heads=2, head_dim=padded)
        assert options.spec(4, 80, layout).softmax_scale == 80**-0.5


@slow
def test_queries_by_batch_and_position_are_rows_in_that_order():
    built = built_for("page", ENTRIES["page"].case())
    args = arrays_of("page", built)
    np.testing.assert_array_equal(page_attention(args[0][:, None], *args[1:]), page_attention(*args)[:, None])
    built = built_for("prefill", ENTRIES["prefill"].case())
    args = arrays_of("prefill", built)
    want = prefill_page_attention(*args)[None]
    np.testing.assert_array_equal(prefill_page_attention(args[0][None], *args[1:]), want)
    built = built_for("v3", ENTRIES["v3"].case())
    args = arrays_of("v3", built)
    by_batch = [x.reshape(2, 8, *x.shape[1:]) for x in args[:3]]
    want = ragged_page_attention_v3(*arrays_of("v3", built))[0].reshape(2, 8, 4, 8)
    np.testing.assert_array_equal(ragged_page_attention_v3(*by_batch, *args[3:])[0], want)


@slow
def test_values_may_be_of_another_dimension_than_keys():
    case = ENTRIES["page"].case(value_dim=5)
    built = built_for("page", case)
    out = output("page", built)
    assert out.shape == (5, 4, 5)
    np.testing.assert_array_equal(out, native_results("page", built))


# The field's shapes of sinks for 4 query heads over 2 KV heads: which of the sinks query head ``h`` has.
SINKS = {
    (4,): lambda h: [(h,)],
    (2, 2): lambda h: [(h // 2, h % 2)],
    (3,): lambda h: [(0,), (1,), (2,)],
    (2,): lambda h: [(0,), (1,)],
    (2, 5): lambda h: [(h // 2, n) for n in range(5)],
}


@pytest.mark.parametrize("shape", [(2, 2), *(pytest.param(shape, marks=slow) for shape in SINKS if shape != (2, 2))])
@pytest.mark.parametrize("name", ["v2", pytest.param("v3", marks=slow)])
def test_sinks_have_every_shape_of_the_field(name, shape):
    """Of a vector as long as there are KV heads each is a sink of every head: nothing else is guessed."""
    plain = built_for(name, ENTRIES[name].case(SPEC.replace(sinks=True)))
    sinks = np.random.default_rng(1).normal(0, 3, shape).astype(np.float32)
    native_sinks = jnp.array([[sinks[i] for i in SINKS[shape](h)] for h in range(4)])
    said, meant = (dataclasses.replace(plain, sinks=x) for x in (jnp.asarray(sinks), native_sinks))
    got, out = results(name, said), output(name, said)
    jax.tree.map(np.testing.assert_array_equal, got, native_results(name, meant))
    without = ENTRIES[name].call(*arrays_of(name, plain)[:-1])
    assert np.abs(numpy(out) - numpy(without[0] if name == "v3" else without)).max() > 0.1


@slow
def test_eager_calls_share_a_trace_whatever_form_num_seqs_has():
    built = built_for("v2", ENTRIES["v2"].case())
    args = arrays_of("v2", built)
    want = ragged_page_attention_v2(*args)
    for live in (5, np.int64(5), jnp.array([5]), [5]):
        np.testing.assert_array_equal(ragged_page_attention_v2(*args[:5], live), want)


@slow
def test_gradients_are_the_native_ones():
    built = built_for("page", ENTRIES["page"].case())
    args = [jnp.nan_to_num(x, posinf=0.0, neginf=0.0) if i < 3 else x for i, x in enumerate(arrays_of("page", built))]
    got = jax.grad(lambda q, k, v: (page_attention(q, k, v, *args[3:]) ** 2).sum(), argnums=(0, 1, 2))(*args[:3])
    batch, attend = native_batch("page", built), native(built.case.replace(corner="mixed"))

    def loss(q, k, v):
        return (attend(q, built.case.layout.wrap(k, v), batch) ** 2).sum()

    for a, b in zip(got, jax.grad(loss, argnums=(0, 1, 2))(*args[:3]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@slow
def test_gradients_flow_to_sinks_and_new_tokens_too():
    built = built_for("v3", ENTRIES["v3"].case(SPEC.replace(sinks=True)))
    args = [jnp.nan_to_num(x, posinf=0.0, neginf=0.0) if i < 4 else x for i, x in enumerate(arrays_of("v3", built))]

    def loss(k, sinks):
        return (ragged_page_attention_v3(args[0], k, *args[2:8], sinks)[0] ** 2).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(args[1], args[8])
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0.01 for g in gradients)


OF_ALL = " cache_order=None target=auto interpret=False mesh=None axes=None in_specs=None out_specs=None"
SIGNATURES = {
    page_attention: "query key_cache value_cache context_lens block_tables attn_scale=None max_context_len=None "
    "num_splits=0 * mask_value attn_logits_soft_cap=None pages_per_compute_block=None megacore_mode=None "
    "inline_seq_dim=True sliding_window=None",
    prefill_page_attention: "query key_cache value_cache context_len page_indices * softmax_scale=None mask_value "
    "attn_logits_soft_cap=None sliding_window=None",
    ragged_page_attention_v2: "query kv_pages context_lens block_tables query_start_loc num_seqs softmax_aux=None * "
    "softmax_scale=None logits_soft_cap=None compute_dtype optimized=False sliding_window=None mask_value=None "
    "num_kv_pages_per_block=None num_queries_per_block=None vmem_limit_bytes=None k_scale=None v_scale=None",
    ragged_page_attention_v3: "queries keys values kv_pages context_lens block_tables query_start_loc distribution "
    "softmax_aux=None * softmax_scale=None logits_soft_cap=None sliding_window=None vmem_limit_bytes=None "
    "mask_value=None use_causal_mask=True update_kv_cache=True out_dtype=None q_scale=None k_scale=None v_scale=None "
    "num_kv_pages_per_block=None num_queries_per_block=None m_block_sizes=None",
}


@pytest.mark.parametrize("entry", SIGNATURES, ids=lambda entry: entry.__name__)
def test_signatures_are_the_fields(entry):
    words, kinds, previous = [], inspect.Parameter, None
    for parameter in inspect.signature(entry).parameters.values():
        if previous == kinds.POSITIONAL_ONLY and parameter.kind != previous:
            words.append("/")
        if parameter.kind == kinds.KEYWORD_ONLY and previous != parameter.kind:
            words.append("*")
        previous, default = parameter.kind, parameter.default
        is_shown = default is not kinds.empty and parameter.name not in ("mask_value", "compute_dtype")
        is_shown |= parameter.name == "mask_value" and default is None
        words.append(f"{parameter.name}={default}" if is_shown else parameter.name)
    assert " ".join(words) == SIGNATURES[entry] + OF_ALL


def test_compat_is_not_imported_by_the_door():
    assert "page_attention" not in vars(paged)
