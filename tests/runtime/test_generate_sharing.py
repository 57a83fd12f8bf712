"""`generate` with pages that are shared: a prefix cache and samples by fork give the tokens of dense recomputation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged.runtime import GroupedPool, PrefixCache, Sampler, generate

from .tiny import GLOBAL, LOCAL, PAGE_SIZE, VOCAB, greedy_ref, shared_tiny, tiny

SETUP = {"num_slots": 3, "pages_per_seq": 8, "chunk_size": 4}
SYSTEM = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]  # two pages, and half of one
PROMPTS = [[*SYSTEM, *more] for more in ([7, 1], [7], [2, 7, 1, 8, 2], [7, 1, 3], [8], [2, 7, 1, 9])]


@pytest.fixture(scope="module")
def model_and_state():
    return shared_tiny()


@pytest.fixture(scope="module")
def expected(model_and_state):
    return [greedy_ref(model_and_state[0], prompt, 6) for prompt in PROMPTS]


def run(model_and_state, prompts=PROMPTS, **options):
    reports = []
    options = {"max_new_tokens": 6, "on_step": reports.append, **SETUP, **options}
    return generate(*model_and_state, prompts, **options), reports


def prefilled(reports):
    return sum(report.prompt_tokens for report in reports)


@pytest.mark.parametrize("num_pages", [32, pytest.param(8, marks=pytest.mark.kernels)])
def test_a_hit_gives_the_tokens_of_a_miss(model_and_state, expected, num_pages):
    """With many pages, and with so few that pages are given up and sequences preempted."""
    results, reports = run(model_and_state, num_pages=num_pages)
    assert [result.tokens for result in results] == expected
    assert sum(r.tokens_reused for r in reports) > 0
    if num_pages == 8:
        without, all_of_them = run(model_and_state, num_pages=num_pages, prefix_cache=False)
        assert [result.tokens for result in without] == expected
        assert prefilled(reports) < prefilled(all_of_them) and sum(r.pages_evicted for r in reports) > 0
        assert sum(r.tokens_reused + r.pages_cached + r.pages_evicted for r in all_of_them) == 0
    else:
        assert prefilled(reports) <= len(SYSTEM) + sum(len(prompt) - len(SYSTEM) + 1 for prompt in PROMPTS)
        assert max(r.pages_shared for r in reports) >= 2 and sum(r.pages_copied for r in reports) >= 1


@pytest.mark.kernels
def test_log_probabilities_after_a_hit_are_those_of_a_miss():
    """The last page is shared in part: its copy is written on. One layer has a window, whose pages are trimmed."""
    (model, state), known = tiny(), jnp.asarray(PROMPTS[2], jnp.int32)
    pool = GroupedPool.init([LOCAL, GLOBAL], 32, 2, 8, PAGE_SIZE, chunk_size=16)
    pool, _ = pool.extend([len(known), 0])
    want, state = eqx.filter_jit(model)(known, pool.ragged_batch([len(known), 0]), state)
    cache, pool = PrefixCache.init(pool).insert(pool.trim(), 0, known, len(known), has_partial=True)
    cache, pool, count = cache.attach(pool, 1, known, len(known) - 1)
    rest = len(known) - int(count)
    pool, ok = pool.extend([0, rest])
    got, state = eqx.filter_jit(model)(known[-rest:], pool.ragged_batch([0, rest]), state)
    assert ok.all() and rest == 1
    np.testing.assert_allclose(jax.nn.log_softmax(got), jax.nn.log_softmax(want[-rest:]), atol=1e-5)


@pytest.mark.kernels
def test_samples_share_the_pages_of_their_prompt(model_and_state, expected):
    """Greedy samples are equal; the prompt is prefilled once; the last page is copied for each at most."""
    results, reports = run(model_and_state, prompts=PROMPTS[:1], n=3, num_pages=32)
    assert [result.tokens for result in results] == [expected[0]] * 3
    assert prefilled(reports) == len(PROMPTS[0])
    assert sum(report.pages_copied for report in reports) <= 3 * 2  # in the groups of both layers
    assert [sorted(r.drawn) for r in reports if r.drawn][:2] == [[0], [0, 1, 2]], "when the prompt is in pages"


@pytest.mark.kernels
def test_samples_of_several_prompts_wait_for_slots(model_and_state, expected):
    """More samples than slots, too few pages, and draws at random: the first sample draws as alone."""
    results, _ = run(model_and_state, n=4, num_pages=8)
    assert [result.tokens for result in results] == [tokens for tokens in expected for _ in range(4)]
    options = {"sampler": Sampler(temperature=1.5), "key": jax.random.key(3), "num_pages": 32}
    alone, _ = run(model_and_state, **options)
    four, _ = run(model_and_state, n=4, **options)
    assert [r.tokens for r in four[::4]] == [r.tokens for r in alone]
    assert all(len({r.tokens for r in four[i : i + 4]}) > 1 for i in range(0, len(four), 4))
    assert [r.prompt for r in four] == [tuple(p) for p in PROMPTS for _ in range(4)]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n": 0}, "n must be at least 1; got 0"),
        ({"prefix_cache": 1}, "prefix_cache must be True or False; got 1"),
    ],
)
def test_error_texts(model_and_state, options, text):
    with pytest.raises((ValueError, TypeError), match=text):
        run(model_and_state, num_pages=32, **options)


@pytest.mark.slow
def test_a_thousand_requests_with_one_system_prompt(model_and_state):
    """512 tokens that all begin with, and 4 to 12 of their own: prefilled is at most 1.02 of what is new."""
    model, state = tiny(num_pages=4096)
    rng = jax.random.split(jax.random.key(0), 2)
    system = jax.random.randint(rng[0], (512,), 0, VOCAB).tolist()
    own = jax.random.randint(rng[1], (1000, 12), 0, VOCAB).tolist()
    prompts = [[*system, *tokens[: 4 + i % 9]] for i, tokens in enumerate(own)]
    for prompt in (prompts, [p[:-3] for p in prompts]):
        new = len(system) + sum(len(p) - len(system) for p in prompt)
        options = {"max_new_tokens": 2, "num_slots": 16, "pages_per_seq": 256, "chunk_size": 64}
        _, reports = run((model, state), prompts=prompt, **options)
        assert prefilled(reports) <= 1.02 * new, (prefilled(reports), new)
