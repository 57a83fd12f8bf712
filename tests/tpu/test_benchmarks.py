"""What the benchmarks model: kernels whose scalars can be followed from the batch through the calls around them."""

import jax
import pytest

from benchmarks.tpu import paged_call
from benchmarks.tpu_decode.shapes import SHAPES as DECODE
from benchmarks.tpu_prefill.shapes import SHAPES as PREFILL


@pytest.mark.parametrize("shape", [DECODE["llama-p16"], PREFILL["mixed-p16"]], ids=["decode", "mixed"])
def test_nothing_stands_between_the_batch_and_the_kernels(shape):
    """Only calls that can be looked into: a custom rule for ``vmap`` cannot."""
    function, args = paged_call(shape)
    text = str(jax.make_jaxpr(function)(*args))
    assert "pallas_call" in text
    assert "custom_vmap" not in text
