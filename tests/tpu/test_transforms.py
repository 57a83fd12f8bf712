"""JAX's transforms of TPU kernels: layers under vmap and scan, interpreted; checkpoint, lowered for a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import paged
from paged.lower import DecodeSchedule, RaggedSchedule
from tests.support import Case, assert_bitwise, build, layers_of
from tests.support.specs import PLAIN

from .interpreter import interpreted, watched

# v5e: one core, on which decode writes and attends in one kernel.
CASES = {
    "decode": (Case(spec=PLAIN, page_size=8, phase="decode"), DecodeSchedule(pages_per_block=2)),
    "ragged": (
        Case(spec=PLAIN, page_size=64),
        RaggedSchedule(pages_per_block=2, rows_per_tile=16, single_rows=DecodeSchedule(pages_per_block=2)),
    ),
}


@pytest.fixture(params=["decode", pytest.param("ragged", marks=pytest.mark.kernels)])
def layers(request):
    """A layer's step; its arguments for each layer, and stacked; and the results of one layer after the other."""
    case, schedule = CASES[request.param]
    built, attend = build(case, hold_new=False), interpreted(case, schedule, generation="v5e")
    arrays, stacked = layers_of(built, 2)

    def step(q, k, v, pages):
        return attend.update(q, k, v, pages, built.batch)

    return step, stacked, [watched(jax.jit(step), *one) for one in arrays]


def _assert_layers(got, want):
    for i, one in enumerate(want):
        assert_bitwise(jax.tree.leaves(jax.tree.map(lambda x, i=i: x[i], got)), jax.tree.leaves(one))


def test_vmap_over_layers_that_share_a_batch_is_bitwise_a_loop(layers):
    """Pallas's own rule refuses kernels of which some operands are batched and some are not."""
    step, stacked, want = layers
    _assert_layers(watched(jax.jit(jax.vmap(step)), *stacked), want)


@pytest.mark.kernels
def test_scan_over_stacked_caches_is_bitwise_a_loop(layers):
    step, stacked, want = layers
    _assert_layers(watched(jax.jit(lambda xs: jax.lax.scan(lambda _, x: (None, step(*x)), None, xs)[1]), stacked), want)


def _abstract(rows):
    """An attention for v5e, and the shapes of its arguments."""
    spec = paged.AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=128)
    layout = paged.PageLayout(page_size=16, num_kv_heads=2, head_dim=128)
    shape = jax.ShapeDtypeStruct
    pages = layout.wrap(*(shape(dims, layout.dtype) for dims in layout.array_shapes(64)))
    batch = paged.RaggedBatch.decode(np.full(4, 100), np.zeros((4, 8), int), query_rows=rows)
    q, kv = (shape((4 * rows, heads, 128), jnp.bfloat16) for heads in (8, 2))
    return paged.lower(spec, layout, "tpu").on_chip("v5e"), (q, kv, kv, pages, batch)


def _kernels(function, *args):
    """The number of kernels in a program for a TPU. A kernel in a loop counts once."""
    return export.export(jax.jit(function), platforms=["tpu"])(*args).mlir_module().count("@tpu_custom_call")


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.kernels
def test_vmap_and_scan_lower_for_a_tpu_with_the_kernels_of_one_layer(rows):
    attend, (*args, batch) = _abstract(rows)
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), tuple(args))

    def step(q, k, v, pages):
        return attend.update(q, k, v, pages, batch)

    one = _kernels(step, *args)
    assert one >= 1
    assert _kernels(jax.vmap(step), *stacked) == one
    assert _kernels(lambda *xs: jax.lax.scan(lambda _, x: (None, step(*x)), None, xs)[1], *stacked) == one


@pytest.mark.parametrize("rows", [1, pytest.param(40, marks=pytest.mark.kernels)])
def test_checkpoint_lowers_for_a_tpu_and_runs_the_kernel_again_for_what_follows_it(rows):
    """The interpreter's callbacks are not for `jax.checkpoint`, so that this looks at the program: the gradient of the
    square needs the output, which a checkpoint does not keep."""
    attend, (q, _, _, pages, batch) = _abstract(rows)

    def loss(q, pages):
        return (attend(q, pages, batch).astype(jnp.float32) ** 2).sum()

    plain, saved = (_kernels(jax.value_and_grad(f), q, pages) for f in (loss, jax.checkpoint(loss)))
    assert saved == 2 * plain > 0


@pytest.mark.kernels
def test_derivatives_of_kernels_are_the_xla_lowerings():
    """Kernels compute the output; its derivatives, in both modes and of second order, are the XLA lowering's."""
    case, schedule = CASES["decode"]
    built = build(case)
    kernels, xla = interpreted(case, schedule, generation="v5e"), paged.lower(case.spec, case.layout, "xla")

    def derivatives(attend):
        loss = lambda q: jnp.sum(jnp.sin(attend(q, built.pages, built.batch)))
        gradient = jax.grad(loss)
        return jax.jit(lambda q: jax.jvp(gradient, (q,), (q,)))(built.q)

    for got, want in zip(derivatives(kernels), derivatives(xla), strict=True):
        assert np.abs(np.asarray(want)).max() > 1e-2
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * float(jnp.abs(want).max()))
