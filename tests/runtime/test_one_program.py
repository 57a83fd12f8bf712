"""What a user calls between steps, outside of ``jax.jit``: operations of pools and of the prefix cache; a draw."""

import jax
import jax.numpy as jnp
import pytest

from paged.runtime import GroupedPool, PagePool, PrefixCache, Sampler, Samplers, draw
from paged.spec import Causal, Window
from tests.support.compiling import compilations

from .tiny import GLOBAL, LOCAL

IDS = jnp.arange(8, dtype=jnp.int32)
# Each for two numbers, with which nothing but values differs.
OF_POOLS = {
    "reserve": lambda pool, n: pool.reserve([n, 4]),
    "extend": lambda pool, n: pool.extend([n, 1]),
    "release": lambda pool, n: pool.release([n == 1, True]),
    "fork": lambda pool, n: pool.fork([-1, n]),
    "share": lambda pool, n: pool.share([-1, 0], [0, n]),
    "ragged_batch": lambda pool, n: pool.ragged_batch([n, 0]),
}
OF_PAGE_POOLS = {
    "trim": lambda pool, n: pool.trim(Causal() & Window(3)),
    "reorder": lambda pool, n: pool.reorder([0, n - 1]),
    "settle": lambda pool, n: pool.settle(),
    "decode_batch": lambda pool, n: pool.decode_batch([n == 1, True]),
    "prefill_batch": lambda pool, n: pool.prefill_batch(n - 1, n),
}
OF_CACHES = {
    "insert": lambda pool, n: PrefixCache.init(pool, 6).insert(pool, 0, IDS, n),
    "attach": lambda pool, n: PrefixCache.init(pool, 6).attach(pool, 1, IDS, n),
    "lookup": lambda pool, n: PrefixCache.init(pool, 6).lookup(IDS, n),
    "evict": lambda pool, n: PrefixCache.init(pool, 6).evict(pool, n),
    "clear": lambda pool, n: PrefixCache.init(pool, 6).clear(pool),
}


def _pool(of_groups):
    sizes = {"num_pages": 13, "num_slots": 2, "pages_per_seq": 4, "page_size": 2}
    pool = GroupedPool.init([LOCAL, GLOBAL], **sizes) if of_groups else PagePool.init(**sizes)
    return pool.extend([5, 0])[0]


ROWS = [(name, False) for name in (*OF_POOLS, *OF_PAGE_POOLS, *OF_CACHES)] + [(name, True) for name in OF_POOLS]


@pytest.mark.parametrize(("name", "of_groups"), ROWS)
def test_an_operation_is_one_program_that_is_compiled_once(name, of_groups):
    """An insertion was 1167 programs, and most of them were compiled again with every call."""
    pool, operation = _pool(of_groups), {**OF_POOLS, **OF_PAGE_POOLS, **OF_CACHES}[name]
    PrefixCache.init(pool, 6)  # its arrays take programs of their own
    with compilations() as compiled:
        jax.jit(lambda x: x + 1)(1)
        assert len(compiled) == 1, "the listener hears of a compilation"
        compiled.clear()
        operation(pool, 1)
        # One for each group, and one that brings a list to the device.
        first = len(compiled)
        assert first <= (pool.num_groups if of_groups else 1) + 1
        operation(pool, 2)
        assert len(compiled) == first


def test_a_draw_with_a_rule_for_each_row_is_one_program_that_is_compiled_once():
    """Its branches were compiled again with every call."""
    logits, keys = jnp.zeros((2, 5)), jax.random.split(jax.random.key(0), 2)
    rules = [Samplers.of([Sampler(temperature=n), Sampler(top_k=2, temperature=n)]) for n in (1.0, 2.0)]
    with compilations() as compiled:
        draw(logits, rules[0], keys)
        assert len(compiled) == 1
        draw(logits, rules[1], keys)
        assert len(compiled) == 1
