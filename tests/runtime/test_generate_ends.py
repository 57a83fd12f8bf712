"""`generate` at its ends: masks that see ahead, logits without a token, exceptions, donated states, traces."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import paged
from paged.runtime import PartialGenerations, generate
from paged.runtime._masks import specs_of
from paged.spec import Causal, Chunk, Everything, Prefix, Where, Window

from .tiny import LAYOUT, VOCAB, greedy_ref, two_layers

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def serve(mask, chunk_size, prompts=(PROMPT,), max_new_tokens=4, **options):
    options = {"num_slots": 2, "pages_per_seq": 4, **options}
    return generate(*two_layers(mask), prompts, max_new_tokens=max_new_tokens, chunk_size=chunk_size, **options)


PREFIX = Causal() | Prefix(6)
SPANS = Causal() | paged.Spans(paged.Value("starts", 2), paged.Value("ends", 2))


@pytest.mark.kernels
def test_a_prompt_is_served_in_chunks_that_no_row_sees_past():
    """Under preemption too: what was drawn is prefilled again in chunks."""
    model, _ = two_layers(PREFIX)
    prompts = [PROMPT, PROMPT[:7]]
    expected = [greedy_ref(model, prompt, 6) for prompt in prompts]
    for num_pages in (16, 5):
        results = serve(PREFIX, 6, prompts, max_new_tokens=6, num_pages=num_pages)
        assert [result.tokens for result in results] == expected
    assert sum(result.preemptions for result in results) > 0


CUT = r"chunk_size={} cuts prompts\[0\] after {} tokens, and the mask .* of a layer sees ahead: token {} sees token {},"
REFUSED = [
    (PREFIX, 4, CUT.format(4, 4, 0, 4) + ".*Pass chunk_size=6"),
    (PREFIX, 1, CUT.format(1, 1, 0, 1) + ".*Pass chunk_size=6"),
    (Causal() | (Chunk(4) & ~Prefix(4) & Prefix(8)), 3, CUT.format(3, 7, 4, 7) + ".*Pass chunk_size=4"),
    (Where(lambda p, j: j <= p + (p == 7)), 1, CUT.format(1, 8, 7, 8) + ".*Pass chunk_size=2"),
    (Everything(), 4, r"token 0 sees token 11, which is generated"),  # no chunk_size would do
    (Everything(), 16, r"token 0 sees token 11, which is generated .*max_new_tokens=1"),
    (Window(2), 16, r"token 0 sees token 11, which is generated"),
    (Causal() | Prefix(12), 16, r"prompts\[0\] has 11 tokens.*token 0 sees token 11, which is generated"),
    (Chunk(4), 4, r"token 8 sees token 11, which is generated"),
]


@pytest.mark.parametrize(("mask", "chunk_size", "text"), REFUSED, ids=[str(mask) for mask, _, _ in REFUSED])
def test_a_chunk_that_a_row_sees_past_is_refused(mask, chunk_size, text, monkeypatch):
    monkeypatch.setattr("paged.runtime._answering.Answering.run", lambda _: pytest.fail("nothing may run"))
    with pytest.raises(ValueError, match=text):
        serve(mask, chunk_size)


@pytest.mark.kernels
def test_each_prompt_brings_its_own_prefix():
    """In chunks that end where the prompt's prefix does, as if each were served with a static prefix."""
    mask, prompts, prefixes = Causal() | Prefix(paged.Value("prefix")), [PROMPT, PROMPT[:7], PROMPT[3:]], [6, 0, 3]
    reports = []
    results = serve(mask, 6, prompts, 2, values={"prefix": prefixes}, on_step=reports.append, num_slots=1)
    for prompt, prefix, result in zip(prompts, prefixes, results, strict=True):
        static = Causal() | Prefix(prefix) if prefix else Causal()
        assert result.tokens == greedy_ref(two_layers(static)[0], prompt, 2)
    assert [r.tokens for r in reports if r.kind == "prefill"] == [6, 5, 6, 6, 2]
    with pytest.raises(ValueError, match=CUT.format(4, 4, 0, 4) + ".*Pass chunk_size=6"):
        serve(mask, 4, prompts, 2, values={"prefix": prefixes})
    with pytest.raises(ValueError, match=r"values must be \['prefix'\], which the model's specs name; got \[\]"):
        serve(mask, 6, prompts, 2)
    with pytest.raises(ValueError, match=r"values\['prefix'\] must be at least 0"):
        serve(mask, 6, prompts, 2, values={"prefix": [6, -1, 3]})


