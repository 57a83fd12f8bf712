"""`Rotary` and its scalings against formulas in float64; scores depend on distances only."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged.runtime import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NtkScaling,
    Rotary,
    RotaryScaling,
    YarnScaling,
)

# Cosines and sines are right to 1e-6; inputs are about 3.
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


def pi_ref(bits):
    """Pi as an integer multiple of ``2 ** -bits``, by Machin's formula."""

    def arctan(n):
        term, total, k = (1 << bits + 16) // n, 0, 1
        while term:
            total, term, k = total + (term // k if k % 4 == 1 else -(term // k)), term // n**2, k + 2
        return total

    return 4 * (4 * arctan(5) - arctan(239)) >> 16


LATE = [0, 1, -1, 2, 131071, -131071, 10**6, 2**24 + 1, 1_234_567_891, 2**31 - 1, -(2**31)]
SCALINGS = [
    None,
    LinearScaling(4.0),
    NtkScaling.at_length(2.0, 65536, 4096),
    Llama3Scaling(),
    YarnScaling(factor=40.0, original_context=4096, mscale=1.0, mscale_all_dim=0.5),
]


class Unusual(RotaryScaling):
    """Frequencies above a turn per position, and a negative one."""

    def frequencies(self, theta, rotary_dim):
        return np.array([7.0, -1.25, 2 * math.pi, 3.1])


@pytest.mark.parametrize("scaling", [*SCALINGS, Unusual()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("mode", ["default", "x64"])
def test_angles_are_right_at_every_int32_position(scaling, mode):
    """Against exact integers: the float64 frequency times the position, modulo 2 pi."""
    rotary = Rotary(8, theta=500000.0, scaling=scaling)
    turn, exact = 2 * pi_ref(160), [int(f * 2.0**80) << 80 for f in rotary.frequencies.tolist()]
    angles = np.array([[(p * f) % turn / 2**160 for f in exact] for p in LATE])
    x = jnp.zeros((len(LATE), 1, 8), jnp.float32).at[..., :4].set(1)
    with jax.enable_x64(mode == "x64"), jax.numpy_dtype_promotion("strict"):
        turned = jax.jit(rotary)(x, jnp.asarray(LATE, int)) / (1 if scaling is None else scaling.magnitude)
    assert turned.dtype == jnp.float32
    np.testing.assert_allclose(turned[:, 0], np.concatenate([np.cos(angles), np.sin(angles)], -1), atol=1e-6)


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


def test_longrope_divides_each_frequency_and_scales_the_vectors():
    scaling = LongRopeScaling(factors=[1.0, 2.0, 4.0, 5.0], attention_factor=1.5)
    expected = [1.0, 0.1 / 2, 0.01 / 4, 0.001 / 5]
    np.testing.assert_allclose(Rotary(8, scaling=scaling).frequencies, expected, rtol=1e-12)
    assert scaling.magnitude == 1.5
    assert hash(scaling) == hash(LongRopeScaling(factors=(1.0, 2.0, 4.0, 5.0), attention_factor=1.5))


def test_yarn_magnitude_scales_the_vectors():
    x, at = jnp.asarray(normal((3, 1, 8)), jnp.float32), jnp.array([0, 5, 9])
    scaling = YarnScaling(factor=10.0, original_context=100)
    assert scaling.magnitude == pytest.approx(1 + 0.1 * math.log(10))
    norm = jnp.linalg.norm(Rotary(8, scaling=scaling)(x, at), axis=-1) / jnp.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(norm, scaling.magnitude, rtol=1e-5)
    assert YarnScaling(factor=10.0, original_context=100, attention_factor=1.0).magnitude == 1.0


def yarn_magnitude_ref(factor, attention_factor=None, mscale=None, mscale_all_dim=None):
    """What rotated vectors are multiplied by, in Hugging Face's reading of ``rope_scaling``."""

    def grown(weight):
        return 0.1 * weight * np.log(factor) + 1.0 if factor > 1 else 1.0

    if attention_factor is not None:
        return attention_factor
    return grown(mscale) / grown(mscale_all_dim) if mscale and mscale_all_dim else grown(1)


@pytest.mark.parametrize("factor", [1.0, 40.0])
@pytest.mark.parametrize(
    "keys",
    [{}, {"attention_factor": 1.3}, {"mscale": 0.707, "mscale_all_dim": 0.707}, {"mscale": 1.0, "mscale_all_dim": 0.5}],
    ids=str,
)
def test_yarn_factors_by_their_names(factor, keys):
    scaling = YarnScaling(factor=factor, original_context=4096, **keys)
    assert scaling.magnitude == pytest.approx(yarn_magnitude_ref(factor, **keys), rel=1e-12)
    # DeepSeek's attention: softmax_scale * m * m, where m = 0.1 mscale_all_dim ln(factor) + 1.
    m = 1 + 0.1 * keys.get("mscale_all_dim", 0) * math.log(factor)
    assert scaling.score_factor == pytest.approx(m * m, rel=1e-12)
    if keys.get("mscale") == 0.707 and factor > 1:
        assert math.sqrt(scaling.score_factor) == pytest.approx(0.0707 * math.log(40) + 1)  # arXiv:2405.04434, 3.1.4


@pytest.mark.parametrize(
    "scaling",
    [
        LinearScaling(1.0),
        NtkScaling(1.0),
        Llama3Scaling(factor=1.0),
        YarnScaling(factor=1.0, original_context=64),
        LongRopeScaling(factors=(1.0,) * 4),
    ],
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
        (lambda: Rotary(8, theta=1.0), ValueError, "theta must be .*greater than 1"),
        (lambda: Rotary(8, scaling=4.0), TypeError, "scaling must be a RotaryScaling, such as LinearScaling"),
        (lambda: Rotary(8, theta=math.inf), ValueError, "theta must be finite"),
        (lambda: Rotary(8, theta="1e6"), TypeError, "theta must be a number.*got '1e6'"),
        (lambda: Rotary(8, is_interleaved="no"), TypeError, "is_interleaved must be True or False; got 'no'"),
        (lambda: Rotary(8)(jnp.ones((2, 1, 8)), jnp.ones(2)), TypeError, "positions must be integers; got float32"),
        (lambda: LinearScaling("4"), TypeError, "LinearScaling.factor must be a number; got '4'"),
        (
            lambda: YarnScaling(factor=2.0, original_context=8, is_rounded=0),
            TypeError,
            "YarnScaling.is_rounded must be",
        ),
        (lambda: LinearScaling(0.5), ValueError, "LinearScaling.factor must be at least 1"),
        (lambda: Llama3Scaling(low_freq_factor=4.0), ValueError, "high_freq_factor must be greater"),
        (lambda: YarnScaling(factor=2.0, original_context=8, beta_slow=64.0), ValueError, "beta_fast must be greater"),
        (lambda: YarnScaling(factor=2.0, original_context=8, mscale=1.0), ValueError, "together.*got mscale. A 0 in"),
        (lambda: YarnScaling(factor=2.0, original_context=8, mscale=1.0, mscale_all_dim=0.0), ValueError, "positive"),
        (
            lambda: YarnScaling(factor=2.0, original_context=8, attention_factor=1.0, mscale=1.0, mscale_all_dim=1.0),
            ValueError,
            "attention_factor alone.*got attention_factor, mscale, mscale_all_dim",
        ),
        (lambda: LongRopeScaling(factors=(1.0, 0.0)), ValueError, "factors must be positive and finite; got 0.0"),
        (lambda: LongRopeScaling(factors=("1",)), TypeError, "factors must be numbers; got '1'"),
        (
            lambda: Rotary(8, scaling=LongRopeScaling(factors=(1.0, 2.0))).frequencies,
            ValueError,
            "rotary_dim // 2 = 4; got 2",
        ),
        (lambda: Rotary(8)(jnp.ones((2, 1, 8)), jnp.arange(3)), ValueError, r"got \(2, 1, 8\) and \(3,\)"),
    ],
)
def test_error_texts(make, error, text):
    with pytest.raises(error, match=text):
        make()
