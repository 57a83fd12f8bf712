"""`generate` equals greedy dense recomputation, with too few pages for all prompts; scheduling changes no token."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged.runtime import LayerStack, Sampler, generate
from tests.support.compiling import compilations

from .tiny import GLOBAL, PAGE_SIZE, VOCAB, greedy_ref, random_layer, shared_tiny

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [7], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9], [1, 6, 1], [3, 14, 15, 9, 26]]
NEW_TOKENS = [9, 12, 6, 11, 1]
SETUP = {"num_slots": 3, "pages_per_seq": 8, "chunk_size": 4, "prefix_cache": False}


@pytest.fixture(scope="module")
def model_and_state():
    return shared_tiny()


@pytest.fixture(scope="module")
def expected(model_and_state):
    model, _ = model_and_state
    return [greedy_ref(model, prompt, count) for prompt, count in zip(PROMPTS, NEW_TOKENS, strict=True)]


def run(model_and_state, prompts=PROMPTS, max_new_tokens=NEW_TOKENS, **options):
    return generate(*model_and_state, prompts, max_new_tokens=max_new_tokens, **{**SETUP, **options})


def test_equals_dense_recomputation_with_waiting_and_preemption(model_and_state, expected):
    reports = []
    results = run(model_and_state, num_pages=8, on_step=reports.append)
    assert [result.tokens for result in results] == expected
    assert [list(result.prompt) for result in results] == PROMPTS
    assert {result.finish_reason for result in results} == {"length"}
    assert sum(result.preemptions for result in results) >= 1
    assert max(report.waiting for report in reports) >= 2 and max(report.running for report in reports) == 3
    assert max(report.pages_in_use for report in reports) <= 8
    assert sum(report.new_tokens for report in reports) == sum(NEW_TOKENS)
    told = [sum((report.drawn.get(i, ()) for report in reports), ()) for i in range(len(PROMPTS))]
    assert told == expected and sorted(i for report in reports for i in report.ended) == list(range(len(PROMPTS)))
    full, local = zip(*(report.groups for report in reports), strict=True)  # one layer each
    assert (full[0].masks, local[0].masks) == (("j <= p",), ("(j <= p) & (p - j < 5)",))
    assert {(group.num_pages, group.bytes_per_page) for group in full + local} == {(8, 512)}
    assert max(g.bytes_in_use for g in full) == 8 * 512 > 6 * 512 >= max(g.bytes_in_use for g in local)
    assert {g.pages_trimmed for g in full} == {0} and max(g.bytes_saved for g in local) >= 4 * 512
    ends = [(len(prompt) + count - 6) // PAGE_SIZE for prompt, count in zip(PROMPTS, NEW_TOKENS, strict=True)]
    assert sum(report.pages_freed for report in reports) >= sum(ends), "every page that has left the window"
    prefilled = sum(report.prompt_tokens for report in reports)
    assert prefilled > sum(map(len, PROMPTS)) - len(PROMPTS), "a preempted sequence is prefilled again"
    assert [sum(report.rows.values()) for report in reports] == [report.tokens for report in reports]
    assert [len(report.rows) for report in reports] == [report.running for report in reports]
    of_prompts = [sum(report.rows[place] for place in report.prompts) for report in reports]
    assert of_prompts == [report.prompt_tokens for report in reports]
    # Who runs and has not ended runs on, unless it gives way.
    pairs = itertools.pairwise(reports)
    gave_way = sum(len(a.rows.keys() - set(a.ended) - b.rows.keys()) for a, b in pairs)
    assert gave_way == sum(result.preemptions for result in results)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"chunk_size": 1}, marks=pytest.mark.kernels),
        pytest.param({"chunk_size": 64}, marks=pytest.mark.kernels),
        pytest.param({"num_slots": 1}, marks=pytest.mark.kernels),
        pytest.param({"num_slots": 5, "num_pages": 32}, marks=pytest.mark.kernels),
    ],
    ids=str,
)
def test_chunks_slots_and_pages_are_invisible(model_and_state, expected, options):
    results = run(model_and_state, **{"num_pages": 12, **options})
    assert [result.tokens for result in results] == expected


def test_eos_ends_a_sequence_and_frees_its_pages(model_and_state, expected):
    eos = expected[1][3]
    results = run(model_and_state, num_pages=8, eos=eos)
    for result, tokens in zip(results, expected, strict=True):
        stop = tokens.index(eos) + 1 if eos in tokens else len(tokens)
        assert result.tokens == tokens[:stop]
        assert result.finish_reason == ("eos" if eos in tokens else "length")
    several = run(model_and_state, num_pages=8, eos=[eos, expected[0][0]])
    assert several[0].tokens == expected[0][:1]


@pytest.mark.kernels
def test_random_draws_do_not_depend_on_scheduling(model_and_state):
    options = {"sampler": Sampler(temperature=1.5, top_k=20), "key": jax.random.key(5)}
    crowded = run(model_and_state, num_pages=8, **options)
    alone = run(model_and_state, num_pages=32, **options)
    assert [r.tokens for r in crowded] == [r.tokens for r in alone]
    assert sum(r.preemptions for r in crowded) > sum(r.preemptions for r in alone) == 0
    other = run(model_and_state, num_pages=32, **{**options, "key": jax.random.key(6)})
    assert [r.tokens for r in other] != [r.tokens for r in alone]
    twins = run(model_and_state, prompts=[[5, 5]] * 2, max_new_tokens=12, num_pages=32, **options)
    assert twins[0].tokens != twins[1].tokens, "equal prompts draw apart"


def test_penalties_know_the_prompt_and_the_answer(model_and_state):
    """Greedy, with a penalty that no logit overcomes: no token of the prompt, and no token of the answer twice."""
    never = Sampler(repetition_penalty=1e30, logit_bias=dict.fromkeys(range(VOCAB), 100.0), presence_penalty=1.0)
    for answer in run(model_and_state, num_pages=8, sampler=never):
        assert len(set(answer.tokens)) == len(answer.tokens) and not set(answer.tokens) & set(answer.prompt)


def test_nothing_is_traced_while_everything_varies(model_and_state):
    run(model_and_state, num_pages=8)
    traces = list(model_and_state[0].traces)
    key = jax.random.key(1)
    run(model_and_state, [[1] * 17, [2]], [3, 20], num_pages=9, sampler=Sampler(temperature=0.3), key=key, eos=[5, 3])
    assert list(model_and_state[0].traces) == traces and {3, 7} <= set(traces), "rows of decode steps, and of others"


def test_other_lengths_compile_nothing_at_all(model_and_state):
    """Neither the steps of the model nor the small programs around them."""
    run(model_and_state, num_pages=8)
    with compilations() as compiled:
        jax.jit(lambda x: x + 1)(1)
        assert compiled, "the listener hears of a compilation"
        compiled.clear()
        run(model_and_state, prompts=[[1] * 6, [2], [3] * 17], max_new_tokens=[3, 20, 2], num_pages=8)
        assert not compiled


def test_the_callers_state_survives_unless_donated(model_and_state):
    model, state = model_and_state[0], jax.tree.map(jnp.copy, model_and_state[1])
    run((model, state), prompts=[[1, 2]], max_new_tokens=2, num_pages=8)
    pages = state.get(model.layers[0].cache.index)
    assert not pages.arrays[0].any()
    results, after = run((model, state), prompts=[[1, 2]], max_new_tokens=2, num_pages=8, donate_state=True)
    assert pages.arrays[0].is_deleted()
    again, _ = run((model, after), prompts=[[1, 2]], max_new_tokens=2, num_pages=8, donate_state=True)
    assert again == results, "what the pages held before means nothing"


class Counter(eqx.Module):
    """After token t it likes t + 1 best. It has no attention, so that many schedules run in little time."""

    def __call__(self, tokens, batch, state):
        del batch
        return jax.nn.one_hot((tokens + 1) % VOCAB, VOCAB), state


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 11), st.integers(1, 7)), min_size=0, max_size=7), st.integers(5, 9), st.booleans()
)
@pytest.mark.kernels
def test_any_schedule_finishes_and_every_sequence_is_its_own(shapes, num_pages, has_eos):
    model, state = eqx.nn.make_with_state(Counter)()
    prompts = [[(3 * i + k) % VOCAB for k in range(length)] for i, (length, _) in enumerate(shapes)]
    limits, reports = [limit for _, limit in shapes], []
    results = generate(
        model,
        state,
        prompts,
        max_new_tokens=limits,
        num_slots=3,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        pages_per_seq=5,
        chunk_size=4,
        eos=7 if has_eos else None,
        on_step=reports.append,
    )
    for prompt, limit, result in zip(prompts, limits, results, strict=True):
        tokens = [(prompt[-1] + 1 + k) % VOCAB for k in range(limit)]
        if has_eos and 7 in tokens:
            tokens = tokens[: tokens.index(7) + 1]
        assert list(result.tokens) == tokens
    assert all(report.pages_in_use <= num_pages and 1 <= report.running <= 3 for report in reports)
    assert sum(report.new_tokens for report in reports) == sum(len(result.tokens) for result in results)


@pytest.mark.kernels
def test_a_stack_of_layers_serves():
    """A model of stacked layers has one pool for all of them, of which each layer sees its own pages."""

    class Stacked(eqx.Module):
        layers: LayerStack
        embedding: jax.Array

        def __init__(self, key):
            self.layers = LayerStack.make(lambda key: random_layer(GLOBAL, 9, key), jax.random.split(key, 2))
            self.embedding = jax.random.normal(key, (VOCAB, 16))

        def __call__(self, tokens, batch, state):
            x = self.embedding[tokens]
            y, state = self.layers(x, batch, state)
            return (x + y) @ self.embedding.T, state

    model, state = eqx.nn.make_with_state(Stacked)(jax.random.key(0))
    few, many = (run((model, state), PROMPTS[:3], 4, num_pages=n) for n in (4, 9))
    assert [r.tokens for r in few] == [r.tokens for r in many]
    with pytest.raises(ValueError, match="a layer with 9 pages of 4"):
        run((model, state), num_pages=10)


def no_model(tokens, batch, state):
    raise AssertionError("nothing may run")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"prompts": [[1], [1] * 9], "max_new_tokens": 8, "num_pages": 3},
            r"prompts\[1\] can never be served: its 9 tokens and 8 new ones need 4 pages of 4 tokens, and a sequence "
            r"can have 3 \(num_pages=3, pages_per_seq=8\)",
        ),
        ({"prompts": [[1], []], "max_new_tokens": 1}, r"prompts\[1\] is empty"),
        ({"max_new_tokens": [1, 0, 1, 1, 1]}, r"max_new_tokens\[1\] must be at least 1; got 0"),
        ({"max_new_tokens": [1, 2]}, "one for each of 5 prompts; got 2"),
        ({"sampler": Sampler(temperature=1.0)}, "key is missing"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        ({"num_pages": 33}, "num_pages=33 of page_size=4 tokens.*a layer with 32 pages of 4"),
        ({"page_size": 8}, "page_size=8 tokens.*a layer with 32 pages of 4"),
    ],
    ids=str,
)
def test_error_texts(model_and_state, changes, text):
    with pytest.raises(ValueError, match=text):
        run((no_model, model_and_state[1]), **changes)


def test_a_state_without_pages_needs_sizes():
    model, state = eqx.nn.make_with_state(Counter)()
    with pytest.raises(ValueError, match=r"holds no Pages.*pass both"):
        generate(model, state, [[1]], max_new_tokens=1, num_slots=1)
    assert generate(model, state, [], max_new_tokens=1, num_slots=1, num_pages=1, page_size=1) == []
    one = generate(model, state, [np.array([3])], max_new_tokens=jnp.int32(2), num_slots=1, num_pages=1, page_size=2)
    assert one[0].tokens == (4, 5)


class Halves(eqx.Module):
    """The likeliest next token is the next number; called in two parts, of which the second keeps its rows."""

    rows: list = eqx.field(static=True)

    def features(self, tokens, batch, state):
        return jax.nn.one_hot((tokens + 1) % VOCAB, VOCAB), state

    def logits(self, x):
        self.rows.append(x.shape[0])
        return 2 * x

    def __call__(self, tokens, batch, state):
        raise AssertionError("a model of two parts is called by its parts")


class Rows(list):
    """A list that stands for itself in a static field."""

    __hash__ = object.__hash__


def test_a_model_of_two_parts_makes_logits_of_the_rows_that_draw_tokens():
    model, state = eqx.nn.make_with_state(Halves)(Rows())
    options = {"num_pages": 8, "page_size": PAGE_SIZE, "num_slots": 3, "chunk_size": 4}
    results = generate(model, state, [[1, 2, 3, 4, 5], [9]], max_new_tokens=2, **options)
    assert [result.tokens for result in results] == [(6, 7), (10, 11)]
    assert model.rows[0] == 7 and set(model.rows[1:]) == {3}, "all rows for the shape alone; then one of each slot"


class RowCounter(eqx.Module):
    """The likeliest next token is the next number; its state counts the rows that it is called with."""

    rows: eqx.nn.StateIndex

    def __init__(self):
        self.rows = eqx.nn.StateIndex(jnp.zeros((), jnp.int32))

    def __call__(self, tokens, batch, state):
        state = state.set(self.rows, state.get(self.rows) + tokens.shape[0])
        return jax.nn.one_hot((tokens + 1) % VOCAB, VOCAB), state


def test_a_step_with_few_rows_of_prompts_computes_half_the_padding():
    model, state = eqx.nn.make_with_state(RowCounter)()
    sizes = {"num_pages": 32, "page_size": PAGE_SIZE, "num_slots": 2, "chunk_size": 32, "donate_state": True}
    results, state = generate(model, state, [[1] * 42, [2, 3]], max_new_tokens=[3, 4], prefix_cache=False, **sizes)
    assert [result.tokens for result in results] == [(2, 3, 4), (4, 5, 6, 7)]
    # 32 rows of the first prompt and 2 of the second; the other 10 beside a decoding row; two steps of two rows each.
    assert int(state.get(model.rows)) == 34 + 18 + 2 * 2
