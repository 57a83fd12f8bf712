"""The serve loop apart from the engine: written down by `jax.export`, and on a mesh of devices."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import paged
from paged.runtime import (
    GroupedPool,
    ModelDraft,
    NGramDraft,
    PagedCache,
    PagePool,
    PrefixCache,
    Sampler,
    page_groups,
    sample,
)
from paged.runtime.serving import (
    Engine,
    NewRequest,
    Queue,
    Requests,
    ServeState,
    Sizes,
    programs,
    serve_many,
    serve_step,
)
from tests.mesh.placing import collectives, mesh_of, needs_devices
from tests.support.compiling import compilations

from .tiny import EMBED, GLOBAL, LAYOUT, LOCAL, Tiny, greedy_ref, tiny

pytestmark = pytest.mark.kernels  # the loop compiles for seconds

SIZES, SLOTS, PAGES, BUDGET = Sizes(4, 24), 2, 10, 5
TELLING = Sizes(4, 24, has_log_probs=True)
MODEL, STATE = tiny(num_pages=PAGES)
PROMPTS = ((3, 1, 4, 1, 5, 9, 2, 6, 5), (2, 7), (3, 1, 4, 1, 5, 9, 2, 6, 5, 3))
ANSWER, DRAWS = 6, Sampler(temperature=1.0, top_p=0.9)


def state_of(prompts=PROMPTS, specs=(LOCAL, GLOBAL), state=STATE, asks=False):
    """Some requests that wait: the last one draws by chance."""
    sizes, asked = (TELLING, {"log_probs": 2, "prompt_log_probs": True}) if asks else (SIZES, {})
    samplers = [*[Sampler()] * (len(prompts) - 1), DRAWS]
    new = [
        NewRequest(prompt, len(prompt) + ANSWER, sampler, jax.random.key(i), arrival=i, **asked)
        for i, (prompt, sampler) in enumerate(zip(prompts, samplers, strict=True))
    ]
    requests = Requests.init(sizes).put(jnp.arange(len(new)), Requests.of(new, sizes))
    groups = page_groups(specs)
    pool = GroupedPool([PagePool.init(PAGES, SLOTS, 6, 4) for _ in groups], groups)
    return ServeState(Queue.init(requests, pool, PrefixCache.init(pool)), state)


def answers_ref():
    """Of dense decoding, each draw with the request's key and the number of the token."""
    *greedy, last = PROMPTS
    known, key = list(last), jax.random.key(len(greedy))
    for i in range(ANSWER):
        logits = MODEL.dense(jnp.asarray(known))[-1:]
        known.append(int(sample(logits, DRAWS, jax.random.fold_in(key, i)[None])[0]))
    return [*(greedy_ref(MODEL, prompt, ANSWER) for prompt in greedy), tuple(known[len(last) :])]


def answers_of(state):
    requests = state.queue.requests
    return [
        tuple(np.asarray(requests.tokens)[i, len(prompt) : len(prompt) + ANSWER].tolist())
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.slow
def test_what_is_read_back_serves_the_same_tokens():
    """Groups of layers, a prefix cache, typed keys and the model's state go in and come out as they are."""
    run, start = jax.jit(lambda state: serve_many(MODEL, state, 40, budget=BUDGET)), state_of()
    again = jax.jit(export.deserialize(export.export(run)(start).serialize()).call)
    served, events, steps = again(start)
    assert jax.tree.structure((served, events, steps)) == jax.tree.structure(jax.eval_shape(run, start))
    assert answers_of(served) == answers_ref() and int(served.queue.counts.done) == len(PROMPTS)
    assert served.queue.pool.masks == start.queue.pool.masks and int(served.queue.counts.reused_tokens) > 0
    assert int(again(served)[2]) == 0  # nothing is left to do


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ngram", "model"])
def test_what_is_read_back_speculates_and_tells_log_probabilities(kind):
    """Of drawn tokens, of the likeliest and of prompts, where a step draws several tokens: as the loop in memory."""
    drafts = NGramDraft(2, ngram=1) if kind == "ngram" else ModelDraft(MODEL, jax.tree.map(jnp.copy, STATE), 2)
    start, own = state_of(asks=True), drafts
    if kind == "model":
        start, own = dataclasses.replace(start, draft_state=drafts.state), drafts.without_state
    how = {"budget": BUDGET + 2, "speculation": own, "log_probs": 2, "has_figures": True}
    run = jax.jit(lambda state: serve_many(MODEL, state, 40, **how))
    want, got = run(start), export.deserialize(export.export(run)(start).serialize()).call(start)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        np.testing.assert_array_equal(*map(jax.random.key_data, (x, other)) if is_key else (x, other))
    served, events, steps = got
    assert answers_of(served) == answers_ref()
    assert int(steps) < ANSWER * len(PROMPTS) and int(jnp.max(events.count)) > 1
    for row, prompt in enumerate(PROMPTS):
        known = [*prompt, *answers_ref()[row]]
        rows = np.asarray(jax.nn.log_softmax(MODEL.dense(jnp.asarray(known))))
        at = np.arange(len(known) - 1)
        dense, slots = rows[at, known[1:]], np.asarray(events.request) == row
        mine = np.asarray(events.drawn.log_prob)[slots]
        counts = np.asarray(events.count)[slots]
        drawn = np.concatenate([x[:count] for x, count in zip(mine, counts, strict=True)])
        np.testing.assert_allclose(drawn, dense[len(prompt) - 1 :], atol=2e-4)
        of_prompt = np.asarray(events.of_prompts.request) == row
        places = np.asarray(events.of_prompts.place)[of_prompt]
        assert set(places.tolist()) == set(range(1, len(prompt)))
        told = np.asarray(events.of_prompts.log_prob)[of_prompt]
        np.testing.assert_allclose(told, dense[places - 1], atol=2e-4)


@needs_devices
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ngram", "model"])
def test_an_engine_on_two_devices_speculates_and_tells_log_probabilities(kind):
    """A draft model on the same devices."""
    model, state = shared_model(kv_heads=2)
    drafts = NGramDraft(2, ngram=1) if kind == "ngram" else ModelDraft(*shared_model(kv_heads=2), 2)
    sizes = {"num_slots": SLOTS, "max_tokens": SIZES.tokens, "chunk_size": BUDGET - SLOTS, "max_requests": 4}
    served = Engine(model, state, **sizes, steps=8, speculation=drafts, log_probs=1)
    rules = [{}] * (len(PROMPTS) - 1) + [{"sampler": DRAWS, "key": jax.random.key(len(PROMPTS) - 1)}]
    handles = [served.submit(prompt, ANSWER, log_probs=1, **rule) for prompt, rule in zip(PROMPTS, rules, strict=True)]
    list(served.stream())
    assert [tuple(handle.tokens) for handle in handles] == answers_ref() and served.stats().accepted_tokens > 0
    for handle in handles:
        known = [*handle.prompt, *handle.tokens]
        rows = np.asarray(jax.nn.log_softmax(MODEL.dense(jnp.asarray(known))))
        at = np.arange(len(handle.prompt) - 1, len(known) - 1)
        np.testing.assert_allclose(handle.log_probs, rows[at, known[len(handle.prompt) :]], atol=2e-4)


def test_all_that_a_step_takes_and_tells_can_be_written_down():
    """Without compiling the loop: with a prefix cache, drafts, log-probabilities and figures."""
    start = dataclasses.replace(state_of(asks=True), draft_state=STATE)
    how = {"budget": BUDGET + 2, "speculation": NGramDraft(2), "log_probs": 2, "has_figures": True}
    events = eqx.filter_eval_shape(lambda state: serve_step(MODEL, state, **how)[1], start)
    told = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), events)
    again = export.deserialize(export.export(jax.jit(lambda *all_: all_))(start, told).serialize())
    assert jax.tree.structure(again.call(start, told)) == jax.tree.structure((start, told))


