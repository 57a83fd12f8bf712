"""The serve loop on a mesh that shares out sequences: each shard serves its own requests as one device would."""

import logging

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import paged
from paged.models import load, open_safetensors
from paged.runtime import Engine, ModelDraft, NGramDraft, PagedCache, Sampler, generate
from paged.runtime.serving import programs, serve_many
from paged.runtime.serving.rows import Rows
from tests.mesh.placing import collectives, mesh_of, needs_devices
from tests.models.test_load import CHECKPOINTS

from .tiny import LAYOUT, LOCAL, Tiny, greedy_ref, tiny

PAGES, SLOTS = 24, 4
PROMPTS = [
    [3, 1, 4, 1, 5, 9, 2, 6, 5],
    [2, 7],
    [3, 1, 4, 1, 5, 9, 2, 6, 5, 3],
    [1],
    [8, 2, 8, 1, 8, 2, 8],
    [3, 1, 4, 1, 5],
]
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
    "axes",
    [{"sequences": 2}, {"sequences": 4}, {"sequences": 2, "kv_heads": 2}, {"sequences": 2, "context": 2}],
    ids=lambda axes: "-".join(axes) + str(axes["sequences"]),
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
    if "kv_heads" in axes or "context" in axes:
        return
    # While steps run no device waits for another: what they exchange is what the host is told at the end.
    device = served._device
    text = (
        programs.serve.lower((device.model, device._limits, *device._facts), device.state).compile().compiled.as_text()
    )
    assert not collectives("\n".join(own for own in text.split("\n\n") if not own.lstrip().startswith("ENTRY")))


@needs_devices
@pytest.mark.slow
def test_shards_speculate_tell_log_probabilities_and_take_other_weights():
    options = {"log_probs": 2, "num_pages": PAGES, "page_size": 4}
    of_ngrams = {"speculation": NGramDraft(num_tokens=2, ngram=1)}
    alone, served = engine(*tiny(PAGES), **options), engine(*on_mesh(sequences=2), **options, **of_ngrams)
    for again in range(2):
        asked = {"log_probs": 2, "prompt_log_probs": True}
        handles, want = submit_all(served, **asked), submit_all(alone, **asked)
        list(served.stream()), list(alone.stream())
        assert told(handles) == told(want), again
        for handle, other in zip(handles, want, strict=True):
            np.testing.assert_allclose(handle.log_probs, other.log_probs, atol=1e-4)
            np.testing.assert_allclose(handle.prompt_log_probs[1:], other.prompt_log_probs[1:], atol=1e-4)
        for each in (alone, served):
            each.update_model(jax.tree.map(lambda x: -x if eqx.is_array(x) else x, each._device.model))
    assert served.stats().accepted_tokens > 0


@needs_devices
@pytest.mark.slow
def test_generate_deals_prompts_to_shards_and_gives_the_tokens_of_one_device():
    rules = {
        "max_new_tokens": 7,
        "num_slots": SLOTS,
        "chunk_size": 3,
        "sampler": DRAWS,
        "key": jax.random.key(3),
        "n": 2,
    }
    want = generate(*tiny(PAGES), PROMPTS, **rules)
    reports = []
    model, state = on_mesh(sequences=2)
    got, state = generate(model, state, PROMPTS, **rules, on_step=reports.append, donate_state=True)
    assert [own.tokens for own in got] == [own.tokens for own in want]
    assert max(report.running for report in reports) == SLOTS and reports[0].groups[0].num_pages == PAGES
    assert all(set(report.drawn) <= set(report.rows) for report in reports), "by place, whatever the shard"
    assert sum(sum(report.rows.values()) for report in reports) == sum(report.tokens for report in reports)
    again = generate(model, state, PROMPTS, **rules, speculation=NGramDraft(num_tokens=2, ngram=1))
    assert [own.tokens for own in again] == [own.tokens for own in want]


