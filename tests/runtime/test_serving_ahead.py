"""The serve loop under masks that show tokens to others before them: prompts are cut where no row sees past."""

import jax
import jax.numpy as jnp
import pytest

import paged
from paged.runtime.serving import Engine
from paged.spec import Causal, Chunk, Everything, Prefix, Value, Window

from .tiny import greedy_ref, two_layers

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
# A cut within the second span of these gives other tokens.
CUT_WRONGLY = [[17, 29, 8, 26, 21, 0, 12, 27, 17], [26, 20, 29, 16, 19, 31, 23, 20, 17]]
SPANS = Causal() | paged.Spans(Value("starts", 2), Value("ends", 2))


def engine(mask, chunk_size, **options):
    model, state = two_layers(mask)
    options = {"num_slots": 2, "max_tokens": 24, "max_requests": 4, "steps": 4, **options}
    return Engine(model, jax.tree.map(jnp.copy, state), chunk_size=chunk_size, **options)


def spans(starts, ends):
    return {"starts": jnp.asarray(starts), "ends": jnp.asarray(ends)}


@pytest.mark.slow
def test_each_request_brings_its_own_spans_and_has_the_tokens_of_a_static_mask():
    """In chunks smaller than the prompts, several prompts in a step, and with fewer pages than both need at once."""
    served = engine(SPANS, 5, num_pages=6)
    jobs = [
        (CUT_WRONGLY[0], [1, 4], [4, 8], 6),
        (PROMPT[:8], [4, 8], [7, 8], 6),
        (CUT_WRONGLY[1], [1, 4], [4, 8], 6),
    ]
    handles = [served.submit(prompt, most, values=spans(starts, ends)) for prompt, starts, ends, most in jobs]
    list(served.stream())
    for handle, (prompt, starts, ends, most) in zip(handles, jobs, strict=True):
        static = Causal() | paged.Spans(tuple(starts), tuple(ends))
        assert tuple(handle.tokens) == greedy_ref(two_layers(static)[0], prompt, most)
    assert served.stats().preemptions > 0


REFUSED = [
    (Causal() | Prefix(6), 4, 4, "chunk_size=4 cuts prompt after 4 tokens.*token 0 sees token 4.*chunk_size=6"),
    (Causal() | Prefix(12), 16, 4, "prompt has 11 tokens.*token 0 sees token 11, which is generated"),
    (Everything(), 4, 1, "Make the engine with chunk_size=11"),
    (Window(2), 16, 2, r"token 0 sees token 11, which is generated .*pass max_new_tokens=1"),
]


@pytest.mark.parametrize(("mask", "chunk_size", "most", "text"), REFUSED, ids=[str(mask) for mask, *_ in REFUSED])
def test_a_prompt_that_no_chunk_holds_is_refused(mask, chunk_size, most, text):
    with pytest.raises(ValueError, match=text):
        engine(mask, chunk_size).submit(PROMPT, most)


def test_a_span_of_a_request_that_no_chunk_holds_is_refused():
    with pytest.raises(ValueError, match=r"chunk_size=5 cuts prompt after 7 tokens.*Make the engine with chunk_size=6"):
        engine(SPANS, 5).submit(PROMPT, 2, values=spans([2, 9], [8, 9]))


@pytest.mark.kernels
def test_a_mask_that_sees_ahead_shares_no_pages():
    assert engine(Chunk(4), 4).submit(PROMPT[:8], 1).prompt == tuple(PROMPT[:8])
    with pytest.raises(ValueError, match=r"prefix_cache=True needs .*: a mask shows tokens to others before them"):
        engine(Chunk(4), 4, prefix_cache=True)
