"""The serve loop on a mesh that shares out sequences: each shard serves its own requests as one device would."""

import logging

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.runtime import Engine, ModelDraft, NGramDraft, PagedCache, Sampler
from paged.runtime.serving import programs
from paged.runtime.serving.rows import Rows
from tests.mesh.placing import collectives, mesh_of, needs_devices

from .tiny import LAYOUT, Tiny, greedy_ref, tiny

PAGES, SLOTS = 24, 4
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [1], [8, 2, 8, 1, 8, 2, 8], [3, 1, 4, 1, 5]]
DRAWS = Sampler(temperature=1.0, top_p=0.9, repetition_penalty=1.2)


def on_mesh(num_pages=PAGES, **axes):
    """The model with its attention on several devices, and the same parameters."""
    mesh, names = mesh_of(axes)

    def shared(layer):
        cache = PagedCache(layer.cache.attend.spec, LAYOUT, num_pages, mesh=mesh, axes=names)
        return eqx.tree_at(lambda layer: layer.cache, layer, cache)

    def make():
        model = Tiny(num_pages, key=jax.random.key(0))
        return eqx.tree_at(lambda model: model.layers, model, tuple(map(shared, model.layers)))

    return eqx.nn.make_with_state(make)()


def engine(model, state, **options):
    sizes = {"num_slots": SLOTS, "max_tokens": 32, "chunk_size": 3, "max_requests": 8, "steps": 8}
    return Engine(model, state, **sizes, key=jax.random.key(7), **options)


def submit_all(served, **how):
    handles = [served.submit(prompt, 7, **how) for prompt in PROMPTS]
    handles += [served.submit(prompt, 9, sampler=DRAWS, priority=i, **how) for i, prompt in enumerate(PROMPTS)]
    return handles + served.submit(PROMPTS[0], 6, n=5, sampler=DRAWS, **how)


def told(handles):
    return [(handle.tokens, handle.finish_reason) for handle in handles]


@needs_devices
@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [{"sequences": 2}, {"sequences": 4}, {"sequences": 2, "kv_heads": 2}, {"sequences": 2, "context": 2}], ids=str
)
def test_shards_serve_the_tokens_of_one_device(axes, caplog):
    """Greedy and by chance, samples of one prompt, priorities, more requests than rows, hits in prefix caches."""
    alone, served = engine(*tiny(PAGES)), engine(*on_mesh(**axes), record=True)
    served.warmup(progress=False)
    for again in range(2):
        with caplog.at_level(logging.WARNING), jax.log_compiles():
            handles, want = submit_all(served), submit_all(alone)
            stopped, _ = served.submit(PROMPTS[0], 20), alone.submit(PROMPTS[0], 1)  # requests draw by their numbers
            for _ in served.stream():
                served.cancel(stopped)
        list(alone.stream())
        assert told(handles) == told(want), again
    assert not [r.getMessage() for r in caplog.records if "ompiling" in r.getMessage()]
    assert tuple(handles[0].tokens) == greedy_ref(tiny(PAGES)[0], PROMPTS[0], 7)
    stats = served.stats()
    assert stats.pages == 2 * PAGES and stats.reused_tokens > 0 and stats.pages_in_use == stats.pages_cached > 0
    assert stats.done == stats.submitted == 2 * 18
    of_shards = np.asarray(served._device.state.queue.counts.new_tokens)
    assert of_shards.shape == (axes["sequences"],) and min(of_shards) > max(of_shards) / 3, "every shard has its part"
    assert max(len(record.rows) for record in served.records) == SLOTS
    assert sum(sum(record.drawn.values()) for record in served.records) == stats.new_tokens
    assert all(record.free[0] >= 0 and record.pages == (PAGES, PAGES) for record in served.records)
