"""The candidates of every lowering: few, the heuristic's first, each can run, and each gives the same attention."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

import paged
from paged.lower import LOWERINGS, Call, Program, compile_for
from paged.lower.tpu import CHIPS
from tests.support import ALL_LOWERINGS, SPECS, Case, assert_state_close, build, state_of

MOST = 24  # candidates per call

# Facts of released models: query heads per KV head, head_dim, and what else the spec and the layout have.
MODELS = {
    "llama": (4, 128, {}, {}),
    "one head": (1, 64, {}, {"order": "joined", "page_size": 64}),
    "windowed": (8, 64, {"window": 128, "sinks": True}, {"order": "joined"}),
    "capped": (2, 256, {"soft_cap": 50.0}, {"dtype": jnp.int8, "scales": "head"}),
}
CALLS = {
    "decode": Call(32, 32, 256, 2**13, 1, jnp.dtype("bfloat16")),
    "drafts": Call(32, 8, 256, 2**13, 4, jnp.dtype("bfloat16")),
    "short": Call(3, 3, 2, 8, 1, jnp.dtype("bfloat16")),
    "chunk": Call(512, 1, 512, 2**13, 512, jnp.dtype("bfloat16")),
    "mixed": Call(600, 16, 256, 2**13, None, jnp.dtype("bfloat16")),
}


def _model(name):
    group, head_dim, spec, layout = MODELS[name]
    kv_heads = 8
    return (
        paged.AttentionSpec(num_q_heads=group * kv_heads, num_kv_heads=kv_heads, head_dim=head_dim, **spec),
        paged.PageLayout(num_kv_heads=kv_heads, head_dim=head_dim, **{"page_size": 16, **layout}),
    )


@pytest.mark.parametrize("generation", [None, *CHIPS])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("model", MODELS)
def test_candidates_are_few_and_can_all_run(model, call, generation):
    spec, layout = _model(model)
    program, call = Program.from_spec(spec), CALLS[call]
    for lowering in LOWERINGS:
        if generation is not None:
            lowering = lowering.on_chip(generation)
        if lowering.refuses(program, layout, call) is not None:
            continue
        candidates = lowering.candidates(program, layout, call)
        assert candidates[0] == lowering.schedule(program, layout, call)
        assert 2 <= len(candidates) == len(set(candidates)) <= MOST
        for schedule in candidates:
            assert lowering.cannot_honour(program, layout, call, schedule) is None
            assert type(schedule) is lowering.schedule_type


def test_candidates_follow_the_program_and_the_chip():
    spec, layout = _model("llama")
    call, xla, decode = CALLS["decode"], LOWERINGS[-1], LOWERINGS[0]

    def largest(lowering, spec):
        candidates = lowering.candidates(Program.from_spec(spec), layout, call)
        return max(schedule.pages_per_block for schedule in candidates[1:])

    assert largest(xla, spec) == 32 and largest(xla, spec.replace(window=60)) == 8, "no block is longer than is seen"
    program = Program.from_spec(spec)
    of = {name: decode.on_chip(name).candidates(program, layout, call) for name in CHIPS}
    held = {name: max(s.pages_per_block * s.buffers for s in candidates) for name, candidates in of.items()}
    assert held["v4"] < held["v5e"], "less memory, smaller blocks"
    assert {s.cores for s in of["v4"]} == {2} and {s.cores for s in of["v5e"]} == {1}


# Pages of 64 tokens, so that blocks of 64 to 512 tokens are several sizes; rows of a phase that tile in several ways.
CASES = {
    "decode": Case(
        spec=SPECS["rich"].replace(window=300), phase="decode", page_size=64, pages_per_seq=8, sink_shape=(4,)
    ),
    "chunk": Case(spec=SPECS["plain"], phase="prefill", page_size=64, rows=40),
    "ragged": Case(spec=SPECS["odd"], phase="ragged", page_size=64, tokens=16),
}


def _case_and_candidates(lowering, name):
    case, chosen = CASES[name], ALL_LOWERINGS[lowering]
    built = build(case)
    call = Call.of(built.q, built.pages, built.batch)
    return built, chosen.candidates(Program.from_spec(case.spec), case.layout, call)


def _require_the_reference(lowering, built, schedule):
    case = built.case
    attend = paged.lower(case.spec, case.layout, ALL_LOWERINGS[lowering].target, schedule=schedule)
    assert_state_close(state_of(attend, built), built)


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.kernels] * (x != "ragged")) for x in CASES])
@pytest.mark.parametrize("lowering", ALL_LOWERINGS)
def test_some_candidates_give_the_reference(lowering, name):
    """The smallest sizes, or the most row blocks at once; the test below runs all of them."""
    built, candidates = _case_and_candidates(lowering, name)
    assert len(candidates) > 4
    _require_the_reference(lowering, built, candidates[-1 if name == "ragged" else 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lowering", ALL_LOWERINGS)
def test_every_candidate_gives_the_reference(lowering, name):
    built, candidates = _case_and_candidates(lowering, name)
    for schedule in candidates:
        _require_the_reference(lowering, built, schedule)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is in the package libtpu")
@pytest.mark.parametrize(("rows", "generation"), [(1, "v4"), (1, "v5e"), (1, "tpu7x"), (64, "v5e")])
def test_the_tpu_compiler_takes_every_candidate(rows, generation):
    spec, layout = _model("llama")
    q = jax.ShapeDtypeStruct((8 * rows, spec.num_q_heads, spec.head_dim), jnp.bfloat16)
    pages = jax.eval_shape(lambda: layout.init(2048))
    batch = paged.RaggedBatch.decode(
        jax.ShapeDtypeStruct((8,), jnp.int32), jax.ShapeDtypeStruct((8, 256), jnp.int32), query_rows=rows
    )
    lowering, _ = paged.lower(spec, layout, "tpu").on_chip(generation).choice(Call.of(q, pages, batch))[:2]
    for schedule in lowering.candidates(Program.from_spec(spec), layout, Call.of(q, pages, batch)):
        attend = paged.lower(spec, layout, "tpu", schedule=schedule)
        assert compile_for(attend, generation, q, pages, batch).schedule == schedule
