"""`Rotary` and its scalings against formulas in float64; scores depend on distances only."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged.runtime import LinearScaling, Llama3Scaling, NtkScaling, Rotary, RotaryScaling, YarnScaling

# float32 angles: at position p the error is about p * 6e-8 radians; inputs are about 3.
TOLERANCE = 1e-5
POSITIONS = np.array([0, 1, 2, 7, 31, 100])


def rotary_ref(x, positions, frequencies, is_interleaved):
    """A pair as a complex number, multiplied by e^(i p f)."""
    dim = 2 * len(frequencies)
    out, head = x.copy(), x[..., :dim]
    pairs = (
        head[..., 0::2] + 1j * head[..., 1::2] if is_interleaved else head[..., : dim // 2] + 1j * head[..., dim // 2 :]
    )
    turned = pairs * np.exp(1j * np.outer(positions, frequencies))[:, None]
    if is_interleaved:
        out[..., 0:dim:2], out[..., 1:dim:2] = turned.real, turned.imag
    else:
        out[..., :dim] = np.concatenate([turned.real, turned.imag], -1)
    return out


def normal(shape, seed=0):
    return 3 * np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 4, 2])
def test_equals_complex_rotation(is_interleaved, rotary_dim):
    x = normal((6, 2, 8))
    rotary = Rotary(8, theta=100.0, rotary_dim=rotary_dim, is_interleaved=is_interleaved)
    dim = rotary_dim or 8
    expected = rotary_ref(x, POSITIONS, [100.0 ** (-2 * i / dim) for i in range(dim // 2)], is_interleaved)
    got = rotary(jnp.asarray(x, jnp.float32), jnp.asarray(POSITIONS))
    np.testing.assert_allclose(got, expected, atol=10 * TOLERANCE)
    np.testing.assert_array_equal(got[0], np.float32(x[0]), "position 0 turns nothing")


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_products_depend_on_distance_only(is_interleaved):
    rotary = Rotary(16, is_interleaved=is_interleaved)
    q, k = (jnp.asarray(normal((1, 1, 16), seed), jnp.float32) for seed in (1, 2))

    def product(p, j):
        return float(jnp.sum(rotary(q, jnp.array([p])) * rotary(k, jnp.array([j]))))

    for distance in (0, 1, 13):
        near, far = product(distance, 0), product(400 + distance, 400)
        assert abs(near - far) < 0.02, (distance, near, far)  # 400 positions of float32 angles on products of about 100
    assert abs(product(0, 0) - product(13, 0)) > 1


def test_output_dtype_is_the_input_dtype_and_angles_are_float32():
    x = jnp.asarray(normal((1, 1, 8)), jnp.bfloat16)
    position = np.array([1001])  # not a bfloat16 number
    got = Rotary(8)(x, jnp.asarray(position))
    assert got.dtype == jnp.bfloat16
    expected = rotary_ref(np.asarray(x, np.float64), position, 10000.0 ** (-np.arange(4) / 4), False)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2**-8, atol=2e-3)


def test_linear_scaling_is_a_fraction_of_the_position():
    x = jnp.asarray(normal((1, 1, 8)), jnp.float32)
    scaled = Rotary(8, scaling=LinearScaling(4.0))(x, jnp.array([40]))
    np.testing.assert_allclose(scaled, Rotary(8)(x, jnp.array([10])), atol=TOLERANCE)


def test_ntk_keeps_the_fastest_and_divides_the_slowest():
    plain, scaled = (Rotary(16, scaling=s).frequencies for s in (None, NtkScaling(8.0)))
    assert scaled[0] == plain[0] == 1
    assert scaled[-1] == pytest.approx(plain[-1] / 8)
    assert NtkScaling.at_length(2.0, 1000, 4096) == NtkScaling(1.0)
    assert Rotary(2, scaling=NtkScaling(8.0)).frequencies.tolist() == [1.0]


def test_llama3_by_hand():
    """theta 10^4 and 4 pairs turn 1, 0.1, 0.01, 0.001 radians per position: wavelengths 6.3, 62.8, 628, 6283."""
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=1000)
    turns = 1000 * 0.01 / (2 * math.pi)  # turns of the third pair: 1.59, in the band from 1 to 4
    kept = (turns - 1) / 3
    expected = [1.0, 0.1, kept * 0.01 + (1 - kept) * 0.01 / 8, 0.001 / 8]
    np.testing.assert_allclose(Rotary(8, theta=10000.0, scaling=scaling).frequencies, expected, rtol=1e-12)


def test_yarn_by_hand():
    """The pair that turns n times in L tokens is number d ln(L / (2 pi n)) / (2 ln theta)."""
    scaling = YarnScaling(factor=4.0, original_context=1000, beta_fast=16.0, beta_slow=1.0)
    low = 8 * math.log(1000 / (2 * math.pi * 16)) / (2 * math.log(10000))  # 0.997, rounded down to 0
    high = 8 * math.log(1000 / (2 * math.pi)) / (2 * math.log(10000))  # 2.20, rounded up to 3
    assert (math.floor(low), math.ceil(high)) == (0, 3)
    plain = np.array([1.0, 0.1, 0.01, 0.001])
    slowed = np.array([0, 1 / 3, 2 / 3, 1])
    expected = plain * (1 - slowed) + plain / 4 * slowed
    np.testing.assert_allclose(Rotary(8, scaling=scaling).frequencies, expected, rtol=1e-12)
    unrounded = YarnScaling(factor=4.0, original_context=1000, beta_fast=16.0, is_rounded=False)
    slowed = np.clip((np.arange(4) - low) / (high - low), 0, 1)
    expected = plain * (1 - slowed) + plain / 4 * slowed
    np.testing.assert_allclose(Rotary(8, scaling=unrounded).frequencies, expected, rtol=1e-12)


def test_yarn_magnitude_scales_the_vectors():
    x, at = jnp.asarray(normal((3, 1, 8)), jnp.float32), jnp.array([0, 5, 9])
    scaling = YarnScaling(factor=10.0, original_context=100)
    assert scaling.magnitude == pytest.approx(1 + 0.1 * math.log(10))
    norm = jnp.linalg.norm(Rotary(8, scaling=scaling)(x, at), axis=-1) / jnp.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(norm, scaling.magnitude, rtol=1e-5)
    assert YarnScaling(factor=10.0, original_context=100, attention_factor=1.0).magnitude == 1.0


@pytest.mark.parametrize(
    "scaling",
    [LinearScaling(1.0), NtkScaling(1.0), Llama3Scaling(factor=1.0), YarnScaling(factor=1.0, original_context=64)],
    ids=lambda s: type(s).__name__,
)
def test_factor_one_is_no_scaling(scaling: RotaryScaling):
    np.testing.assert_allclose(Rotary(8, scaling=scaling).frequencies, Rotary(8).frequencies, rtol=1e-12)
    assert scaling.magnitude == 1.0


def test_equal_ones_are_one_under_jit_and_have_no_leaves():
    assert Rotary(8) == Rotary(8) and jax.tree.leaves(Rotary(8, scaling=LinearScaling(2.0))) == []


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Rotary(7), ValueError, "rotary_dim must be even.*rotary_dim=7, head_dim=7"),
        (lambda: Rotary(8, rotary_dim=10), ValueError, r"in \[2, head_dim\]; got rotary_dim=10"),
        (lambda: Rotary(8.0), TypeError, "head_dim must be a Python int"),
        (lambda: Rotary(8, theta=1.0), ValueError, "theta must be finite and greater than 1"),
        (lambda: Rotary(8, scaling=4.0), TypeError, "scaling must be a RotaryScaling, such as LinearScaling"),
        (lambda: LinearScaling(0.5), ValueError, "LinearScaling.factor must be at least 1"),
        (lambda: Llama3Scaling(low_freq_factor=4.0), ValueError, "high_freq_factor must be greater"),
        (lambda: YarnScaling(factor=2.0, original_context=8, beta_slow=64.0), ValueError, "beta_fast must be greater"),
        (lambda: Rotary(8)(jnp.ones((2, 1, 8)), jnp.arange(3)), ValueError, r"got \(2, 1, 8\) and \(3,\)"),
    ],
)
def test_error_texts(make, error, text):
    with pytest.raises(error, match=text):
        make()
