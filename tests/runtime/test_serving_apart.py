"""The serve loop apart from the engine: written down by `jax.export`, and on a mesh of devices."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import paged
from paged.runtime import GroupedPool, PagePool, PrefixCache, Sampler, page_groups, sample
from paged.runtime.serving import NewRequest, Queue, Requests, ServeState, Sizes, serve_many

from .tiny import GLOBAL, LOCAL, greedy_ref, tiny

pytestmark = pytest.mark.kernels  # the loop compiles for seconds

SIZES, SLOTS, PAGES, BUDGET = Sizes(4, 24), 2, 10, 5
MODEL, STATE = tiny(num_pages=PAGES)
PROMPTS = ((3, 1, 4, 1, 5, 9, 2, 6, 5), (2, 7), (3, 1, 4, 1, 5, 9, 2, 6, 5, 3))
ANSWER, DRAWS = 6, Sampler(temperature=1.0, top_p=0.9)


def state_of(prompts=PROMPTS, specs=(LOCAL, GLOBAL), state=STATE):
    """Some requests that wait: the last one draws by chance."""
    samplers = [*[Sampler()] * (len(prompts) - 1), DRAWS]
    new = [
        NewRequest(prompt, len(prompt) + ANSWER, sampler, jax.random.key(i), arrival=i)
        for i, (prompt, sampler) in enumerate(zip(prompts, samplers, strict=True))
    ]
    requests = Requests.init(SIZES).put(jnp.arange(len(new)), Requests.of(new, SIZES))
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


def test_a_state_that_cannot_be_written_down_is_refused_by_name():
    near = paged.Causal() & paged.Where(lambda p, j: p - j < 3)
    masked = state_of(specs=(LOCAL.replace(mask=near), GLOBAL))
    with pytest.raises(ValueError, match=r"GroupedPool.masks cannot be written down: the mask .* may be any function"):
        export.export(jax.jit(lambda pool: pool))(masked.queue.pool).serialize()
    with pytest.raises(ValueError, match=r"eqx.nn.State cannot be written down before"):
        export.export(jax.jit(lambda state: state))(eqx.nn.State(eqx.nn.StateIndex(jnp.zeros(1)))).serialize()
