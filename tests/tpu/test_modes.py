"""The TPU kernels under JAX's modes: in all of them a kernel is traced as in none, and a mode changes no value."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

import paged

FLAGS = np.array([True, False, True, True])
TERMS = paged.AttentionSpec(
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    window=20,
    sinks=True,
    mask=paged.Where(lambda p, j: (p - j) % 5 != 4),
    # Divided integers and sums of integers are 64 bits wide where JAX is set so.
    scores=(paged.ALiBi(), paged.Bias(lambda p, j, h: jnp.where(jnp.asarray(FLAGS)[h], j - p, 0) / 8)),
)
LAYOUT = paged.PageLayout(page_size=8, num_kv_heads=2, head_dim=16, dtype=jnp.float32)
DECODE = paged.RaggedBatch.decode(lengths=[13, 5], block_tables=[[0, 1], [2, -1]])
MIXED = paged.RaggedBatch(lengths=[13, 5], block_tables=[[0, 1], [2, -1]], query_starts=[0, 12, 13])
SINGLE = paged.DecodeSchedule(pages_per_block=2)
KERNELS = {
    "inline": (DECODE, None),
    "grid and splits": (DECODE, paged.DecodeSchedule(pages_per_block=1, sequence="grid", kv_splits=2)),
    "ragged": (MIXED, paged.RaggedSchedule(pages_per_block=16, rows_per_tile=16, single_rows=SINGLE)),
}
FEW = [pytest.param(x, marks=[pytest.mark.kernels] * (x != "inline")) for x in KERNELS]


def _arrays(tokens):
    return [jax.random.normal(jax.random.key(i), (tokens, heads, 16), jnp.float32) for i, heads in enumerate((4, 2, 2))]


def _step(batch, schedule, **how) -> tuple[Any, Any]:
    """A function of queries, new keys and values, and pages; and these."""
    attend = paged.lower(TERMS, LAYOUT, "tpu", schedule=schedule, **how)
    sinks = jnp.ones(4, jnp.float32)

    def step(q, k, v, pages):
        out, pages = attend.update(q, k, v, pages, batch, sinks)
        return out, pages.arrays

    return step, (*_arrays(13 if batch is MIXED else 2), LAYOUT.init(num_pages=3))


def _kernels(function, args):
    """The text of what launches kernels in a function's program: their operands, and the kernels themselves."""
    found, left = [], [jax.make_jaxpr(function)(*args).jaxpr]
    while left:
        for eqn in left.pop().eqns:
            if eqn.primitive.name == "custom_vmap_call":
                found.append(re.sub(r" at 0x[0-9a-f]+", "", str(eqn.params["call"])))
            else:
                left += jaxprs_in_params(eqn.params)
    assert found and all("pallas_call" in text for text in found)
    return found


@pytest.mark.parametrize("kernel", FEW)
def test_a_kernel_is_one_program_with_64_bits_and_without(kernel):
    """So its values, its memory and its speed are those without 64 bits."""
    step, args = _step(*KERNELS[kernel])
    expected = _kernels(step, args)
    with jax.enable_x64(True):
        assert _kernels(step, args) == expected
    assert not any(re.search(r"[if]64\[", text) for text in expected)


@pytest.mark.parametrize("mode", [jax.enable_checks, jax.disable_jit], ids=["checks", "disable_jit"])
def test_interpreted_kernels_and_their_gradients_are_traced(mode):
    """The interpreter's calls of the host are effects, which JAX's checker refuses inside of a rule for gradients."""
    step, args = _step(*KERNELS["inline"], interpret=True)
    with mode(True):
        jax.make_jaxpr(jax.value_and_grad(lambda *args: step(*args)[0].sum()))(*args)


def _written(target, **how):
    """The pages that a write of one row gives, and their gradients with respect to the row and the old pages."""
    _, k, v = _arrays(2)

    def pages_of(k, v, pages):
        return paged.write(k, v, pages, DECODE, target, **how).arrays

    def loss(*args):
        return sum(jnp.sum(x**2) for x in pages_of(*args))

    args = (k, v, jax.tree.map(lambda x: x + jnp.float32(1), LAYOUT.init(num_pages=3)))
    return jax.tree.leaves((pages_of(*args), jax.grad(loss, argnums=(0, 1, 2))(*args)))


@pytest.mark.kernels
@pytest.mark.parametrize("mode", [jax.enable_checks, jax.enable_x64, jax.debug_nans], ids=["checks", "x64", "nans"])
@pytest.mark.kernels
def test_an_interpreted_kernel_has_the_values_and_gradients_of_xla(mode):
    expected = _written("xla")
    with mode(True):
        found = _written("tpu", interpret=True)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)


def _on_one_device(function, specs):
    """The function inside of a caller's ``jax.shard_map``, which checks over which axes values vary."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("x")))


@pytest.mark.parametrize("kernel", FEW)
def test_kernels_are_traced_inside_of_a_callers_shard_map(kernel):
    step, args = _step(*KERNELS[kernel])
    inside = _on_one_device(lambda *args: step(*args)[0], (P("x"), P("x"), P("x"), P()))
    value_and_gradient = jax.value_and_grad(lambda *args: jnp.sum(inside(*args)))
    assert jax.eval_shape(value_and_gradient, *args)[1].shape == args[0].shape


@pytest.mark.kernels
@pytest.mark.kernels
def test_an_interpreted_kernel_inside_of_a_callers_shard_map_has_the_values_of_xla():
    _, k, v = _arrays(2)
    pages = LAYOUT.init(num_pages=3)

    def written(k, v, pages):
        return paged.write(k, v, pages, DECODE, "tpu", interpret=True).arrays

    found = _on_one_device(written, (P("x"), P("x"), P()))(k, v, pages)
    np.testing.assert_array_equal(found, paged.write(k, v, pages, DECODE, "xla").arrays)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_interpreted_under_64_bits_a_step_has_the_values_of_xla(kernel):
    batch, schedule = KERNELS[kernel]
    step, args = _step(batch, schedule, interpret=True)
    q, k, v, pages = args
    out, pages = paged.lower(TERMS, LAYOUT, "xla").update(q, k, v, pages, batch, jnp.ones(4))
    with jax.enable_x64(True):
        found, written = step(*args)
    np.testing.assert_allclose(found, out, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(written, pages.arrays)
