"""Every argument of `generate` is used as it is meant, or refused by name before anything runs."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged.runtime import Sampler, generate

SIZES = {"num_slots": 1, "num_pages": 4, "page_size": 4, "chunk_size": 4}


class Parrot(eqx.Module):
    """The likeliest next token is the token itself. It notes what runs."""

    def __call__(self, tokens, batch, state):
        return jax.nn.one_hot(tokens, 10), state


def run(prompts=((1, 2, 3),), max_new_tokens=3, **options):
    model, state = eqx.nn.make_with_state(Parrot)()
    return generate(model, state, prompts, max_new_tokens=max_new_tokens, **{**SIZES, **options})


def test_every_kind_of_eos_ends():
    kinds = [3, [3], (3,), {3}, frozenset({3, 5}), {3: "end"}.keys(), {"end": 3}.values(), np.int64(3), np.array(3)]
    kinds += [np.array([5, 3]), jnp.int32(3), jnp.array([3]), [np.int32(3)], iter([3])]
    for eos in kinds:
        (result,) = run(eos=eos)
        assert (result.tokens, result.finish_reason) == ((3,), "eos"), eos


@pytest.mark.kernels
def test_integers_of_every_kind_are_integers():
    for prompts in ([(1, 3)], [range(1, 4, 2)], [np.array([1, 3])], np.array([[1, 3]]), [jnp.array([1, 3])], ([1, 3],)):
        for limit in (2, np.int8(2), jnp.int32(2), [2], (2,), np.array([2]), jnp.array([2]), np.array(2)):
            (result,) = run(prompts, limit, donate_state=np.False_, num_slots=np.int64(1), page_size=np.int32(4))
            assert result.prompt == (1, 3) and result.tokens == (3, 3)
            assert all(type(token) is int for token in (*result.prompt, *result.tokens))
    assert run(eos=[])[0].finish_reason == "length"


REFUSED = {
    "eos": ["3", b"3", 3.0, [3.0], True, [True], ["3"], {3: 1}, -1, 10, [3, 10], np.array([[3]]), np.array([3.0]),
            2**40, np.array([True]), int],
    "prompts": ["12", ["12"], [b"12"], [[1.9]], [[True]], [1, 2], [[[1]]], [[-1]], [[10]], [[2**40]], [{1, 2}], {1, 2},
                [np.array([1.0])], [np.array([[1]])], [np.array([True])], np.array([1, 2]), [["1"]], [[]], None, 3,
                [iter([1])], [jnp.array([1.5])]],
    "max_new_tokens": [2.9, True, "2", None, [2.0], [True], 0, -1, [], [1, 1], {2}, np.array([True]), np.array([[2]]),
                       2**40],
    "num_slots": [0, 1.0, True, "1", None],
    "num_pages": [0, 4.0, True, "4", 2**40],
    "page_size": [0, 4.0, True, "4"],
    "pages_per_seq": [0, 4.0, True, "4"],
    "chunk_size": [0, 4.0, True, "4", None],
    "sampler": [[Sampler()], 0.7, "greedy", Sampler],
    "key": [0, "0", np.zeros(2, np.uint32), jax.random.PRNGKey(0), jax.random.split(jax.random.key(0), 2)],
    "donate_state": [1, "no", None],
    "on_step": [1, []],
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused_by_name(name, monkeypatch):
    monkeypatch.setattr("paged.runtime._answering.Answering.run", lambda _: pytest.fail("nothing may run"))
    for value in REFUSED[name]:
        with pytest.raises((TypeError, ValueError)) as raised:
            run(**{name: value})
        assert re.search(rf"\b{name}\b", str(raised.value)), (value, raised.value)


def test_models_and_states_of_another_kind_are_refused_by_name():
    model, state = eqx.nn.make_with_state(Parrot)()
    for pair, text in [((3, state), "model must be callable"), ((model, {}), "state must be the state of eqx")]:
        with pytest.raises(TypeError, match=text):
            generate(*pair, [[1]], max_new_tokens=1, **SIZES)
    wrong = {
        r"return a pair \(logits, state\); got ShapeDtypeStruct": lambda t, b, s: t,
        r"logits float\[rows, vocab\], here \[5, vocab\]; got int32\[4, 9\]": lambda t, b, s: (
            jnp.ones((4, 9), int),
            s,
        ),
        r"logits float\[rows, vocab\], here \[5, vocab\]; got float32\[9\]": lambda t, b, s: (jnp.ones(9), s),
    }
    for text, model in wrong.items():
        with pytest.raises(TypeError, match=text):
            generate(model, state, [[1]], max_new_tokens=1, **SIZES)
