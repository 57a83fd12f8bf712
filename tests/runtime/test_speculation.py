"""Speculation in the serve loop: the tokens of a loop without it in fewer steps, and no trace of what was rejected."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paged
from paged.lower import Call
from paged.runtime import Engine, ModelDraft, NGramDraft, PagePool, Sampler, generate
from paged.runtime.serving import NewRequest, Requests, Sizes, serve_step
from paged.spec import Causal, GroupedBatch, Prefix, Window

from .tiny import VOCAB, greedy_ref, tiny, two_layers


class Checking(eqx.Module):
    """A model whose layers check every batch: the loop marks its batches as checked, and they must be sound."""

    model: eqx.Module

    def __call__(self, tokens, batch, state):
        own = lambda batch: dataclasses.replace(batch, checked_for=None)
        batch = GroupedBatch(map(own, batch.batches), batch.masks) if isinstance(batch, GroupedBatch) else own(batch)
        return self.model(tokens, batch, state)


TINY, STATE = tiny(num_pages=30)
PAGED = Checking(TINY), STATE


class Table(eqx.Module):
    """A model that looks the logits of the next token up by the last one: it compiles at once, and has no pages."""

    logits: jax.Array
    traces: list = eqx.field(static=True)

    def __call__(self, tokens, batch, state):
        self.traces.append(tokens.shape[0])
        return self.logits[tokens], state


def table(seed, vocab=VOCAB):
    logits = 2 * jax.random.normal(jax.random.key(seed), (vocab, vocab))
    return eqx.nn.make_with_state(Table)(logits, TINY.traces)


MODELS = {"table": table(0), "paged": PAGED}
RULES = [
    Sampler(),
    Sampler(temperature=1.0),
    Sampler(temperature=0.7, top_p=0.8, repetition_penalty=3.0),
    Sampler(temperature=1.5, top_k=9, presence_penalty=9.0, logit_bias={3: -np.inf}),
    Sampler(repetition_penalty=1.4),
]


class Opposite(eqx.Module):
    """A draft model that never draws what its model does: its likeliest token is the least likely one."""

    model: eqx.Module

    def __call__(self, tokens, batch, state):
        logits, state = self.model(tokens, batch, state)
        return -logits, state


def drafts_of(kind, model, state):
    if kind == "none":
        return None
    if kind == "ngram":
        return NGramDraft(num_tokens=3)
    if kind == "other groups":  # its window is no mask of the served model
        return ModelDraft(*_copied(two_layers(Causal() & Window(3))), num_tokens=2)
    return ModelDraft({"same": model, "opposite": Opposite(model)}[kind], _copied(state), num_tokens=3)


def _copied(x):
    return jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, x)


@functools.cache
def engine(name, kind, num_pages=10):
    """One for all tests: what a test before has left in the prefix cache must not matter."""
    model, state = MODELS[name]
    sizes = {"num_slots": 3, "max_tokens": 40, "chunk_size": 5, "max_requests": 6, "max_biases": 2, "steps": 4}
    sizes |= {"num_pages": num_pages, "page_size": 4, "speculation": drafts_of(kind, model, state)}
    return Engine(model, _copied(state), **sizes)


def of_models(*kinds):
    """The served model and where drafts come from. What compiles for long runs with the slow tests."""
    quick = [("table", kind) for kind in kinds if kind in ("ngram", "same")]
    slow = [("table", kind) for kind in kinds if kind == "opposite"] + [("paged", kind) for kind in kinds]
    marks = {True: pytest.mark.kernels, False: pytest.mark.slow}
    rows = [pytest.param(*pair, marks=marks[pair in quick], id="-".join(pair)) for pair in quick + slow]
    return pytest.mark.parametrize(("name", "kind"), rows)


def run(served, jobs):
    """What became of each request, and what the engine's figures grew by."""
    before = served.stats()
    handles = [served.submit(prompt, most, key=jax.random.key(i), **how) for i, (prompt, most, how) in enumerate(jobs)]
    list(served.stream())
    after = served.stats()
    assert after.pages_in_use == after.pages_cached
    names = ("steps", "new_tokens", "drafted_tokens", "accepted_tokens", "reused_tokens", "preemptions")
    return handles, {name: getattr(after, name) - getattr(before, name) for name in names}


