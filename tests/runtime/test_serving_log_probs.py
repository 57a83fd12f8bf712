"""Log-probabilities in the serve loop equal those of dense logits, under every schedule; nothing is traced for them."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged.runtime import ModelDraft, NGramDraft, Sampler
from paged.runtime.serving import Engine

from .tiny import VOCAB, tiny


class Table(eqx.Module):
    """Looks the logits of the next token up by the last one: it compiles at once, and has no pages."""

    logits: jax.Array
    traces: list = eqx.field(static=True)

    def __call__(self, tokens, batch, state):
        self.traces.append(tokens.shape[0])
        return self.logits[tokens], state

    def dense(self, tokens):
        return self.logits[tokens]


PAGED = tiny(num_pages=10)
TABLE = eqx.nn.make_with_state(Table)(2 * jax.random.normal(jax.random.key(2), (VOCAB, VOCAB)), PAGED[0].traces)
MODELS = {"table": TABLE, "paged": PAGED}
PROMPTS = [
    [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7],
    [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5],
    [7],
    [7, 8],
    [2, 7, 1, 8, 2, 8],
]


def engine(name, **options):
    model, state = MODELS[name]
    sizes = {"num_slots": 3, "max_tokens": 40, "chunk_size": 5, "max_requests": 6, "num_pages": 10, "page_size": 4}
    state = jax.tree.map(jnp.copy, state)
    return Engine(model, state, **sizes, steps=4, log_probs=3, key=jax.random.key(7), **options)


@functools.partial(jax.jit, static_argnums=0)
def dense(name, tokens):
    return jax.nn.log_softmax(MODELS[name][0].dense(tokens))


def dense_log_probs(name, tokens):
    """Of each next token, for every token of a sequence."""
    return np.asarray(dense(name, jnp.zeros(40, jnp.int32).at[: len(tokens)].set(jnp.asarray(tokens))))[: len(tokens)]


def require_right(name, handle, asked):
    known = [*handle.prompt, *handle.tokens]
    rows, prompt = dense_log_probs(name, known), len(handle.prompt)
    own = rows[np.arange(prompt - 1, len(known) - 1), handle.tokens]
    np.testing.assert_allclose(handle.log_probs, own, atol=2e-4)
    for row, tops in zip(rows[prompt - 1 :], handle.top_log_probs, strict=False):
        assert len(tops) == asked and list(tops.values()) == sorted(tops.values(), reverse=True)
        np.testing.assert_allclose([row[token] for token in tops], list(tops.values()), atol=2e-4)
        np.testing.assert_allclose(list(tops.values()), np.sort(row)[::-1][:asked], atol=2e-4)
    assert len(handle.top_log_probs) == len(handle.log_probs) == len(handle.tokens)
    if handle.prompt_log_probs is not None:
        assert handle.prompt_log_probs[0] is None and len(handle.prompt_log_probs) == prompt
        want = rows[np.arange(prompt - 1), known[1:prompt]]
        np.testing.assert_allclose(np.array(handle.prompt_log_probs[1:], float), want, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "speculation"),
    [
        pytest.param("table", None, marks=pytest.mark.kernels, id="table"),
        pytest.param("paged", None, marks=pytest.mark.slow, id="paged"),
        pytest.param("paged", NGramDraft(3), marks=pytest.mark.slow, id="paged-ngram"),
    ],
)
def test_log_probabilities_are_those_of_dense_logits_under_every_schedule(name, speculation):
    """In chunks, with hits in the prefix cache, under preemption; of drawn tokens, of the likeliest, of prompts."""
    served, traces = engine(name, speculation=speculation), PAGED[0].traces
    seconds = served.warmup(progress=False)
    traced, events = len(traces), []
    for _ in range(2):  # the second time all is in the cache
        how = [
            {"log_probs": k, "prompt_log_probs": ask}
            for k, ask in ((0, True), (3, False), (1, True), (2, True), (3, True))
        ]
        rule = Sampler(temperature=1.5, repetition_penalty=1.3)
        handles = [served.submit(prompt, 12, sampler=rule, **own) for prompt, own in zip(PROMPTS, how, strict=True)]
        silent = served.submit(PROMPTS[0], 3)
        events += served.stream()
        for handle, own in zip(handles, how, strict=True):
            require_right(name, handle, own["log_probs"])
        assert silent.log_probs == silent.top_log_probs == [] and silent.prompt_log_probs is None
    of_last = [event for event in events if event.request is handles[1]]
    assert [x for event in of_last for x in event.log_probs] == handles[1].log_probs
    assert [x for event in of_last for x in event.top_log_probs] == handles[1].top_log_probs
    stats = served.stats()
    assert stats.preemptions > 0 and (stats.reused_tokens > 0) == (name == "paged")
    assert seconds > 0 and len(traces) == traced


@pytest.mark.kernels
def test_samples_have_the_log_probabilities_of_their_prompt_in_common():
    served = engine("table")
    samples = served.submit(PROMPTS[0], 8, n=4, sampler=Sampler(temperature=1.0), log_probs=1, prompt_log_probs=True)
    list(served.stream())
    for sample in samples:
        require_right("table", sample, 1)
    assert len({tuple(sample.tokens) for sample in samples}) > 1 and served.stats().reused_tokens >= 2 * 13


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ngram", "same", "other"])
def test_accepted_drafts_have_their_own_log_probabilities(kind):
    """With samples of one prompt, stops within accepted tokens, and log-probabilities of the prompt."""
    model, state = TABLE
    other = eqx.tree_at(lambda model: model.logits, model, jnp.roll(model.logits, 1, axis=0))
    drafts = {"same": ModelDraft(model, state, 3), "other": ModelDraft(other, state, 3)}
    served, alone = engine("table", speculation=drafts.get(kind, NGramDraft(3, ngram=1))), engine("table")
    rule, rounds = Sampler(temperature=0.7), []
    for each in (served, alone):

        def ask(i, each=each, **how):
            return each.submit(PROMPTS[i], 20, sampler=rule, key=jax.random.key(i), **how)

        handles = [ask(i, log_probs=2, prompt_log_probs=True) for i in range(len(PROMPTS))]
        handles += ask(0, n=3, log_probs=1)
        list(each.stream())
        stopped = [ask(i, stop=[handles[i].tokens[3 + i : 5 + i]], log_probs=0) for i in range(len(PROMPTS))]
        list(each.stream())
        assert all(handle.finish_reason == "stop" and len(handle.tokens) < 11 for handle in stopped)
        rounds.append(handles + stopped)
    for handle, want in zip(*rounds, strict=True):
        assert (handle.tokens, handle.finish_reason) == (want.tokens, want.finish_reason)
        require_right("table", handle, handle.num_log_probs)
    assert served.stats().drafted_tokens > 0 and (kind != "same" or served.stats().accepted_tokens > 40)
