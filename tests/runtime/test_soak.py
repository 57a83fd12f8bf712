"""An engine under pressure for long: no page is lost, none is used twice, and its process does not grow.

``python -m tests.runtime.test_soak N`` serves ``N`` requests and prints the figures.
"""

import collections
import resource
import sys

import jax
import numpy as np
import pytest

from paged.runtime import Engine, Sampler

from .tiny import VOCAB, greedy_ref, tiny

NUM_PAGES, SLOTS, WIDTH = 24, 6, 32
REQUESTS = 100_000
GROWTH = 64 * 2**20  # bytes that the process may grow by in the second half: allocators round


def _resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _assert_pages_are_counted(engine):
    """A page of any group is counted for each slot, each node of the cache and each copy that holds it."""
    queue = engine._device.state.queue
    pool, cache = jax.device_get((queue.pool, queue.cache))
    for own, pages in zip(pool.pools if hasattr(pool, "pools") else (pool,), cache.pages, strict=True):
        counts = np.zeros(own.ref_counts.shape, int)
        for table in own.block_tables:
            held = table[table >= 0]
            assert len(set(held.tolist())) == len(held)
            counts[held] += 1
        kept = pages[(pages >= 0) & (cache.counts > 0)]
        assert len(set(kept.tolist())) == len(kept)
        counts[kept] += 1
        np.add.at(counts, own.copy_from[own.copy_from >= 0], 1)
        np.testing.assert_array_equal(own.ref_counts, counts)


def soak(requests, seed=0, each=5000):
    """Serve so many requests with random rules, samples, priorities and cancels; check pages and answers meanwhile."""
    model, state = tiny(num_pages=NUM_PAGES)
    engine = Engine(
        model, state, num_slots=SLOTS, max_tokens=WIDTH, chunk_size=8, max_requests=32, steps=16, prefix_cache=True
    )
    draw = np.random.default_rng(seed)
    prompts = [draw.integers(0, VOCAB, n).tolist() for n in draw.integers(1, 18, 40)]
    prompts += [[*prompts[0], *own][:18] for own in prompts[1:20]]
    answers = [greedy_ref(model, prompt, 12) for prompt in prompts]
    submitted, done, live, middle, asked = 0, 0, collections.deque(), 0, {}
    while submitted < requests or not engine.is_idle:
        while submitted < requests and len(live) < 48:
            which, n, limit = int(draw.integers(len(prompts))), int(draw.integers(1, 4)), int(draw.integers(1, 13))
            sampler = Sampler(temperature=1.0, top_k=4) if draw.random() < 0.3 else None
            rule = {"sampler": sampler, "priority": int(draw.integers(3)), "salt": int(draw.random() < 0.1)}
            handles = engine.submit(prompts[which], limit, n=n, **rule)
            asked.update((handle, (which, limit, sampler is None)) for handle in handles)
            live.extend(handles)
            submitted += n
        if draw.random() < 0.5:
            engine.cancel(live[int(draw.integers(len(live)))])
        for event in engine.stream():
            if event.finish_reason:
                which, limit, is_greedy = asked.pop(event.request)
                live.remove(event.request)
                done += 1
                tokens = tuple(event.request.tokens)
                assert event.finish_reason in ("length", "cancelled")
                assert event.finish_reason == "cancelled" or len(tokens) == limit
                assert not is_greedy or tokens == answers[which][: len(tokens)]
                if done % each == 0:
                    _assert_pages_are_counted(engine)
                if done == requests // 2:
                    middle = _resident()
            if submitted < requests and len(live) < 40:
                break
    stats = engine.stats()
    _assert_pages_are_counted(engine)
    assert stats.done == stats.submitted == submitted == done and stats.running == stats.waiting == 0
    assert stats.pages_in_use == stats.pages_cached and stats.preemptions > 0
    growth = _resident() - middle
    assert growth < GROWTH, f"the process grew by {growth / 2**20:.0f} MiB in the second half"
    return stats, growth


@pytest.mark.slow
def test_no_page_is_lost_and_nothing_grows():
    soak(REQUESTS)


if __name__ == "__main__":
    print(*soak(int(sys.argv[1])), sep="\n")