def told(handles):
    return [(handle.tokens, handle.finish_reason) for handle in handles]


TOKENS = st.integers(0, VOCAB - 1)
# Some repeat themselves, and some begin like another one.
PROMPTS = st.one_of(
    st.lists(TOKENS, min_size=1, max_size=14),
    st.builds(lambda n: [7, 8, 9, 7, 8, 9, 7, 8, 9, 7, 8, 9, 7, 8][:n], st.integers(1, 14)),
)
HOW = st.fixed_dictionaries(
    {"sampler": st.sampled_from(RULES), "priority": st.integers(0, 2)},
    optional={
        "eos": st.lists(TOKENS, max_size=3),
        "stop": st.lists(st.lists(TOKENS, min_size=1, max_size=2), max_size=2),
    },
)
JOBS = st.lists(st.tuples(PROMPTS, st.integers(1, 16), HOW), min_size=1, max_size=8)


def _equal_to_none(name, kind, jobs):
    handles, figures = run(engine(name, kind), jobs)
    want, _ = run(engine(name, "none"), jobs)
    assert told(handles) == told(want)
    assert sum(h.drafted for h in handles) == figures["drafted_tokens"] >= figures["accepted_tokens"]
    assert sum(h.accepted for h in handles) == figures["accepted_tokens"]
    return figures


@of_models("ngram", "same", "opposite", "other groups")
@settings(max_examples=25)
@given(jobs=JOBS)
def test_any_requests_get_the_tokens_that_they_get_without_drafts(name, kind, jobs):
    """Greedy and by chance, with penalties, ends within accepted tokens, preemptions and hits in the prefix cache."""
    _equal_to_none(name, kind, jobs)


@of_models("same")
def test_an_answer_ends_with_any_of_the_tokens_that_one_step_accepts(name, kind):
    """By its length, an end and a stop, at every place of a step's tokens."""
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    (answer,), _ = run(engine(name, "none"), [(prompt, 12, {})])
    jobs = [(prompt, most, {}) for most in range(1, 10)]
    jobs += [(prompt, 12, {"eos": [answer.tokens[i]]}) for i in range(10)]
    jobs += [(prompt, 12, {"stop": [answer.tokens[i : i + 2]]}) for i in range(9)]
    assert _equal_to_none(name, kind, jobs)["accepted_tokens"] > len(jobs)


@of_models("same")
def test_a_draft_model_equal_to_the_model_has_all_its_drafts_accepted(name, kind):
    """Greedy and by chance, also where its pages come from the prefix cache, some of them to be copied first."""
    served, prompt = engine(name, kind, num_pages=30), [3, 1, 4, 1, 5, 9, 2, 6, 5]
    for prompts in ([prompt] * 3, [[*prompt, 7], [*prompt[:7], 8, 8], prompt], [prompt] * 5):
        jobs = [(own, 13, {"sampler": rule}) for own, rule in zip(prompts, RULES, strict=False)]
        handles, figures = run(served, jobs)
        # One token after the prompt, and three times three drafts and one more; a few less beside a prompt's rows.
        assert all(7 <= handle.accepted == handle.drafted <= 9 for handle in handles)
    assert figures["new_tokens"] == 5 * 13 and (name == "table" or figures["reused_tokens"] >= 5 * 8)


@of_models("opposite")
def test_drafts_that_are_all_rejected_cost_no_step(name, kind):
    jobs = [([5, i], 9, {}) for i in range(3)]  # all prompts in one step, also with fewer rows for them
    handles, figures = run(engine(name, kind, num_pages=30), jobs)
    want, without = run(engine(name, "none", num_pages=30), jobs)
    assert told(handles) == told(want) and figures["steps"] == without["steps"]
    assert figures["accepted_tokens"] == 0 and figures["drafted_tokens"] >= 3 * 18