def test_a_state_that_cannot_be_written_down_is_refused_by_name():
    near = paged.Causal() & paged.Where(lambda p, j: p - j < 3)
    masked = state_of(specs=(LOCAL.replace(mask=near), GLOBAL))
    with pytest.raises(ValueError, match=r"GroupedPool.masks cannot be written down: the mask .* may be any function"):
        export.export(jax.jit(lambda pool: pool))(masked.queue.pool).serialize()
    with pytest.raises(ValueError, match=r"eqx.nn.State cannot be written down before"):
        export.export(jax.jit(lambda state: state))(eqx.nn.State(eqx.nn.StateIndex(jnp.zeros(1)))).serialize()


def shared_model(**axes):
    """The model with its attention on two devices: the same parameters, laid out by heads."""
    mesh, names = mesh_of(axes)

    def shared(layer):
        cache = PagedCache(layer.cache.attend.spec, LAYOUT, PAGES, mesh=mesh, axes=names, check=False)
        layer = eqx.tree_at(lambda layer: layer.cache, layer, cache)
        put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
        if "kv_heads" not in axes:
            return layer
        for name in ("query_proj", "key_proj", "value_proj"):
            own = getattr(layer, name)
            layer = eqx.tree_at(lambda x, name=name: getattr(x, name).weight, layer, put(own.weight, "model", None))
        return eqx.tree_at(lambda x: x.output_proj.weight, layer, put(layer.output_proj.weight, None, "model"))

    def make():
        model = Tiny(PAGES, key=jax.random.key(0))
        return eqx.tree_at(lambda model: model.layers, model, tuple(map(shared, model.layers)))

    return eqx.nn.make_with_state(make)()


@needs_devices
@pytest.mark.slow
def test_an_engine_on_two_devices_serves_the_same_tokens_and_leaves_each_its_heads():
    model, state = shared_model(kv_heads=2)
    sizes = {"num_slots": SLOTS, "max_tokens": SIZES.tokens, "chunk_size": BUDGET - SLOTS, "max_requests": 4}
    served = Engine(model, state, **sizes, steps=8)
    rules = [{}] * (len(PROMPTS) - 1) + [{"sampler": DRAWS, "key": jax.random.key(len(PROMPTS) - 1)}]
    served.submit([1], 1)
    list(served.stream())
    with compilations() as compiled:
        handles = [served.submit(prompt, ANSWER, **rule) for prompt, rule in zip(PROMPTS, rules, strict=True)]
        list(served.stream())
    assert not compiled, "the state comes back where it was"
    assert [tuple(handle.tokens) for handle in handles] == answers_ref() and served.stats().launches > 2
    device = served._device
    layout = model.layers[0].cache.attend.shardings.pages
    for pages in jax.tree.leaves(device.state.model_state, is_leaf=lambda x: isinstance(x, paged.Pages)):
        assert all(x.sharding.is_equivalent_to(own, x.ndim) for x, own in zip(pages.arrays, layout.arrays, strict=True))
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(device.state.queue))
    # Devices add up what their heads give to a row, and exchange neither pages nor anything of the queue.
    step = programs.serve.lower((device.model, device._limits, *device._facts), device.state).compile()
    exchanged = collectives(step.compiled.as_text())
    assert exchanged and {operation for *_, operation in exchanged} == {"all-reduce"}
    assert max(exchanged)[0] <= BUDGET * EMBED
