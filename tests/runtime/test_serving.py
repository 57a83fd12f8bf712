"""The serve loop on the device: under every schedule the tokens of dense decoding, and nothing is traced twice."""

import asyncio
import itertools

import equinox as eqx
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged.runtime import Sampler
from paged.runtime.serving import Engine

from .tiny import VOCAB, greedy_ref, tiny

pytestmark = pytest.mark.kernels  # the loop compiles for seconds; its example runs with every test

NUM_PAGES, SLOTS, WIDTH = 10, 3, 40
MODEL, STATE = tiny(num_pages=NUM_PAGES)


def engine(steps=4, prefix_cache=True):
    state = jax.tree.map(jax.numpy.copy, STATE)
    sizes = {"num_slots": SLOTS, "max_tokens": WIDTH, "chunk_size": 5, "max_requests": 6, "max_biases": 2}
    return Engine(MODEL, state, **sizes, steps=steps, prefix_cache=prefix_cache, key=jax.random.key(7))


def run(served):
    return list(served.stream())


PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=14)
JOBS = st.lists(st.tuples(PROMPTS, st.integers(1, 12), st.integers(-1, 2), st.integers(0, 3)), min_size=1, max_size=8)


@settings(max_examples=12)
@given(JOBS, st.integers(0, 3))
def test_any_program_of_requests_gives_the_tokens_of_dense_decoding(jobs, cancels):
    """Fewer slots, pages and rows of the table than requests; some come late, and some are cancelled."""
    served = engine()
    handles = [served.submit(prompt, limit, priority=priority) for prompt, limit, priority, late in jobs if late == 0]
    waiting = [job for job in jobs if job[3]]
    told = {}
    while waiting or not served.is_idle:
        for event in served.stream():
            told.setdefault(event.request, []).extend(event.tokens)
            assert not event.finish_reason or event.request.is_done
            break
        if waiting:
            prompt, limit, priority, _ = waiting.pop()
            handles.append(served.submit(prompt, limit, priority=priority))
        if cancels and handles:
            cancels -= 1
            served.cancel(handles[cancels % len(handles)])
    for handle in handles:
        most = len(handle.tokens) if handle.finish_reason == "cancelled" else None
        want = greedy_ref(MODEL, list(handle.prompt), 12)
        assert tuple(handle.tokens) == want[: len(handle.tokens)] and most in (None, len(handle.tokens))
        assert told.get(handle, []) == handle.tokens
    assert {handle.finish_reason for handle in handles} <= {"length", "cancelled"}
    stats = served.stats()
    assert stats.pages_in_use == stats.pages_cached and stats.running == stats.waiting == 0 and stats.done == len(jobs)


def test_ends_and_stops_end_an_answer():
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    answer = greedy_ref(MODEL, prompt, 9)
    pairs = list(itertools.pairwise(answer))
    pair = next(i for i in range(1, 9) if pairs[i - 1] not in pairs[: i - 1])
    served = engine()
    ended = served.submit(prompt, 9, eos=[answer[3], (answer[3] + 1) % VOCAB])
    stopped = served.submit(prompt, 9, stop=[[answer[0]] * 2 + [answer[1]], answer[pair - 1 : pair + 1]])
    # The end of the prompt and the beginning of the answer are no stop.
    across = served.submit(prompt, 3, stop=[[prompt[-1], answer[0]]])
    run(served)
    assert ended.finish_reason == "eos" and tuple(ended.tokens) == answer[: answer.index(answer[3]) + 1]
    assert stopped.finish_reason == "stop" and tuple(stopped.tokens) == answer[: pair + 1]
    assert across.finish_reason == "length" and tuple(across.tokens) == answer[:3]


