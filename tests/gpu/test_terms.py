"""What a kernel for GPUs computes of scores in its own way."""

import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower.gpu.terms import _tanh, has_own_powers
from paged.spec import ALiBi, Bias, Where
from tests.support.specs import real

SPEC = paged.AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=128)


def test_the_kernels_tanh_has_an_absolute_error_of_a_few_roundings_and_saturates():
    x = np.concatenate([np.linspace(-30, 30, 4001), np.geomspace(1e-8, 1e-1, 200)]).astype(np.float32)
    assert np.abs(np.asarray(_tanh(jnp.asarray(x))) - np.tanh(x.astype(np.float64))).max() < 2.0**-20
    assert _tanh(jnp.array([-jnp.inf, -1e30, 1e30, jnp.inf])).tolist() == [-1, -1, 1, 1]
    assert np.isnan(_tanh(jnp.array(jnp.nan)))


@pytest.mark.parametrize(
    ("terms", "are_own"),
    [
        ({}, True),
        ({"soft_cap": 30.0, "window": 9, "scores": (ALiBi(),)}, True),
        ({"scores": (Bias(lambda p, j, h: jnp.tanh(real(p - j))),)}, True),
        ({"scores": (Bias(lambda p, j, h: jnp.sin(real(p - j))),)}, False),
        ({"scores": (Bias(lambda p, j, h: -jnp.log(1.0 + real(p - j))),)}, False),
        ({"mask": Where(lambda p, j: jnp.exp(real(p - j)) > 2.0)}, False),
    ],
)
def test_powers_are_only_approximate_where_no_user_asks_for_any(terms, are_own):
    assert has_own_powers(paged.Program.from_spec(SPEC.replace(**terms))) is are_own
