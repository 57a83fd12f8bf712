"""Sinks: two shapes and no other, and for every other shape an error that says what to write."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from paged.spec import AttentionSpec, require_sinks, sinks_per_head

SPEC = AttentionSpec(num_q_heads=6, num_kv_heads=2, head_dim=4, sinks=True)

# Shapes that are refused, and for each thing that they may stand for: which of the sinks query head ``h`` has.
REFUSED = {
    (2, 3): {"one sink of each query head": lambda h: [(h // 3, h % 3)]},
    (2, 5): {"5 sinks of each KV head": lambda h: [(h // 3, n) for n in range(5)]},
    (1,): {"1 sinks of every head": lambda h: [(0,)]},
    (5,): {"5 sinks of every head": lambda h: [(n,) for n in range(5)]},
    (2,): {"2 sinks of every head": lambda h: [(0,), (1,)], "one sink of each KV head": lambda h: [(h // 3,)]},
    (): {},
    (3, 2): {},
    (0,): {},
    (6, 0): {},
    (6, 1, 1): {},
}


@pytest.mark.parametrize("shape", REFUSED)
def test_any_other_shape_is_refused_with_what_to_write(shape):
    sinks = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    with pytest.raises(ValueError, match=r"sinks must be \[q_heads\] = \[6\], or \[q_heads, n\]") as error:
        sinks_per_head(SPEC, sinks)
    assert f"got {shape}." in str(error.value)
    remedies = dict(re.findall(r"For ([^:]*): (.*?\))\.", str(error.value)))
    assert set(remedies) == set(REFUSED[shape])
    for meaning, code in remedies.items():
        per_head = sinks_per_head(SPEC, eval(code, {"jnp": jnp, "sinks": sinks}))
        want = [np.logaddexp.reduce([sinks[i] for i in REFUSED[shape][meaning](h)]) for h in range(6)]
        np.testing.assert_allclose(per_head, want, rtol=1e-6)


def test_several_sinks_of_a_head_add_up():
    sinks = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
    np.testing.assert_array_equal(sinks_per_head(SPEC, sinks[:, 0]), sinks[:, 0])
    np.testing.assert_allclose(sinks_per_head(SPEC, sinks), np.logaddexp.reduce(sinks, axis=1), rtol=1e-6)
    np.testing.assert_array_equal(sinks_per_head(SPEC, jnp.full((6, 3), -jnp.inf)), np.full(6, -np.inf))


def test_sinks_are_given_exactly_when_the_spec_has_them():
    require_sinks(SPEC.replace(sinks=False), None)
    with pytest.raises(ValueError, match=r"sinks is missing.*float32\[6\]"):
        require_sinks(SPEC, None)
    with pytest.raises(ValueError, match="the spec says sinks=False"):
        require_sinks(SPEC.replace(sinks=False), jnp.zeros(6))
    with pytest.raises(TypeError, match="sinks must be floating point; got int32"):
        require_sinks(SPEC, jnp.zeros(6, jnp.int32))
