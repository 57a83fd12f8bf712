"""`check_pool` finds a pool that hands out a page twice, and one that forgets to give pages back."""

import equinox as eqx
import jax.numpy as jnp
import pytest

from paged.runtime import PagePool
from paged.testing import CheckFailure, check_pool


class Greedy(PagePool):
    """A pool that never gives pages back."""

    def release(self, is_released):
        released = PagePool.release(self, is_released)
        return eqx.tree_at(lambda pool: pool.ref_counts, released, self.ref_counts)


class Generous(PagePool):
    """A pool that says yes to everything."""

    def reserve(self, tokens):
        pool, ok = PagePool.reserve(self, tokens)
        return pool, jnp.ones_like(ok)


@pytest.mark.parametrize(
    ("pool_type", "text"),
    [(Greedy, "ref_counts"), pytest.param(Generous, "ok of (reserve|extend)", marks=pytest.mark.kernels)],
)
def test_wrong_pools_are_named(pool_type, text):
    with pytest.raises(CheckFailure, match=text):
        check_pool(pool_type, examples=20)


def test_the_librarys_pool_passes():
    check_pool(PagePool, examples=10)
