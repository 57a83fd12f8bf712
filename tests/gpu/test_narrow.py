"""Queries over 8-bit pages, as the matrix unit multiplies them: what they were, within a rounding that is told."""

import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower.gpu.narrow import DIGITS, joined, queries_of

LAYOUT = paged.PageLayout(page_size=16, num_kv_heads=1, head_dim=128, dtype="int8", scales="head")


def _queries(dtype):
    """Rows of ordinary, of tiny and of large numbers, one number that all others are small beside, and zeros."""
    rows = np.random.default_rng(3).normal(size=(1, 1, 5, 128)) * np.array([3, 1e-5, 1e4, 1, 0])[:, None]
    rows[0, 0, 3] *= np.where(np.arange(128) == 7, 1, 2.0**-6)
    return jnp.asarray(rows, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_queries_for_float8_pages_are_exact(dtype):
    q = _queries(dtype)
    numbers, factors = queries_of(q, LAYOUT.replace(dtype="float8_e4m3fn"))
    assert numbers.dtype == jnp.float16 and jnp.isfinite(numbers).all()
    back = np.asarray(numbers, np.float64) * np.asarray(factors, np.float64)[..., None]
    np.testing.assert_array_equal(back, np.asarray(q, np.float64))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_queries_for_int8_pages_are_three_digits(dtype):
    q = _queries(dtype)
    digits, factors = queries_of(q, LAYOUT)
    assert digits.dtype == jnp.int8 and digits.shape == (1, 1, DIGITS * 5, 128)
    back = np.asarray(joined(jnp.asarray(digits[0, 0].T, jnp.int32), 5), np.float64).T
    assert np.abs(back).max() == 127 * 2**16
    want = np.asarray(q, np.float64)[0, 0]
    error = np.abs(back * np.asarray(factors, np.float64)[0, 0, :, None] - want)
    assert (error <= 2.0**-22 * np.abs(want).max(axis=-1, keepdims=True)).all()
    assert (np.asarray(factors) > 0).all()


@pytest.mark.parametrize("dtype", ["int8", "float8_e5m2"])
def test_a_query_that_is_no_number_stays_none(dtype):
    numbers, factors = queries_of(jnp.full((1, 1, 1, 128), jnp.nan, jnp.bfloat16), LAYOUT.replace(dtype=dtype))
    assert np.isnan(np.asarray(factors, np.float32)[..., None] * np.asarray(numbers, np.float32)).all(axis=-1).any()
