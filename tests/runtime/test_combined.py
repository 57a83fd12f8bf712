"""Everything that `generate` does with pages at once, with NaN in every page that nobody holds."""

import dataclasses

import equinox as eqx
import jax
import numpy as np
import pytest

from paged.runtime import _answering, generate

from .test_groups import CHUNK, SINK, SPEC, Layered, poisoned
from .tiny import LAYOUT, VOCAB, greedy_ref

SPECS = (SPEC.replace(window=5), SINK, CHUNK, SPEC)


@pytest.fixture(scope="module", params=[(10, 12, 12, 24), (5, 6, 6, 11)], ids=["roomy", "tight"])
def served(request):
    """A model of four groups of layers, by the number of their pages."""
    return eqx.nn.make_with_state(Layered)(SPECS, request.param, LAYOUT, jax.random.key(2))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.slow
def test_prompts_that_share_pages_get_the_tokens_that_they_get_alone(served, seed, monkeypatch):
    """Prompts with common beginnings, several samples of each, few pages: hits, forks, copies, evictions, preemption.

    Before every step each page of each layer that neither a sequence nor the cache holds is filled with NaN.
    """
    model, state = served
    poison = eqx.filter_jit(lambda state, pool: poisoned(model, state, pool))
    launch = _answering.Answering._launch

    def poisoning(self):
        queue = self.state.queue
        self.state = dataclasses.replace(self.state, model_state=poison(self.state.model_state, queue.pool))
        return launch(self)

    monkeypatch.setattr(_answering.Answering, "_launch", poisoning)
    monkeypatch.setattr(_answering, "_STEPS_TO_REPORT", 1)
    rng, reports = np.random.default_rng(seed), []
    bases = [rng.integers(0, VOCAB, size).tolist() for size in (21, 15, 4)]
    starts = [bases[rng.integers(3)][: rng.integers(1, 22)] for _ in range(7)]
    prompts = [start + rng.integers(0, VOCAB, rng.integers(0, 6)).tolist() for start in starts]
    limits, n = rng.integers(1, 14, 7).tolist(), 1 + seed % 3
    sizes = {"max_new_tokens": limits, "num_slots": 3, "chunk_size": 4, "pages_per_seq": 12, "n": n}
    results = generate(model, state, prompts, **sizes, on_step=reports.append)
    want = [greedy_ref(model, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True) for _ in range(n)]
    assert [result.tokens for result in results] == want
    reused, evicted, freed = (
        sum(getattr(report, name) for report in reports) for name in ("tokens_reused", "pages_evicted", "pages_freed")
    )
    assert reused + evicted > 0 and freed > 0