@of_models("ngram", "same")
def test_nothing_is_traced_after_the_first_requests_with_drafts(name, kind):
    served, traces = engine(name, kind), TINY.traces
    run(served, [([1, 2], 3, {})])
    traced = len(traces)
    run(served, [([1, 2] * 7, 16, {"sampler": RULES[2]}), ([4], 9, {"stop": [[1, 2]]}), ([4] * 9, 2, {})])
    assert len(traces) == traced
    assert "paged_accepted_tokens" in served.stats().prometheus()


@of_models("same")
def test_a_draft_model_gets_other_weights_without_another_trace(name, kind):
    served, job = engine(name, kind, num_pages=30), ([3, 1, 4], 13, {})
    own = served._device.model
    other = jax.tree.map(lambda x: -x if eqx.is_array(x) else x, own)
    (before,), _ = run(served, [job])
    traced = len(TINY.traces)
    try:
        served.update_model(other, other)
        (handle,), figures = run(served, [job])
        assert handle.tokens != before.tokens and figures["accepted_tokens"] == figures["drafted_tokens"] >= 7
        served.update_model(own)
        (handle,), figures = run(served, [job])
        assert handle.tokens == before.tokens and figures["accepted_tokens"] < figures["drafted_tokens"]
    finally:
        served.update_model(own, own)
    (handle,), figures = run(served, [job])
    assert handle.tokens == before.tokens and figures["accepted_tokens"] == figures["drafted_tokens"] >= 7
    assert len(TINY.traces) == traced


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ngram", "same", "opposite", "other groups"])
def test_generate_gives_the_tokens_of_generate_without_drafts(kind):
    """Twice with one draft model: what `generate` takes of its state must be a copy."""
    model, state = PAGED
    prompts = [[1, 2, 3, 1, 2, 3, 1], [4, 5, 4, 5, 4, 5], [6]]
    how = {"max_new_tokens": 12, "num_slots": 3, "num_pages": 12, "page_size": 4, "chunk_size": 5, "n": 2}
    how |= {"sampler": Sampler(temperature=0.8), "key": jax.random.key(4), "eos": 3}
    want, steps = _generated(model, _copied(state), prompts, False, **how)
    drafts = drafts_of(kind, model, state)
    for donate_state in (False, True):
        got, own = _generated(model, _copied(state), prompts, donate_state, **how, speculation=drafts)
        assert [(one.tokens, one.finish_reason) for one in got] == [(one.tokens, one.finish_reason) for one in want]
        assert kind != "same" or own < steps


def _generated(model, state, prompts, donate_state, **how):
    """The answers, and the steps that they took."""
    reports = []
    told = generate(model, state, prompts, **how, donate_state=donate_state, on_step=reports.append)
    return told[0] if donate_state else told, len(reports)


@pytest.mark.slow
def test_drafts_follow_a_prompt_that_a_mask_sees_whole():
    model, state = two_layers(Causal() | Prefix(6))
    options = {"num_slots": 2, "max_tokens": 40, "chunk_size": 8, "max_requests": 4}
    served = Engine(model, _copied(state), **options, speculation=NGramDraft(num_tokens=3, ngram=1))
    prompts = [[1, 2, 3, 1, 2, 3, 1], [4, 5, 4, 5, 4, 5]]
    handles, figures = run(served, [(prompt, 24, {}) for prompt in prompts])
    assert [tuple(handle.tokens) for handle in handles] == [greedy_ref(model, prompt, 24) for prompt in prompts]
    assert figures["drafted_tokens"] > 0


def ngram_ref(known, num_tokens, ngram, min_ngram):
    """The drafts by the rule as it is written: the longest match, of these the latest."""
    for n in range(ngram, min_ngram - 1, -1):
        for end in range(len(known) - 1, n - 1, -1):
            if known[end - n : end] == known[len(known) - n :]:
                more = list(known)
                for _ in range(num_tokens):
                    more.append(more[end + len(more) - len(known)])
                return more[len(known) :]
    return []


