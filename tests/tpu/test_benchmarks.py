"""What the benchmarks model: kernels whose scalars can be followed from the batch through the calls around them."""

import jax
import jax.custom_batching
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from benchmarks.tpu import paged_call, static
from benchmarks.tpu_decode.shapes import SHAPES as DECODE
from benchmarks.tpu_prefill.shapes import SHAPES as PREFILL


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(DECODE["llama-p16"], id="decode"),
        pytest.param(PREFILL["mixed-p16"], id="mixed", marks=pytest.mark.kernels),
    ],
)
def test_every_integer_that_a_kernel_takes_is_known(shape):
    """A kernel's control flow depends on them: with one unknown its modelled cycles would be another program's."""
    function, args, _ = paged_call(shape)
    found = static.kernel_scalars(function, args)
    assert found
    for kernel in found:
        assert kernel.values and not kernel.unknown, kernel.kernel


def test_scalars_are_followed_through_a_rule_for_vmap():
    """Kernels run under `jax.vmap` one after the other, so such a rule stands between them and the batch."""

    def kernel(lengths, out):
        out[0] = lengths[0]

    @jax.custom_batching.sequential_vmap
    def call(lengths):
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((1,), jnp.int32), name="first", interpret=True)(
            lengths
        )

    [(name, values, _)] = static.kernel_scalars(lambda lengths: call(lengths + 1), (np.array([3, 4], np.int32),))
    assert name == "first"
    np.testing.assert_array_equal(values[0], [4, 5])


def test_a_kernel_in_a_scan_has_the_scalars_of_the_first_turn():
    """A layer's tables, offset by the layer: what the loop carries may be unknown."""

    def kernel(table, out):
        out[0] = table[0]

    call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((1,), jnp.int32), name="layer", interpret=True)

    def layers(table, x):
        return jax.lax.scan(lambda x, layer: (x + call(table + 100 * layer), None), x, jnp.arange(1, 4))[0]

    args = (np.array([3, 4], np.int32), jax.ShapeDtypeStruct((1,), jnp.int32))
    [(_, values, unknown)] = static.kernel_scalars(layers, args)
    np.testing.assert_array_equal(values[0], [103, 104])
    assert not unknown
