"""A step planned once gives what its batch gives, bit for bit, and leaves no list to be made in a layer."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.runtime import PagedAttention
from paged.spec import Prefix, RaggedBatch
from tests.support import Case, build
from tests.support.jaxprs import primitives
from tests.support.specs import PLAIN

SPEC = PLAIN.replace(window=7, mask=~Prefix(3))
CASES = {
    "decode": Case(spec=SPEC, phase="decode", corner="first page masked"),
    "decode of two rows": Case(spec=SPEC, phase="decode", rows=2, corner="few live"),
    "prefill": Case(spec=SPEC, phase="prefill", rows=7, corner="first page masked"),
    "ragged, per-token scales": Case(spec=SPEC, dtype="int8", scales="token", corner="few live"),
}
# What a list takes to make.
LISTS = {"sort", "cumsum", "cummax"}


def _lowered(case, **facts):
    return paged.lower(case.spec.replace(**facts), case.layout, "xla")


def _assert_bitwise(one, other):
    """All arrays of two trees are equal to the bit."""
    for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(*(np.atleast_1d(np.asarray(array)).view(np.uint8) for array in (x, y)))


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.kernels] * (x == "prefill")) for x in CASES])
def test_a_plan_gives_what_its_batch_gives_bitwise(name):
    built = build(CASES[name], hold_new=False)
    attend, new = _lowered(built.case), (built.q, built.k, built.v, built.pages)
    plan = attend.plan(built.q, built.pages, built.batch)
    _assert_bitwise(*(attend.update_state(*new, step) for step in (built.batch, plan)))


def test_a_plan_serves_attentions_with_other_scores():
    built = build(CASES["decode"])
    plan, other = _lowered(built.case).plan(built.q, built.pages, built.batch), _lowered(built.case, soft_cap=20.0)
    _assert_bitwise(*(other(built.q, built.pages, step) for step in (built.batch, plan)))


def _layers(attend, built, count, is_planned):
    """``count`` layers of one pool, as a loop."""
    own = built.pages.num_pages
    pool = jax.tree.map(lambda x: jnp.concatenate([x] * count), built.pages)

    def run(q, pool, batch):
        step = attend.plan(q, built.pages, batch) if is_planned else batch

        def layer(carry, i):
            q, pool = carry
            q, pool = attend.update(q, built.k, built.v, pool, step.for_layer(i, own, count))
            return (q, pool), None

        return jax.lax.scan(layer, (q, pool), jnp.arange(count))[0]

    return run, (built.q, pool, built.batch)


def test_no_list_is_made_in_a_loop_over_layers():
    built = build(CASES["decode"].replace(corner="exact pages"))
    run, args = _layers(_lowered(built.case), built, 3, is_planned=True)
    jaxpr = jax.make_jaxpr(run)(*args)
    (scan,) = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]
    assert not LISTS & set(primitives(scan.params["jaxpr"].jaxpr))
    assert LISTS & set(primitives(jaxpr.jaxpr))
    plain, args = _layers(_lowered(built.case), built, 3, is_planned=False)
    _assert_bitwise(jax.jit(run)(*args), jax.jit(plain)(*args))


def test_steps_of_one_shape_are_one_trace():
    built = build(CASES["decode"])
    attend, traces = _lowered(built.case), []

    @jax.jit
    def run(q, pages, plan):
        traces.append(None)
        return attend(q, pages, plan)

    for corner in ("mixed", "exact pages", "few live"):
        other = build(CASES["decode"].replace(corner=corner))
        run(built.q, other.pages, attend.plan(other.q, other.pages, other.batch))
    assert len(traces) == 1


def _refused(what):
    built = build(CASES["decode"])
    attend = _lowered(built.case)
    q, pages, plan = built.q, built.pages, attend.plan(built.q, built.pages, built.batch)
    match what:
        case "mask":
            attend = _lowered(built.case, window=8)
        case "layout":
            layout = built.case.layout.replace(order="split")
            attend, pages = paged.lower(built.case.spec, layout, "xla"), layout.init(pages.num_pages)
        case "pages":
            pages = built.case.layout.init(pages.num_pages + 1)
        case "dtype":
            q = q.astype(jnp.bfloat16)
        case "schedule":
            attend = paged.lower(built.case.spec, built.case.layout, schedule=paged.XlaSchedule(pages_per_block=3))
        case "not checked":
            attend = paged.lower(built.case.spec, built.case.layout, "xla", check=True)
        case "planned twice":
            attend.plan(q, pages, plan)
        case "check":
            paged.check(built.case.spec, pages, plan, 5)
    return attend(q, pages, plan)


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("mask", r"The plan is for the mask .*p - j < 7.*; this call has .*p - j < 8.*attend\.plan"),
        ("layout", r"The plan is for .*packed.*; this call has .*split"),
        ("pages", r"calls with num_pages = 23; this call has 24"),
        ("dtype", r"calls with q_dtype = float32; this call has bfloat16"),
        ("schedule", r"The plan is for xla-blocks.*; this call has xla-blocks\(pages_per_block=3\)"),
        ("not checked", r"the plan's batch has not been checked"),
        ("planned twice", r"batch must be a paged.RaggedBatch; got a Plan"),
        ("check", r"batch must be a paged.RaggedBatch; got Plan"),
    ],
)
def test_a_plan_for_something_else_is_refused(what, match):
    with pytest.raises((ValueError, TypeError), match=match):
        _refused(what)


def test_a_checking_attention_checks_once_when_it_plans():
    built = build(CASES["decode"])
    attend = paged.lower(built.case.spec, built.case.layout, "xla", check=True)
    plan = attend.plan(built.q, built.pages, built.batch)
    _assert_bitwise(attend(built.q, built.pages, plan), attend(built.q, built.pages, built.batch))
    assert attend.explain(built.q, built.pages, plan).source == "plan"
    faulty = dataclasses.replace(built.batch, lengths=built.batch.lengths.at[0].set(10**6))
    with pytest.raises(ValueError, match=r"lengths\[0\]"):
        attend.plan(built.q, built.pages, faulty)


def test_a_step_of_no_rows_has_a_plan():
    built = build(CASES["decode"])
    attend, batch = _lowered(built.case), RaggedBatch([], np.zeros((0, 4), np.int32), [0])
    plan = attend.plan(built.q[:0], built.pages, batch)
    assert attend(built.q[:0], built.pages, plan).shape == attend(built.q[:0], built.pages, batch).shape


def test_derivatives_with_a_plan_are_those_with_its_batch():
    built = build(CASES["decode"])
    attend = _lowered(built.case)
    pages = jax.tree.map(jnp.nan_to_num, built.pages)
    plan = attend.plan(built.q, pages, built.batch)

    def loss(step):
        return lambda q: jnp.sum(jnp.sin(attend(q, pages, step)))

    _assert_bitwise(*(jax.grad(loss(step))(built.q) for step in (built.batch, plan)))


def test_layers_accept_a_plan_in_place_of_the_batch():
    layout = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
    layer, state = eqx.nn.make_with_state(PagedAttention)(
        paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8), layout, 6, 16, key=jax.random.key(0)
    )
    x, batch = jax.random.normal(jax.random.key(1), (2, 16)), RaggedBatch.decode([5, 2], [[3, 1], [0, -1]])
    pages = state.get(layer.cache.index)
    plan = layer.plan(x, pages, batch)
    _assert_bitwise(*(layer.attend_pages(x, pages, step) for step in (batch, plan)))