@pytest.mark.parametrize("rule", [(4, 3, 1), (2, 2, 2), (5, 1, 1)])
def test_a_sequences_own_tokens_propose_what_followed_its_last_ones(rule):
    draft, rng = NGramDraft(*rule), np.random.default_rng(0)
    lists = [rng.integers(0, 3, rng.integers(1, 13)).tolist() for _ in range(200)]
    rows = Requests.of([NewRequest(tuple(known), 20, Sampler(), jax.random.key(0)) for known in lists], Sizes(200, 12))
    tokens, is_found = jax.jit(draft.propose)(rows)
    for known, own, has_any in zip(lists, tokens.tolist(), is_found.tolist(), strict=True):
        assert (own if has_any else []) == ngram_ref(known, *rule), known


def test_kernels_for_decoding_take_a_step_that_verifies():
    spec = paged.AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=128)
    layout = paged.PageLayout(page_size=16, num_kv_heads=2, head_dim=128, dtype=jnp.bfloat16)
    pool, _ = PagePool.init(num_pages=8, num_slots=2, pages_per_seq=4, page_size=16).extend(jnp.array([20, 9]))
    batch = pool.decode_batch(jnp.array([True, False]), query_rows=5)
    assert batch.lengths.tolist() == [20, 0] and batch.query_starts.tolist() == [0, 5, 10]
    q = jax.ShapeDtypeStruct((10, 8, 128), jnp.bfloat16)
    attend = paged.lower(spec, layout, target="tpu").on_chip("v5e")
    _, schedule, _ = attend.choice(Call.of(q, layout.init(8), batch))
    assert isinstance(schedule, paged.DecodeSchedule)


def _engine(speculation, served=None):
    model, state = served or table(0)
    sizes = {"num_slots": 2, "max_tokens": 20, "num_pages": 30, "page_size": 4}
    return Engine(model, _copied(state), **sizes, speculation=speculation)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: NGramDraft(num_tokens=0), ValueError, "num_tokens must be at least 1; got 0"),
        (lambda: NGramDraft(ngram=2, min_ngram=3), ValueError, "min_ngram must be at most ngram=2; got 3"),
        (lambda: NGramDraft(ngram=2.5), TypeError, "ngram must be an int; got 2.5"),
        (lambda: _engine("ngram"), TypeError, "speculation must be an NGramDraft or a ModelDraft; got 'ngram'"),
        (lambda: _engine(ModelDraft(PAGED[0], None)), TypeError, "ModelDraft needs the draft model's state.*got None"),
        (
            lambda: Engine(*PAGED, num_slots=2, max_tokens=20, speculation=ModelDraft(*PAGED)),
            ValueError,
            "ModelDraft needs a state of its own",
        ),
        (
            lambda: _engine(ModelDraft(*tiny(num_pages=8)), served=PAGED),
            ValueError,
            "has num_pages=30 of page_size=4.*the state has a layer with 8 pages of 4",
        ),
        (
            lambda: _engine(NGramDraft(), served=eqx.nn.make_with_state(Recurrent)()),
            ValueError,
            "state holds pages alone, and the model's state holds other arrays",
        ),
        (
            lambda: _engine(ModelDraft(*table(0, 4)), served=table(0, 5)),
            ValueError,
            "that one has 5 logits, and the draft model 4",
        ),
        (
            lambda: _engine(NGramDraft()).update_model(table(0)[0], table(0)[0]),
            ValueError,
            "draft_model is for an engine whose speculation is a ModelDraft",
        ),
        (
            lambda: _engine(ModelDraft(*table(1))).update_model(table(0)[0], table(0, 5)[0]),
            ValueError,
            "update_model needs a draft_model of the same structure",
        ),
        (
            lambda: serve_step(None, _engine(None)._device.state, budget=9, speculation=NGramDraft(4)),
            ValueError,
            "budget must be at least 10, a row for each slot and each of its drafts; got 9",
        ),
    ],
)
def test_what_cannot_be_speculated_with_is_refused_by_name(call, error, text):
    with pytest.raises(error, match=text):
        call()


class Recurrent(eqx.Module):
    """A model whose state is no page."""

    index: eqx.nn.StateIndex

    def __init__(self):
        self.index = eqx.nn.StateIndex(jnp.zeros(2))

    def __call__(self, tokens, batch, state):
        return jax.nn.one_hot(tokens, 5), state.set(self.index, state.get(self.index) + 1)
