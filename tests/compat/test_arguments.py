"""What the rarer arguments of the ragged entry points mean, and what `explain` says of a call."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.compat import explain, page_attention, ragged_page_attention_v2, ragged_page_attention_v3
from paged.compat.static import More, Options
from tests.support import build

from .entries import CLOSE, ENTRIES, RICH, arrays_of, built_for, by_loops, native_results

SAID = ENTRIES["v3"].arguments(RICH) | {"target": "xla"}


@pytest.fixture(scope="module")
def args():
    """The arrays of one case of version 3. A call donates its cache, so that calls get copies."""
    return arrays_of("v3", built_for("v3", ENTRIES["v3"].case(RICH)))


def v3(args, **how):
    return ragged_page_attention_v3(*args[:3], args[3] + 0, *args[4:], **{**SAID, **how})


def test_without_an_update_the_cache_is_read_and_stays(args):
    _, cache = v3(args)
    out, after = v3([*args[:1], 0 * args[1], 0 * args[2], cache, *args[4:]], update_kv_cache=False)
    read = [cache, args[4], args[5].reshape(args[4].shape[0], -1), args[6], int(args[7][2])]
    np.testing.assert_array_equal(after, cache)
    np.testing.assert_array_equal(out, ragged_page_attention_v2(args[0], *read, **SAID))


def test_without_a_causal_mask_queries_see_later_tokens(args):
    spec = RICH.replace(causal=False)
    said = explain(ragged_page_attention_v3, *args, **SAID, use_causal_mask=False)
    assert str(said.program) == str(paged.lower(spec, said.layout, "xla").program)


@pytest.mark.slow
def test_without_a_causal_mask_outputs_are_those_of_all_tokens():
    case = ENTRIES["v3"].case(RICH.replace(causal=False))
    out, _ = v3(arrays_of("v3", built_for("v3", case)), use_causal_mask=False)
    np.testing.assert_allclose(out, by_loops("v3", build(case)), rtol=0, atol=CLOSE)


def test_a_pair_of_tokens_beside_the_query_is_a_window(args):
    pair, window = (v3(args, sliding_window=w)[0] for w in ((RICH.window - 1, 0), RICH.window))
    np.testing.assert_array_equal(pair, window)


def test_scales_of_float_pages_multiply_scores_and_outputs(args):
    scaled = {**SAID, "softmax_scale": SAID["softmax_scale"] / 2.0, "k_scale": 2.0, "v_scale": 0.25, "q_scale": 3.0}
    want, cache = v3(args)
    out, after = v3(args, **scaled)
    np.testing.assert_array_equal(after, cache)
    np.testing.assert_allclose(out, 0.25 * want, rtol=0, atol=CLOSE)
    plain = Options.of(
        "xla", False, ("softmax_scale", None), ("logits_soft_cap", None), None, more=More.of(k_scale=2.0)
    )
    layout = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
    assert plain.spec(4, 8, layout).softmax_scale == 2.0 / math.sqrt(8)


def test_the_output_has_the_dtype_that_is_asked_for_with_its_accuracy(args):
    rounded = args[0].astype(jnp.bfloat16)
    out, _ = v3([rounded, *args[1:]], out_dtype=jnp.float32)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, v3([rounded.astype(jnp.float32), *args[1:]])[0], rtol=0, atol=CLOSE)
    narrow, _ = jax.eval_shape(lambda *args: ragged_page_attention_v3(*args, out_dtype="bfloat16"), *args)
    assert narrow.dtype == jnp.bfloat16


def test_explain_says_what_a_call_runs_and_runs_nothing():
    built = built_for("v3", ENTRIES["v3"].case(RICH))
    args = arrays_of("v3", built)
    explanation = explain(ragged_page_attention_v3, *args, **SAID)
    native = paged.lower(RICH, built.case.layout, "xla").explain(built.q, built.pages, built.batch)
    assert str(explanation) == str(native)
    assert not args[3].is_deleted()
    np.testing.assert_array_equal(v3(args)[0], native_results("v3", built)[0])


def test_explain_says_which_schedule_is_the_nearest_to_the_hints():
    q, cache = jnp.zeros((4, 8, 128), jnp.bfloat16), jnp.zeros((2, 16, 16, 128), jnp.bfloat16)
    args = q, cache, cache, [40, 0, 1, 30], [[0, 1, 2]] * 4
    said = [explain(page_attention, *args, target="tpu", num_splits=n) for n in (2, 7)]
    assert [s.source for s in said] == ["hints, num_splits=2", "hints, the nearest to num_splits=7"]
    assert [s.schedule.kv_splits for s in said] == [2, 3]
    assert "from: hints, the nearest to num_splits=7" in str(said[1])
    with pytest.raises(TypeError, match="entry must be an entry point"):
        explain(jnp.sum, q)
    with pytest.raises(ValueError, match="num_splits must be at least 0"):
        explain(page_attention, *args, num_splits=-1)
    jax.block_until_ready(page_attention(*args, target="xla"))  # a call after it runs again
