"""The host's side of `Engine`: text, stop strings, exceptions, transfers, figures. Its model counts on by bytes."""

import logging
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged.runtime import Sampler
from paged.runtime.serving import Engine, device
from paged.runtime.serving.texts import AnswerText

VOCAB = 256


class Counter(eqx.Module):
    """The next token is the token plus one; after 126 there are no logits."""

    traces: list = eqx.field(static=True)
    step: jax.Array

    def __call__(self, tokens, batch, state):
        self.traces.append(tokens.shape[0])
        logits = 9.0 * jax.nn.one_hot((tokens + self.step) % VOCAB, VOCAB)
        return jnp.where(tokens[:, None] == 126, jnp.nan, logits), state


class _Traces(list):
    def __hash__(self):
        return id(self)

    def __eq__(self, other):
        return self is other


class Ascii:
    """One token for each character; others than ASCII have no text."""

    eos_ids = frozenset({ord("z")})

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        if 125 in ids:
            raise LookupError("no text of 125")
        return bytes(ids).decode()


MODEL = Counter(_Traces(), jnp.ones((), jnp.int32))


def engine(steps=4, tokenizer=True, model=MODEL, **options):
    _, state = eqx.nn.make_with_state(lambda: MODEL)()
    options = {"num_slots": 3, "max_tokens": 96, "num_pages": 24, "page_size": 8, "max_requests": 6, **options}
    tokenizer = Ascii() if tokenizer else None
    options |= {} if steps is None else {"steps": steps}
    return Engine(model, state, chunk_size=6, max_biases=2, tokenizer=tokenizer, **options)


def run(served):
    return list(served.stream())


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(st.text("abc", max_size=14), STOPS)
def test_text_ends_before_the_first_stop_string_and_nothing_of_it_is_given_out(text, stops):
    ends = [place + 1 for place in range(len(text)) if any(text[: place + 1].endswith(stop) for stop in stops)]
    longest = max((len(stop) for stop in stops if ends and text[: ends[0]].endswith(stop)), default=0)
    want = text[: ends[0] - longest] if ends else text
    reader, out = AnswerText(lambda ids: bytes(ids).decode(), stops), ""
    for place, character in enumerate(text.encode()):
        out += reader.push(character)
        assert want.startswith(out)
        # What no stop string may begin with is not held back.
        held = text[len(out) : place + 1]
        assert reader.is_stopped or not held or any(stop.startswith(held) for stop in stops)
        assert reader.is_stopped == (bool(ends) and place + 1 >= ends[0])
    assert out + reader.finish() == want


@pytest.mark.kernels
def test_strings_go_in_and_text_comes_out_up_to_a_stop_string():
    served = engine()
    one = served.submit("a", 40, stop=["ij", "jk", "k"])
    held = served.submit([97], 3, stop="dx")
    of_ids = served.submit("xa", 40, stop=["??", [101, 102]])
    ended = served.submit("u", 40)
    own_end = served.submit("u", 7, eos=())
    events = run(served)
    assert (one.text, one.tokens, one.finish_reason) == ("bcdefgh", list(b"bcdefghij"), "stop")
    assert (held.text, held.finish_reason) == ("bcd", "length")
    assert (of_ids.text, of_ids.finish_reason) == ("bcdef", "stop")
    assert (ended.text, ended.finish_reason) == ("vwxyz", "eos") and own_end.text == "vwxyz{|"
    for handle in (one, held, of_ids, ended, own_end):
        own = [event for event in events if event.request is handle]
        assert "".join(event.text for event in own) == handle.text and len(own) > len(handle.tokens) // 4 - 1
        assert [token for event in own for token in event.tokens] == handle.tokens
        assert [event.finish_reason for event in own[:-1]] == [None] * (len(own) - 1)
    assert served.stats().pages_in_use == served.stats().pages_cached  # the stopped one ended on the device too
    cut = served.submit("a", 40, stop=["bcdefghijkl!"])
    next(served.stream())
    served.cancel(cut)
    run(served)
    assert cut.text == bytes(cut.tokens).decode() != ""  # what was held back is the text's too