def test_drawn_tokens_depend_on_the_requests_key_alone():
    """Alone and among others; with filters, penalties and biases of its own."""
    rules = [
        Sampler(temperature=1.0),
        Sampler(temperature=2.0, top_k=4),
        Sampler(),
        Sampler(temperature=1.0, top_p=0.7),
    ]
    rules += [Sampler(temperature=1.5, repetition_penalty=1.5, presence_penalty=0.5, logit_bias={3: -np.inf})]
    keys = jax.random.split(jax.random.key(1), len(rules))
    jobs = [
        ([i, 7, 7 - i], 6, {"sampler": rule, "key": key}) for i, (rule, key) in enumerate(zip(rules, keys, strict=True))
    ]
    together = engine()
    handles = [together.submit(prompt, limit, **how) for prompt, limit, how in jobs]
    run(together)
    alone = engine()
    for handle, (prompt, limit, how) in zip(handles, jobs, strict=True):
        own = alone.submit(prompt, limit, **how)
        run(alone)
        assert own.tokens == handle.tokens
    assert 3 not in handles[-1].tokens


def test_larger_priorities_and_earlier_arrivals_are_admitted_first():
    served = engine(steps=1)
    handles = [served.submit([i] * 9, 3, priority=priority) for i, priority in enumerate([0, 0, 0, 0, 1, 2])]
    done = [event.request for event in served.stream() if event.finish_reason]
    assert set(done[:3]) == {handles[0], handles[4], handles[5]} and done.index(handles[1]) < done.index(handles[3])


def test_a_request_that_is_late_or_cancelled_frees_its_slot_and_pages():
    served = engine()
    late, cancelled = served.submit([1], 30, deadline=0.0), served.submit([2], 30)
    other = served.submit([3, 4], 5)
    served.cancel(cancelled)
    reasons = {event.request: event.finish_reason for event in served.stream() if event.finish_reason}
    assert reasons == {late: "deadline", cancelled: "cancelled", other: "length"}
    assert (
        tuple(other.tokens) == greedy_ref(MODEL, [3, 4], 5)
        and served.stats().pages_in_use == served.stats().pages_cached
    )


def test_events_come_to_tasks_too():
    async def collect():
        return [event async for event in served]

    served = engine()
    handle = served.submit([5, 6], 7)
    events = asyncio.run(collect())
    assert [token for event in events for token in event.tokens] == list(greedy_ref(MODEL, [5, 6], 7)) == handle.tokens


def test_a_request_that_fills_the_pool_finds_its_own_tokens_again():
    """All pages but none for a copy of the last one, of which it finds the first token."""
    served, prompt = engine(), [*range(30), 7, 7, 7, 7, 7, 7, 7, 7]
    for _ in range(2):
        handle = served.submit(prompt, WIDTH - len(prompt))
        list(itertools.islice(served.stream(), 9))  # a request that waits forever gives no events
        assert tuple(handle.tokens) == greedy_ref(MODEL, prompt, 2)
    assert served.stats().reused_tokens == 36


def test_other_weights_find_no_pages_of_those_before():
    served, prompt = engine(), [3, 1, 4, 1, 5, 9, 2, 6, 5]
    for _ in range(2):
        served.submit(prompt, 3)
        run(served)
    assert served.stats().reused_tokens >= 8
    running = served.submit(prompt, 12)
    next(served.stream())  # some tokens of the weights before
    begun = len(running.tokens)
    other = jax.tree.map(lambda x: x[::-1] if eqx.is_array(x) else x, MODEL)
    served.update_model(other)
    new = served.submit(prompt, 6)
    run(served)
    assert tuple(new.tokens) == greedy_ref(other, prompt, 6) != greedy_ref(MODEL, prompt, 6)
    assert begun and len(running.tokens) == 12 and running.finish_reason == "length"