@pytest.mark.kernels
def test_a_chunk_ends_before_a_span_that_it_would_cut():
    values, reports = {"starts": [[1, 4], [4, 9]], "ends": [[4, 8], [7, 9]]}, []
    results = serve(SPANS, 5, [PROMPT, PROMPT[:8]], 2, values=values, on_step=reports.append, num_slots=1)
    assert [r.tokens for r in reports if r.kind == "prefill"] == [4, 5, 2, 4, 4]
    for i, prompt in enumerate([PROMPT, PROMPT[:8]]):
        static = Causal() | paged.Spans(*(tuple(values[name][i]) for name in ("starts", "ends")))
        assert results[i].tokens == greedy_ref(two_layers(static)[0], prompt, 2)


def test_a_mask_that_sees_all_serves_one_token_in_one_chunk(monkeypatch):
    served = []
    monkeypatch.setattr("paged.runtime._answering.Answering.run", lambda answering: served.append(answering.budget - 2))
    for chunk_size in (11, 16):
        serve(Everything(), chunk_size, max_new_tokens=1)
    serve(Chunk(4), 4, prompts=[PROMPT[:8], PROMPT], max_new_tokens=1)
    assert served == [11, 16, 4]
    with pytest.raises(ValueError, match=r"cuts prompts\[1\] after 8.*Pass chunk_size=11"):
        serve(Everything(), 8, prompts=[PROMPT[:8], PROMPT], max_new_tokens=1)


def test_masks_are_found_wherever_a_model_keeps_its_attention():
    attend = paged.lower(two_layers(PREFIX)[0].layers[0].cache.attend.spec, LAYOUT)
    layer = two_layers(PREFIX)[0].layers[0]

    @dataclasses.dataclass
    class Plain:
        parts: dict

    class Callable:
        def __init__(self):
            self.inner = [attend]

        def __call__(self):
            """As a model is called."""

    def closure():
        return attend

    holders = [attend, layer, layer.__call__, layer.cache, Plain({"a": (attend,)}), Callable(), Callable().__call__]
    holders += [closure, jax.jit(closure), eqx.filter_jit(closure), functools.partial(print, attend), lambda: closure()]
    for holder in holders:
        assert [spec.mask for spec in specs_of(holder)] == [PREFIX], holder
    assert [spec.mask for spec in specs_of(two_layers(PREFIX)[0])] == [None, PREFIX] and specs_of(print) == []


class Counter(eqx.Module):
    """After token t it likes t + 1 best. It counts its traces, and after some token its logits are ``after``."""

    traces: list = eqx.field(static=True)
    last: int | jax.Array = 100
    after: float | jax.Array = 0.0

    def __call__(self, tokens, batch, state):
        del batch
        self.traces.append(tokens.shape)
        logits = jax.nn.one_hot((tokens + 1) % VOCAB, VOCAB)
        # One logit among others, or all of them.
        is_bad = (tokens == self.last)[:, None] & ((jnp.arange(VOCAB) == 3) | (self.after < 0))[None]
        return jnp.where(is_bad, self.after, logits), state


class Traces(list):
    """A list that is hashed and compared by identity."""

    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


@functools.cache
def counter():
    return eqx.nn.make_with_state(Counter)(Traces())


def count(prompts, max_new_tokens, last=100, after=0.0, **options):
    model, state = counter()
    model = dataclasses.replace(model, last=jnp.int32(last), after=jnp.float32(after))
    sizes = {"num_slots": 2, "num_pages": 16, "page_size": 4, "chunk_size": 4, "pages_per_seq": 4}
    return generate(model, state, prompts, max_new_tokens=max_new_tokens, **{**sizes, **options})