@pytest.mark.kernels
def test_logits_that_are_no_numbers_and_text_that_is_none_end_one_request():
    served = engine(prefix_cache=False)
    no_text, other = served.submit("xx", 40, eos=()), served.submit("A", 40, eos=())
    run(served)
    assert no_text.finish_reason == "error" and isinstance(no_text.error, LookupError) and no_text.text == "yz{|"
    assert other.finish_reason == "length" and len(other.text) == 40
    served = engine(tokenizer=False, prefix_cache=False)
    no_token, other = served.submit([120], 40), served.submit([65], 40)
    run(served)
    assert (no_token.tokens, no_token.finish_reason) == ([121, 122, 123, 124, 125, 126], "no_token")
    assert len(other.tokens) == 40 and other.text == ""


def test_what_no_tokenizer_knows_is_refused():
    with pytest.raises(TypeError, match=r"tokenizer must have the methods encode\(text\) and decode\(ids\).*got int"):
        Engine(MODEL, None, num_slots=1, max_tokens=8, tokenizer=3)


class Failing(eqx.Module):
    """A model that raises on the device, in the steps whose numbers it is told."""

    model: Counter
    steps: tuple[int, ...] = eqx.field(static=True)
    counted: list = eqx.field(static=True)

    def __call__(self, tokens, batch, state):
        def raising(x):
            self.counted.append(None)
            if len(self.counted) in self.steps:
                raise FloatingPointError("of the model, on the device")
            return x

        tokens = jax.pure_callback(raising, jax.ShapeDtypeStruct(tokens.shape, tokens.dtype), tokens)
        return self.model(tokens, batch, state)


def _served_after_exceptions(served, submitted, errors):
    """The handles when all is served, although some calls raise."""
    handles, raised = submitted(served), 0
    while not served.is_idle:
        try:
            run(served)
        except errors:
            raised += 1
    return handles, raised


@pytest.mark.kernels
def test_a_state_that_an_exception_has_cost_is_made_anew_and_requests_go_on_with_their_tokens(monkeypatch):
    """On the device, in a step of the model, and on the host, when a launch has the state's memory already."""

    def submitted(served):
        rule = {"sampler": Sampler(temperature=3.0, repetition_penalty=1.2), "log_probs": 1}
        handles = [*served.submit("abcd", 9, n=2, **rule), served.submit("a", 30, stop=["lm"], prompt_log_probs=True)]
        handles += [served.submit("x", 40, eos=()), served.submit("b" * 20, 3), served.submit("q", 8, log_probs=0)]
        cancelled = served.submit("c", 60)
        served.cancel(cancelled)
        return [*handles, cancelled]

    def told(handles):
        return [
            (one.tokens, one.text, one.finish_reason, one.prompt_log_probs and np.round(one.prompt_log_probs[1:], 4))
            for one in handles
        ]

    want, _ = _served_after_exceptions(engine(log_probs=1), submitted, ())
    failing = engine(log_probs=1, model=Failing(MODEL, (3, 11, 12, 20), _Traces()), record=True)
    # By JAX a `ValueError` where the launch fails before the call that begins it has returned.
    handles, raised = _served_after_exceptions(failing, submitted, (jax.errors.JaxRuntimeError, ValueError))
    assert 2 <= raised <= 4
    served, serve, calls = engine(log_probs=1), device.programs.serve, []

    def interrupted(*args):
        calls.append(None)
        if len(calls) in (2, 5):
            serve(*args)
            raise KeyboardInterrupt
        return serve(*args)

    monkeypatch.setattr(device.programs, "serve", interrupted)
    others, times = _served_after_exceptions(served, submitted, KeyboardInterrupt)
    assert times == 2
    for own, stats in ((handles, failing.stats()), (others, served.stats())):
        np.testing.assert_equal(told(own), told(want))
        for one, other in zip(own, want, strict=True):
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-6)
        assert stats.done == len(want) and stats.pages_in_use == stats.pages_cached
        assert stats.new_tokens >= sum(len(one.tokens) for one in want) and stats.running == stats.waiting == 0
    more = failing.submit("a", 3)
    run(failing)
    assert more.text == "bcd"


@pytest.mark.kernels
def test_an_exception_before_a_launch_or_of_who_reads_the_events_costs_nothing(monkeypatch):
    served, serve, calls = engine(), device.programs.serve, []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return serve(*args)

    monkeypatch.setattr(device.programs, "serve", interrupted)
    handle = served.submit("a", 12)
    with pytest.raises(KeyboardInterrupt):
        run(served)
    with pytest.raises(ZeroDivisionError):
        for _ in served.stream():
            raise ZeroDivisionError  # of whoever reads the events
    run(served)
    assert handle.text == "bcdefghijklm" and served.stats().steps == 12  # nothing is computed twice


