"""A program's terms as kernels evaluate them: constants that follow each other are one, and scores are the same."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower import Program
from paged.lower.program import kernel_terms
from paged.spec import NOTHING_GIVEN, SoftCap
from tests.support import real

ROWS, KEYS, UNIT = 8, 128, math.log2(math.e)


def _program(**spec) -> Program:
    return Program.from_spec(paged.AttentionSpec(num_q_heads=2, num_kv_heads=2, head_dim=64, **spec))


@dataclasses.dataclass(frozen=True)
class Wave(paged.ScoreOp):
    """Scores that are used both as they come and changed: what they are multiplied by must reach both uses."""

    def __call__(self, s, p, j, h):
        return (s + 3.0 * jnp.sin(s / 2.0)) * 0.5


@dataclasses.dataclass(frozen=True)
class Buckets(paged.ScoreOp):
    """A bias by the distance in whole buckets, which another way to divide could get wrong."""

    def __call__(self, s, p, j, h):
        return s + jnp.floor(real(p - j) / 41.0)


@dataclasses.dataclass(frozen=True)
class Squared(paged.ScoreOp):
    """Scores times a constant's square, which may be no float32 where the scores are."""

    constant: float

    def __call__(self, s, p, j, h):
        return s * self.constant * self.constant


def _same_bucket(p, j):
    return jnp.floor(real(p) / 41.0) == jnp.floor(real(j) / 41.0)


def _of_products(program: Program, products: np.ndarray) -> tuple[np.ndarray, list[str], float]:
    """Scores of products of queries and keys by the terms, the operations in them, and the factor before them."""
    terms = kernel_terms(program, ROWS, KEYS, UNIT)
    p = j = jnp.zeros(products.shape, jnp.int32)
    arrays = terms.early(jnp.zeros((ROWS, 1), jnp.int32))

    def scores(s):
        return terms.scores(arrays, NOTHING_GIVEN, s, p, j)

    operations = [eqn.primitive.name for eqn in jax.make_jaxpr(scores)(products).eqns]
    return np.asarray(scores(products * np.float32(terms.factor))), operations, terms.factor


def _expected(program: Program, products: np.ndarray) -> np.ndarray:
    zeros = np.zeros(products.shape, np.int32)
    return np.asarray(
        program.apply_scores(products * program.scale, zeros, zeros, np.zeros((ROWS, 1), np.int32)) * UNIT
    )


@pytest.mark.parametrize(
    ("spec", "operations"),
    [
        ({}, []),
        ({"soft_cap": 50.0}, ["tanh", "mul"]),
        ({"scores": (SoftCap(30.0), SoftCap(20.0))}, ["tanh", "mul", "tanh", "mul"]),
        ({"scores": (Wave(),)}, ["mul", "sin", "mul", "add", "mul"]),
    ],
)
def test_constants_that_follow_each_other_are_one(spec, operations):
    program = _program(**spec)
    products = np.random.default_rng(0).normal(0, 200, (ROWS, KEYS)).astype(np.float32)
    scores, found, _ = _of_products(program, products)
    assert found == operations
    np.testing.assert_allclose(scores, _expected(program, products), rtol=2e-6, atol=2e-5)


def test_a_factor_of_all_uses_is_left_to_the_kernel():
    assert _of_products(_program(soft_cap=50.0), np.zeros((ROWS, KEYS), np.float32))[2] == pytest.approx(0.125 / 50)
    assert _of_products(_program(scores=(Wave(),)), np.zeros((ROWS, KEYS), np.float32))[2] == 0.125


@pytest.mark.parametrize(("constant", "largest"), [(1e25, 1e-29), (1e-25, 1e31)], ids=["infinite", "nothing"])
def test_constants_whose_product_is_no_number_stay_apart(constant, largest):
    program = _program(scores=(Squared(constant),))
    products = np.linspace(largest / 10, largest, ROWS * KEYS, dtype=np.float32).reshape(ROWS, KEYS)
    scores, _, _ = _of_products(program, products)
    np.testing.assert_allclose(scores, products.astype(np.float64) * program.scale * constant**2 * UNIT, rtol=1e-5)


def test_what_comes_of_positions_is_left_as_it_is():
    program = _program(scores=(Buckets(),), mask=paged.Where(_same_bucket))
    terms = kernel_terms(program, ROWS, KEYS)
    p = j = jnp.zeros((ROWS, KEYS), jnp.int32)

    def divisors(fn, *args):
        eqns = jax.make_jaxpr(fn)(*args).eqns
        return [float(eqn.invars[1].val) for eqn in eqns if eqn.primitive.name == "div"]

    assert divisors(lambda s, p, j: terms.scores((), NOTHING_GIVEN, s, p, j), real(p), p, j) == [41.0]
    assert divisors(lambda p, j: terms.visible((), NOTHING_GIVEN, p, j, 1), p, j) == [41.0, 41.0]


def test_booleans_of_a_head_are_numbers_in_a_kernel_and_booleans_in_the_term():
    is_far = jnp.array([True, False])

    def bias(p, j, h):
        return jnp.where(is_far[h] & (p - j > 3), 2.0, 0.0)

    terms = kernel_terms(_program(scores=(paged.Bias(bias),)), 1, KEYS)
    s, p, j = jnp.zeros((1, KEYS)), jnp.full((1, KEYS), KEYS - 1), jnp.arange(KEYS)[None]
    for head, expected in ((0, 2.0), (1, 0.0)):
        numbers = tuple(x.astype(jnp.int32) for x in terms.early(jnp.full((1, 1), head)))
        assert float(terms.scores(numbers, NOTHING_GIVEN, s, p, j).max()) == expected