@pytest.mark.parametrize(
    ("after", "sampler"), [(jnp.nan, {}), (-jnp.inf, {}), (jnp.nan, {"temperature": 1e-6, "top_p": 0.5})], ids=str
)
def test_logits_without_a_token_end_their_own_sequence(after, sampler):
    reports = []
    options = {"sampler": paged.runtime.Sampler(**sampler), "key": jax.random.key(0), "on_step": reports.append}
    results = count([[5, 6], [9] * 6 + [12], [1]], 4, last=12, after=after, **options)
    assert [r.tokens for r in results] == [(7, 8, 9, 10), (), (2, 3, 4, 5)]
    assert [r.finish_reason for r in results] == ["length", "no_token", "length"]
    assert sum(report.new_tokens for report in reports) == 8
    (later,) = count([[10]], 4, last=12, after=after, **options)
    assert (later.tokens, later.finish_reason) == ((11, 12), "no_token")


def test_the_newest_gives_way_and_nobody_overtakes():
    """Two long prompts do not fit into five pages at once; two short ones come after them."""
    reports = []
    results = count([[1] * 8, [1] * 7, [1], [2]], [8, 9, 2, 6], num_pages=5, on_step=reports.append)
    assert [len(r.tokens) for r in results] == [8, 9, 2, 6]
    assert results[1].preemptions > 0 and [results[i].preemptions for i in (0, 2)] == [0, 0]
    told = {place: step for step, report in reversed(list(enumerate(reports))) for place in report.drawn}
    assert told[1] < told[2] < told[3], "the one that gave way is before those that came after it"
    (first,) = (step for step, report in enumerate(reports) if 0 in report.ended)
    assert first < told[2] and max(report.pages_in_use for report in reports) == 5


def test_a_pool_that_cannot_hold_one_sequence_is_an_error(monkeypatch):
    """Nobody runs then, and no step would ever change it."""
    monkeypatch.setattr("paged.runtime._generate._table_width", lambda *_: 4)
    with pytest.raises(RuntimeError, match="too few pages for one sequence alone"):
        count([[1] * 9], 3, num_pages=2)


class Stop(BaseException):
    """An exception of the caller."""


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    """An exception whose attributes cannot be set."""


@pytest.mark.parametrize("error", [Stop(), Frozen(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("donates", [False, True])
def test_an_exception_brings_what_was_drawn(error, donates):
    steps = []

    def on_step(report):
        steps.append(report)
        if len(steps) == 4:
            raise error

    with pytest.raises(type(error)) as raised:
        count([[1], [2], [3]], [2, 9, 3], on_step=on_step, donate_state=donates)
    assert raised.value is error and any("partial.generations" in note for note in error.__notes__)
    partial = error.partial
    assert isinstance(partial, PartialGenerations) and (partial.state is not None) == donates
    assert [g.tokens for g in partial.generations] == [(2, 3), (3, 4, 5, 6), (4, 5)]
    assert [g.finish_reason for g in partial.generations] == ["length", "interrupted", "interrupted"]


@pytest.mark.kernels
def test_a_state_comes_back_from_an_exception_too():
    model, state = two_layers(SPANS)
    how = {"max_new_tokens": 2, "num_slots": 1, "pages_per_seq": 4, "chunk_size": 5, "donate_state": True}
    how["values"] = {"starts": [[1, 4]], "ends": [[4, 8]]}

    def stop(report):
        raise Stop

    with pytest.raises(Stop) as raised:
        generate(model, jax.tree.map(jnp.copy, state), [PROMPT], on_step=stop, **how)
    (result,), _ = generate(model, raised.value.partial.state, [PROMPT], **how)
    assert result.tokens == serve(SPANS, 5, max_new_tokens=2, num_slots=1, values=how["values"])[0].tokens


def test_steps_trace_nothing():
    """The model is traced once for each kind of step, and what the host does between steps is not traced at all."""
    traced: list[int] = []
    model, _ = counter()
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: events.append(event) if "jaxpr_trace" in event else None
    )
    try:
        count([[1, 2, 3, 4], [5]], 4)
        jax.jit(lambda x: x + 1)(1)
        assert events and {(2,), (6,)} <= set(model.traces), "the listener hears of traces"
        events.clear()
        traces = len(model.traces)
        count([[1, 2, 3, 4, 5], [5], [7]], 4, on_step=lambda report: traced.append(len(events)))
        assert len(set(traced)) == 1 and len(traced) > 4 and len(model.traces) == traces
    finally:
        jax.monitoring.clear_event_listeners()