@pytest.mark.kernels
def test_one_launch_is_one_read_and_one_upload_one_transfer(monkeypatch):
    reads, puts, outside = [], [], []
    served = engine(steps=None, prefix_cache=False)
    served.warmup(progress=False)
    arrays, get, asarray = type(jnp.zeros(())), jax.device_get, jnp.asarray
    value = arrays._value

    def counted(x):
        reads.append(x)
        with monkeypatch.context() as patch:
            patch.setattr(arrays, "_value", value)
            return get(x)

    monkeypatch.setattr(arrays, "_value", property(lambda x: outside.append(x) or value.fget(x)))
    monkeypatch.setattr(jax, "device_get", counted)
    monkeypatch.setattr(jnp, "asarray", lambda *args: puts.append(args) or asarray(*args))
    handles = [served.submit([i, 1], 60, sampler=Sampler(temperature=1e-9), eos=()) for i in range(3)]
    short = served.stats().launches
    for _ in served.stream():
        if all(handle.tokens for handle in handles):
            break
    short, begun = served.stats().launches - short, len(handles[0].tokens)
    assert begun == 4 and short in (1, 2)  # one whose tokens are told, and perhaps one that was given to the device
    reads.clear()
    run(served)
    assert [handle.tokens[-1] for handle in handles] == [61] * 3 and not outside and len(puts) == 1
    assert len(reads) == math.ceil((60 - 4) / 32) + (short == 2)  # the last finds nothing to do


@pytest.mark.kernels
def test_on_a_cpu_what_a_launch_has_drawn_is_told_before_the_next_one(monkeypatch):
    serve = device.programs.serve
    monkeypatch.setattr(device.programs, "serve", lambda *args: jax.block_until_ready(serve(*args)))
    served = engine()
    served.submit("a", 12)
    assert [served.stats().launches for _ in served.stream()] == [1, 2, 3, 4]


@pytest.mark.kernels
def test_nothing_compiles_after_the_warmup_whatever_comes(caplog):
    served = engine()
    assert served.stats().compile_seconds is None
    assert served.warmup() == served.stats().compile_seconds > 0 and served.is_idle
    traced, key = len(MODEL.traces), jax.random.key(3)
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        served.submit("a", 3, n=3, sampler=Sampler(temperature=2.0, top_p=0.5, logit_bias={3: 1.0}), key=key)
        served.submit("pq", 9, stop=["rs", [115]], priority=3, deadline=9.0, salt=3)
        served.cancel(served.submit("abcdefghijkl", 9))
        served.update_model(MODEL)
        run(served)
        stats = served.stats()
    assert len(MODEL.traces) == traced and not [r for r in caplog.records if "ompiling" in r.getMessage()]
    assert stats.done == 5 and stats.hit_rate is not None and stats.seconds_to_first_token.p50 > 0
    text = stats.prometheus()
    assert 'paged_seconds_to_first_token{quantile="0.5"} ' in text and "\npaged_done 5\n" in text
    assert "# TYPE paged_hit_rate gauge" in text and "None" not in text


@pytest.mark.kernels
def test_quantiles_of_nothing_are_none():
    stats = engine().stats()
    assert stats.hit_rate is stats.seconds_per_token is None and "per_token" not in stats.prometheus()
    assert np.all(np.isfinite([stats.done, stats.pages]))


@pytest.mark.kernels
def test_more_than_an_engine_tells_is_refused_with_what_would_do():
    served, without = engine(log_probs=3), engine()
    with pytest.raises(ValueError, match="log_probs=4 is more than this engine tells: make it with log_probs=4"):
        served.submit([1], 2, log_probs=4)
    with pytest.raises(TypeError, match="prompt_log_probs must be True or False; got 1"):
        served.submit([1], 2, prompt_log_probs=1)
    with pytest.raises(ValueError, match=f"log_probs must be at most {VOCAB}"):
        engine(log_probs=VOCAB + 1)
    with pytest.raises(ValueError, match=r"log_probs=2 needs an engine that tells.*make it with log_probs=2"):
        without.submit([1], 2, log_probs=2)
    with pytest.raises(ValueError, match=r"prompt_log_probs=True needs an engine .*make it with log_probs=0"):
        without.submit([1], 2, prompt_log_probs=True)