def test_nothing_is_traced_after_the_first_requests_whatever_comes():
    served = engine()
    served.submit([1, 2], 3)
    run(served)
    traced = len(MODEL.traces)
    served.submit([1] * 14, 12, sampler=Sampler(temperature=1.0, top_p=0.5), eos=3, stop=[[1, 2]], priority=3)
    served.cancel(served.submit([4], 2))
    served.update_model(jax.tree.map(lambda x: x, MODEL))
    run(served)
    assert len(MODEL.traces) == traced
    assert "paged_new_tokens" in served.stats().prometheus()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda e: e.submit("hello"), TypeError, "prompt must be token ids; got 'hello', and .*tokenizer="),
        (lambda e: e.submit([]), ValueError, "prompt is empty"),
        (lambda e: e.submit([1, VOCAB]), ValueError, "prompt has the token 32, and the model knows 32"),
        (lambda e: e.submit([1], 0), ValueError, "max_new_tokens must be at least 1"),
        (lambda e: e.submit([1] * 33, 9), ValueError, "prompt has 33 tokens, and max_new_tokens is 9.*holds 40 tokens"),
        (lambda e: e.submit([1], 2, sampler=0.7), TypeError, "sampler must be a Sampler; got 0.7"),
        (lambda e: e.submit([1], 2, key=3), TypeError, "key must be one typed PRNG key"),
        (lambda e: e.submit([1], 2, eos="x"), TypeError, "eos must be a token id"),
        (lambda e: e.submit([1], 2, stop="x"), TypeError, "stop has the string 'x', and this engine has no tokenizer"),
        (lambda e: e.submit([1], 2, stop=3), TypeError, "stop must be a list of strings and sequences"),
        (lambda e: e.submit([1], 2, stop=[[]]), ValueError, r"stop\[0\] must have 1 to 8 tokens"),
        (lambda e: e.submit([1], 2, values={"n": 1}), ValueError, "values must be"),
        (lambda e: e.update_model(None), ValueError, "update_model needs a model of the same structure"),
    ],
)
def test_an_error_of_one_request_names_its_argument_and_the_others_go_on(call, error, text):
    served = engine()
    other = served.submit([1, 2], 3)
    with pytest.raises(error, match=text):
        call(served)
    run(served)
    assert tuple(other.tokens) == greedy_ref(MODEL, [1, 2], 3)


@pytest.mark.parametrize("prefix_cache", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_samples_of_a_prompt_share_its_pages_and_draw_as_if_alone(prefix_cache):
    """More samples than slots, under preemption, and when the first is cancelled."""
    served, prompt, rule = engine(prefix_cache=prefix_cache), [3, 1, 4, 1, 5, 9], Sampler(temperature=1.0)
    keys = jax.random.split(jax.random.key(5), 3)
    alone = [served.submit(prompt, 20, sampler=rule, key=jax.random.fold_in(keys[0], i)) for i in range(5)]
    alone += [served.submit(prompt, 20, sampler=rule, key=key) for key in keys]
    run(served)
    before = served.stats()
    samples = served.submit(prompt, 20, n=5, sampler=rule, key=keys[0])
    samples += served.submit(prompt, 20, n=3, sampler=rule, key=keys)
    run(served)
    assert [sample.tokens for sample in samples] == [own.tokens for own in alone]
    assert [sample.sample for sample in samples] == [0, 1, 2, 3, 4, 0, 1, 2]
    assert len({tuple(own.tokens) for own in alone}) > 5 and served.stats().preemptions > before.preemptions
    one, *others = served.submit(prompt, 20, n=3, sampler=rule, key=keys[0])
    next(served.stream())
    served.cancel(one)
    run(served)
    assert one.finish_reason == "cancelled" and [own.tokens for own in others] == [own.tokens for own in alone[1:3]]
    stats = served.stats()
    assert stats.pages_in_use == stats.pages_cached and stats.done == len(alone + samples) + 3


@pytest.mark.parametrize("prefix_cache", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("length", [3, 8, 14])
def test_a_prompt_of_several_samples_is_computed_once(length, prefix_cache):
    served, prompt = engine(prefix_cache=prefix_cache), [7, 7, 3, 1, 8, 2, 5, 5, 9, 3, 1, 4, 1, 5][:length]
    samples = served.submit(prompt, 2, n=3)
    run(served)
    stats = served.stats()
    assert [tuple(sample.tokens) for sample in samples] == [greedy_ref(MODEL, prompt, 2)] * 3
    assert (stats.prompt_tokens, stats.reused_tokens) == (length, 2 * (length - 1))
    # One of three writes on in the page that they share, which nobody else holds then.
    assert served.stats().copied_pages >= 2
    with pytest.raises(ValueError, match="key must be one typed PRNG key, or n = 2 of them"):
        served.submit(prompt, 2, n=2, key=jax.random.split(jax.random.key(0), 3))
    with pytest.raises(ValueError, match="n must be at least 1; got 0"):
        served.submit(prompt, 2, n=0)