@needs_devices
@pytest.mark.slow
def test_a_loop_of_shards_that_is_read_back_serves_the_same_tokens():
    served = engine(*on_mesh(sequences=2))
    handles = [served.submit(prompt, 7) for prompt in PROMPTS]
    served._upload()
    device = served._device
    run = jax.jit(lambda state: serve_many(device.model, state, 40, budget=device._facts[0]))
    again = export.deserialize(export.export(run)(device.state).serialize())
    state, events, _ = again.call(device.state)
    tokens = np.asarray(state.queue.requests.tokens).reshape(8, -1)
    for handle in handles:
        own = tokens[handle.row, len(handle.prompt) : len(handle.prompt) + 7]
        assert tuple(own.tolist()) == greedy_ref(tiny(PAGES)[0], handle.prompt, 7)
    assert {handle.row // 4 for handle in handles} == {0, 1} and events.request.shape[1] == SLOTS


@needs_devices
@pytest.mark.slow
def test_a_checkpoint_is_served_by_shards():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    sizes = {"num_pages": 32, "page_size": 4, "max_length": 64, "dtype": jnp.float32}
    model, state, _ = load(CHECKPOINTS / "llama", **sizes, mesh=mesh, axis=None, sequences="data")
    want = open_safetensors(CHECKPOINTS / "llama" / "expected.safetensors")
    prompt, tokens = (want[key].read().tolist() for key in ("prompt", "tokens"))
    for result in generate(model, state, [prompt] * 3, max_new_tokens=24, num_slots=4, chunk_size=8):
        assert list(result.tokens) == tokens


@needs_devices
def test_a_shard_calls_its_attention_with_its_own_rows_batch_and_pages():
    """As many shards of one stacked call: under a user's own ``jax.shard_map`` too."""
    mesh, axes = mesh_of({"sequences": 2})
    attend = paged.lower(LOCAL, LAYOUT, mesh=mesh, axes=axes)
    batches = [
        paged.RaggedBatch.decode([5, 2], [[1, 0], [2, -1]]),
        paged.RaggedBatch.decode([3, 4], [[2, -1], [0, -1]]),
    ]
    stacked, q = paged.RaggedBatch.stack(batches), jax.random.normal(jax.random.key(0), (4, 4, 8))
    k, v, pages = q[:, :2], q[:, 2:], LAYOUT.init(6)
    want, pages_want = attend.update(q, k, v, pages, stacked)
    own = lambda q, k, v, pages, batch: attend.update(q, k, v, pages, jax.tree.map(lambda x: x[0], batch))
    specs = attend.specs
    shard = jax.shard_map(
        own, mesh=mesh, in_specs=(specs.q, specs.k, specs.v, specs.pages, specs.batch),
        out_specs=(specs.out, specs.pages), check_vma=False,
    )  # fmt: skip
    out, pages = jax.jit(shard)(q, k, v, pages, stacked)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(pages.arrays[0], pages_want.arrays[0])


def test_a_request_goes_where_the_fewest_are_and_a_sample_beside_the_others_while_there_is_a_slot():
    rows = Rows(rows=3, slots=2, shards=2)
    assert rows.take([-1, -1, -1]) == [0, 3, 1]
    assert rows.take([5, 5, 5]) == [4, 2, 5]  # beside its like, then where the fewest are
    assert rows.take([-1]) == []
    rows.give_back([1, 4])
    assert rows.take([-1, 6, 6, 6]) == [1, 4]


@needs_devices
def test_what_shards_cannot_share_is_refused_by_name():
    model, state = on_mesh(sequences=2)
    with pytest.raises(ValueError, match=r"num_slots is of all 2 shards .* multiple of 2; got 3"):
        Engine(model, state, num_slots=3, max_tokens=16)
    with pytest.raises(ValueError, match=r"num_pages is of all 2 shards .* multiple of 2; got 7"):
        Engine(model, state, num_slots=2, max_tokens=16, num_pages=7)
    other = ModelDraft(*on_mesh(sequences=4), num_tokens=1)
    with pytest.raises(ValueError, match="A ModelDraft whose attention shares out sequences must do so as the model"):
        Engine(model, state, num_slots=2, max_tokens=16, speculation=other)
    both = eqx.tree_at(lambda model: model.layers[0], model, on_mesh(sequences=4)[0].layers[0])
    with pytest.raises(ValueError, match="All attentions of a model must share out sequences alike"):
        Engine(both, state, num_slots=4, max_tokens=16)
