"""The door: what `lower` and its calls refuse, and in which words; schedules; explanations; dense attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower import LOWERINGS, Program, Schedule, Shape, Timing, refusals
from paged.spec import AttentionSpec, Bias, Chunk, Prefix, RaggedBatch
from tests.support import Case, build, every_lowering, lowered, real
from tests.support.lowerings import ALL_LOWERINGS

SPEC = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
LAYOUT = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
PAGES, BATCH = LAYOUT.init(4), RaggedBatch.decode([3, 2], [[0], [1]])
Q, KV = jnp.zeros((2, 4, 8)), jnp.zeros((2, 2, 8))
ATTEND, SINKING = paged.lower(SPEC, LAYOUT), paged.lower(SPEC.replace(sinks=True), LAYOUT)
OTHER = paged.PageLayout(page_size=2, num_kv_heads=2, head_dim=8, dtype=jnp.float32)


def _layout(**changes):
    return LAYOUT.replace(**changes)


ERRORS = {
    "kv heads": (
        lambda: paged.lower(SPEC, _layout(num_kv_heads=1)),
        ValueError,
        r"num_kv_heads must equal .*= 2; got 1",
    ),
    "head dim": (
        lambda: paged.lower(SPEC, _layout(head_dim=4)),
        ValueError,
        r"layout.head_dim must equal .*= 8; got 4",
    ),
    "target": (
        lambda: paged.lower(SPEC, LAYOUT, "npu"),
        ValueError,
        r"target must be one of .*'gpu', 'tpu', 'xla'.*got 'npu'",
    ),
    "schedule": (
        lambda: paged.lower(SPEC, LAYOUT, "xla", schedule=paged.DecodeSchedule(pages_per_block=1)),
        ValueError,
        'schedule is for the lowering "tpu-decode".*xla-blocks',
    ),
    "q rank": (
        lambda: ATTEND(Q[0], PAGES, BATCH),
        ValueError,
        r"q must be \[tokens, q_heads, head_dim\] .*4, 8\].*got \(4, 8\)",
    ),
    "q heads": (lambda: ATTEND(Q[:, :3], PAGES, BATCH), ValueError, r"q must be .*from the spec.*got \(2, 3, 8\)"),
    "q dtype": (
        lambda: ATTEND(Q.astype(int), PAGES, BATCH),
        TypeError,
        "q must be float16, bfloat16 or float32; got int32",
    ),
    "q list": (lambda: ATTEND([1.0], PAGES, BATCH), TypeError, "q must be an array; got list"),
    "q rows": (
        lambda: ATTEND(Q[:1], PAGES, BATCH),
        ValueError,
        "q must have 2 rows, 1 for each of the batch's 2 slots; got 1",
    ),
    "pages": (
        lambda: ATTEND(Q, OTHER.init(4), BATCH),
        ValueError,
        r"pages must have the layout.*page_size=4.*page_size=2",
    ),
    "raw pages": (
        lambda: ATTEND(Q, PAGES.arrays[0], BATCH),
        TypeError,
        r"pages must come from layout.init.*got ArrayImpl",
    ),
    "k": (
        lambda: ATTEND.update(Q, KV[:, :1], KV, PAGES, BATCH),
        ValueError,
        r"k must be \[tokens, kv_heads.*got \(2, 1, 8\)",
    ),
    "v": (
        lambda: ATTEND.update(Q, KV, KV[..., :4], PAGES, BATCH),
        ValueError,
        r"v must be .*value_dim.*got \(2, 2, 4\)",
    ),
    "k rows": (
        lambda: ATTEND.update(Q, KV[:1], KV[:1], PAGES, BATCH),
        ValueError,
        "one row per query token, 2; got 1 and 1",
    ),
    "v rows": (lambda: paged.write(KV, KV[:1], PAGES, BATCH), ValueError, "one row per query token, 2; got 2 and 1"),
    "k dtype": (lambda: paged.write(KV.astype(int), KV, PAGES, BATCH), TypeError, "k must be float16.*got int32"),
    "write raw": (lambda: paged.write(KV, KV, PAGES.arrays[0], BATCH), TypeError, "pages must come from layout.init"),
    "half a call": (
        lambda: ATTEND.explain(Q, batch=BATCH),
        TypeError,
        "explain needs q, pages, batch together, or none of them; got only q, batch",
    ),
    "no sinks": (lambda: SINKING(Q, PAGES, BATCH), ValueError, r"sinks is missing.*float32\[4\]"),
    "sinks": (lambda: ATTEND(Q, PAGES, BATCH, jnp.zeros(4)), ValueError, "spec says sinks=False.*sinks=True"),
    "sinks dtype": (
        lambda: SINKING(Q, PAGES, BATCH, jnp.zeros(4, int)),
        TypeError,
        "sinks must be floating.*got int32",
    ),
    "sinks shape": (
        lambda: SINKING(Q, PAGES, BATCH, jnp.zeros((3, 4))),
        ValueError,
        r"sinks must be \[q_heads\] = \[4\], or \[q_heads, n\] .*got \(3, 4\)\.$",
    ),
    "schedule of 0": (
        lambda: ATTEND.schedule.replace(pages_per_block=0),
        ValueError,
        "pages_per_block must be at least 1; got 0",
    ),
    "schedule type": (
        lambda: ATTEND.schedule.replace(rows_per_tile=2.0),
        TypeError,
        r"rows_per_tile must be a Python int; got 2\.0",
    ),
    "schedule in a schedule": (
        lambda: paged.RaggedSchedule(pages_per_block=1, rows_per_tile=16, single_rows=ATTEND.schedule),
        TypeError,
        "single_rows must be a DecodeSchedule or None; got XlaSchedule",
    ),
    "json": (
        lambda: Schedule.from_json('{"lowering": "tpu-decode", "lanes": 1}'),
        ValueError,
        r"for tpu-decode has the fields .*pages_per_block.*got \['lanes'\]",
    ),
    "json of nothing known": (
        lambda: Schedule.from_json('{"lowering": "x"}'),
        ValueError,
        r"names its \"lowering\", one of .*xla-blocks.*got {'lowering': 'x'}",
    ),
    "json list": (lambda: Schedule.from_json("[1]"), ValueError, r"names its \"lowering\".*got \[1\]"),
    "not json": (lambda: Schedule.from_json("{"), ValueError, ""),
}


MESH = jax.make_mesh((1,), ("model",), devices=jax.devices()[:1])


def _tune(**changes):
    return paged.tune(changes.pop("attend", ATTEND), Q, PAGES, changes.pop("batch", BATCH), file="off", **changes)


# One argument at a time, of every function that makes or asks an attention: the value is no such thing.
TYPE_ERRORS = {
    "spec": (lambda: paged.lower(LAYOUT, LAYOUT), TypeError, "spec must be a paged.AttentionSpec; got PageLayout"),
    "layout": (lambda: paged.lower(SPEC, SPEC), TypeError, "layout must be a paged.PageLayout; got AttentionSpec"),
    "target list": (lambda: paged.lower(SPEC, LAYOUT, ["xla"]), ValueError, r"target must be one of.*got \['xla'\]"),
    "target array": (lambda: paged.lower(SPEC, LAYOUT, np.ones(2)), ValueError, "target must be one of.*got array"),
    "schedule": (lambda: paged.lower(SPEC, LAYOUT, schedule="fast"), TypeError, "schedule must be a sched.*got 'fast'"),
    "check": (lambda: paged.lower(SPEC, LAYOUT, check="no"), TypeError, "check must be True or False; got 'no'"),
    "interpret": (
        lambda: paged.lower(SPEC, LAYOUT.replace(page_size=8), "tpu", interpret="yes"),
        TypeError,
        "interpret must be True, False or.*got 'yes'",
    ),
    "mesh": (
        lambda: paged.lower(SPEC, LAYOUT, mesh="model", axes=paged.Axes()),
        TypeError,
        "mesh must be a jax.sharding.Mesh.*got 'model'",
    ),
    "axes": (lambda: paged.lower(SPEC, LAYOUT, mesh=MESH, axes="model"), TypeError, "axes must be paged.Axes.*'model'"),
    "in_specs": (lambda: paged.lower(SPEC, LAYOUT, mesh=MESH, in_specs=[]), TypeError, r"in_specs must.*got \[\]"),
    "out_specs": (
        lambda: paged.lower(SPEC, LAYOUT, mesh=MESH, out_specs="model"),
        TypeError,
        "out_specs must be a PartitionSpec.*got 'model'",
    ),
    "kv_heads": (lambda: paged.Axes(kv_heads=0), TypeError, "kv_heads must be a mesh axis's name.*got 0"),
    "batch": (lambda: ATTEND(Q, PAGES, (BATCH,)), TypeError, "batch must be a paged.RaggedBatch; got tuple"),
    "write batch": (lambda: paged.write(KV, KV, PAGES, None), TypeError, "batch must be a paged.RaggedBatch; got None"),
    "write target": (lambda: paged.write(KV, KV, PAGES, BATCH, 3), ValueError, "target must be one of.*got 3"),
    "on_chip": (lambda: ATTEND.on_chip(["v5e"]), ValueError, r"generation must be one of.*got \['v5e'\]"),
    "compile_for": (
        lambda: paged.compile_for(ATTEND.__call__, "v5e", Q, PAGES, BATCH),
        TypeError,
        "attend must be a paged.Attend; got <bound method",
    ),
    "compile_for generation": (
        lambda: paged.compile_for(ATTEND, 5, Q, PAGES, BATCH),
        ValueError,
        "generation must be one of.*got 5",
    ),
    "compile_for pages": (
        lambda: paged.compile_for(ATTEND, "v5e", Q, PAGES.arrays, BATCH),
        TypeError,
        "pages must be a paged.Pages; got",
    ),
    "compile_for new": (
        lambda: paged.compile_for(ATTEND, "v5e", Q, PAGES, BATCH, new=KV),
        TypeError,
        r"new must be \(k, v\)",
    ),
    "tune attend": (lambda: _tune(attend=SPEC), TypeError, "tune takes an attention.*got AttentionSpec"),
    "tune batch": (lambda: _tune(batch=3), TypeError, "batch must be a paged.RaggedBatch; got int"),
    "tune again": (lambda: _tune(again="yes"), TypeError, "again must be True or False; got 'yes'"),
    "tune timing": (lambda: _tune(timing=3.0), TypeError, "timing must be a paged.Timing.*got 3.0"),
    "tune progress": (lambda: _tune(progress=True), TypeError, "progress must be a function.*got True"),
    "Timing margin": (lambda: Timing(margin=2), ValueError, r"margin must be a number in \[0, 1\); got 2"),
    "Timing seconds": (lambda: Timing(seconds="1"), ValueError, "seconds must be a number.*got '1'"),
    "Timing turns": (lambda: Timing(most_turns=2.5), TypeError, "most_turns must be a Python int; got 2.5"),
    "Shape": (lambda: Shape(slots=2.0, context=4), TypeError, "slots must be a Python int; got 2.0"),
    "dense spec": (
        lambda: paged.dense_attention(LAYOUT, Q[None], KV[None], KV[None]),
        TypeError,
        "spec must be a paged.AttentionSpec",
    ),
    "dense k": (lambda: paged.dense_attention(SPEC, Q[None], [1.0], KV), TypeError, "k must be an array; got list"),
}


@pytest.mark.parametrize("name", TYPE_ERRORS)
def test_what_is_no_such_thing_is_refused_by_name(name):
    act, kind, text = TYPE_ERRORS[name]
    with pytest.raises(kind, match=text):
        act()


def test_numpy_flags_are_flags():
    assert paged.lower(SPEC, LAYOUT, check=np.False_, interpret=np.False_) == ATTEND
    assert paged.lower(SPEC, LAYOUT, check=np.True_).check is True


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument_what_it_got_and_what_it_needs(name):
    act, kind, text = ERRORS[name]
    with pytest.raises(kind, match=text or "Expecting"):
        act()


def test_errors_come_when_traced():
    """Shapes are known under jit, so a wrong one never reaches the device."""
    with pytest.raises(ValueError, match="q must be"):
        jax.eval_shape(ATTEND.__call__, jax.ShapeDtypeStruct((2, 5, 8), jnp.float32), PAGES, BATCH)


@every_lowering
def test_a_schedule_is_one_line_of_json_and_runs_again(lowering):
    attend = lowered(lowering, Case(spec=SPEC))
    text = attend.schedule.to_json()
    assert "\n" not in text and Schedule.from_json(text) == attend.schedule
    again = paged.lower(SPEC, attend.layout, attend.lowering.target, schedule=Schedule.from_json(text))
    assert again == attend


@every_lowering
def test_explanations_are_for_people_and_for_tools(lowering):
    built = build(Case(spec=SPEC, phase="decode", corner="mixed"))
    attend = lowered(lowering, built.case)
    explanation = attend.explain(built.q, built.pages, built.batch)
    assert str(Program.from_spec(SPEC)) in str(explanation) and lowering in str(explanation)
    # Lengths 9, 1, 0, 4 and 15, in pages of 4.
    assert (explanation.pages_visited, explanation.pages_held) == (3 + 1 + 0 + 1 + 4,) * 2
    assert explanation.bytes_visited == 9 * built.case.layout.bytes_per_page
    assert "visits 9 pages" in str(explanation) and "skips 0 of 9" in str(explanation)
    assert attend.explain().pages_visited is None and "visits" not in str(attend.explain())


def test_every_lowering_says_what_it_refuses():
    program = Program.from_spec(SPEC)
    for target in {low.target for low in LOWERINGS}:
        reasons = refusals(program, LAYOUT, target)
        assert set(reasons) == {low.name for low in LOWERINGS if low.target == target}
        assert all(reason is None or isinstance(reason, str) for reason in reasons.values())
    assert set(refusals(program, LAYOUT)) == {low.name for low in LOWERINGS} >= set(ALL_LOWERINGS)


def test_a_target_that_takes_nothing_says_which_does():
    takers = [
        low.target for low in LOWERINGS if low.target == "tpu" and low.refuses(Program.from_spec(SPEC), LAYOUT) is None
    ]
    if not takers:
        with pytest.raises(
            ValueError, match=r'No lowering takes this spec on target "tpu".*Targets that take it: .*xla'
        ):
            paged.lower(SPEC, LAYOUT, "tpu")


DENSE = {
    "causal": {},
    "everything": {"window": 4, "soft_cap": 9.0, "sinks": True, "scores": (paged.ALiBi(),)},
    "both sides": {
        "causal": False,
        "mask": Prefix(2) | Chunk(4),
        "scores": (Bias(lambda p, j, h: 0.1 * real(h) * real(p - j)),),
    },
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_attention_is_the_paged_one(name):
    """The training twin: one page holds each sequence; gradients finite, an empty row 0."""
    spec, tokens, length = SPEC.replace(**DENSE[name]), 7, 6
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(0, 3, (2, n, h, 8)), jnp.float32) for n, h in ((tokens, 4), (length, 2), (length, 2))
    )
    sinks = jnp.asarray(rng.normal(0, 3, 4), jnp.float32) if spec.sinks else None
    layout = dataclasses.replace(LAYOUT, page_size=length)
    pages = layout.wrap(jnp.stack([jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)], axis=1))
    batch = RaggedBatch.decode([length, length], [[0], [1]], query_rows=tokens)
    want = jax.jit(paged.reference, static_argnums=0)(spec, q.reshape(-1, 4, 8), pages, batch, sinks)
    got = jax.jit(paged.dense_attention, static_argnums=0)(spec, q, k, v, sinks)
    np.testing.assert_allclose(got.reshape(want.shape), want, rtol=0, atol=2e-5)
    if spec.causal:
        assert not np.asarray(got[:, 0]).any()
    gradients = jax.jit(jax.grad(lambda *args: (paged.dense_attention(spec, *args) ** 2).sum(), argnums=(0, 1, 2)))(
        q, k, v, *(() if sinks is None else (sinks,))
    )
    assert all(np.isfinite(np.asarray(g)).all() and np.abs(np.asarray(g)).max() > 0.1 for g in gradients)


DENSE_ERRORS = {
    "heads": ((Q[None], KV[None, :, :1], KV[None]), ValueError, r"k must be .*\[\*, \*, 2, 8\] .*got \(1, 2, 1, 8\)"),
    "rank": ((Q, KV[None], KV[None]), ValueError, r"q must be \[batch, tokens, heads, dim\].*got \(2, 4, 8\)"),
    "length": ((Q[None], KV[None], KV[None, :1]), ValueError, "k and v on length"),
    "dtype": ((Q[None], KV[None], KV[None].astype(int)), TypeError, "v must be floating point; got int32"),
}


@pytest.mark.parametrize("name", DENSE_ERRORS)
def test_dense_attention_errors(name):
    args, kind, text = DENSE_ERRORS[name]
    with pytest.raises(kind, match=text):
        paged.dense_attention(SPEC, *args)
