"""Precedence: the caller before contexts, contexts before the file, the file before the heuristic; and the source."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.compat import page_attention
from paged.compat.hints import Hints, lowered
from paged.lower import Call, DecodeSchedule, Key
from paged.runtime import PagedCache

from .small import BATCH, CALL, CONTEXT, EXPLICIT, FILE, LAYOUT, OTHER, PAGES, SPEC, Q, chosen, entry, key, stored


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The process's tuning file, which knows the small call."""
    monkeypatch.setenv("PAGED_TUNING", str(tmp_path / "tuned.json"))
    return stored(tmp_path / "tuned.json", entry())


def test_tuning_is_off_in_tests():
    assert paged.TuningFile.at() is None
    assert chosen(paged.lower(SPEC, LAYOUT))[1] == "heuristic"


@pytest.mark.parametrize(
    ("given", "context", "has_file", "want"),
    [
        (EXPLICIT, CONTEXT, True, (EXPLICIT, "explicit")),
        (EXPLICIT, None, True, (EXPLICIT, "explicit")),
        (None, CONTEXT, True, (CONTEXT, "context")),
        (None, CONTEXT, False, (CONTEXT, "context")),
        (None, None, True, (FILE, "tuning file tuned.json")),
        (None, None, False, (paged.lower(SPEC, LAYOUT).schedule, "heuristic")),
    ],
)
def test_explicit_then_context_then_file_then_heuristic(file, given, context, has_file, want):
    if not has_file:
        file.clear()
    if context is None:
        attend = paged.lower(SPEC, LAYOUT, schedule=given)
    else:
        with paged.schedules(context):
            attend = paged.lower(SPEC, LAYOUT, schedule=given)
    explanation = attend.explain(Q, PAGES, BATCH)
    assert chosen(attend) == (explanation.schedule, explanation.source) == want
    assert f"runs as {want[0]} (from: {want[1]})" in str(explanation)


def test_without_a_call_a_context_counts_and_a_file_cannot(file):
    attend = paged.lower(SPEC, LAYOUT)
    assert attend.explain().source == "heuristic" and attend.schedule == attend.explain().schedule != FILE
    with paged.schedules(CONTEXT):
        attend = paged.lower(SPEC, LAYOUT)
    assert attend.schedule == CONTEXT and "(from: context)" in str(attend.explain())


def test_contexts_nest_and_the_inner_one_comes_first(file, tmp_path):
    inner = stored(tmp_path / "inner.json", entry(OTHER))
    elsewhere = dataclasses.replace(CALL, slots=64, tokens=64)
    with paged.schedules(CONTEXT):
        with paged.schedules(inner.path):
            attend = paged.lower(SPEC, LAYOUT)
            assert chosen(attend) == (OTHER, "context, tuning file inner.json")
            assert chosen(attend, elsewhere) == (CONTEXT, "context"), "what the inner does not know, the outer may"
        with paged.schedules(None):
            assert chosen(paged.lower(SPEC, LAYOUT))[1] == "heuristic"
        assert chosen(paged.lower(SPEC, LAYOUT)) == (CONTEXT, "context")
    assert chosen(paged.lower(SPEC, LAYOUT)) == (FILE, "tuning file tuned.json")


def test_a_context_ends_with_an_error_and_is_not_of_other_threads():
    seen = []
    with pytest.raises(RuntimeError, match="inside"), paged.schedules(CONTEXT):
        thread = threading.Thread(target=lambda: seen.append(chosen(paged.lower(SPEC, LAYOUT))[1]))
        thread.start()
        thread.join()
        raise RuntimeError("inside")
    assert seen == ["heuristic"] and chosen(paged.lower(SPEC, LAYOUT))[1] == "heuristic"


def test_what_was_lowered_keeps_the_advice_of_that_moment(file):
    """The advice is part of the value that traces are cached by. Nothing is read while tracing."""
    before, text = paged.lower(SPEC, LAYOUT), str(paged.lower(SPEC, LAYOUT).explain(Q, PAGES, BATCH))
    out = before(Q, PAGES, BATCH)
    with paged.schedules(CONTEXT):
        assert str(before.explain(Q, PAGES, BATCH)) == text
        inside = paged.lower(SPEC, LAYOUT)
    file.store([entry(OTHER)])
    after = paged.lower(SPEC, LAYOUT)
    assert len({before, inside, after}) == 3, "equal values would share a trace"
    assert [chosen(attend)[0] for attend in (before, inside, after)] == [FILE, CONTEXT, OTHER]
    assert before == dataclasses.replace(before) and chosen(before)[0] == FILE
    np.testing.assert_allclose(inside(Q, PAGES, BATCH), out, rtol=0, atol=1e-5)


def test_the_same_file_gives_the_same_attention(file):
    one, two = paged.lower(SPEC, LAYOUT), paged.lower(SPEC, LAYOUT)
    assert one == two and hash(one) == hash(two)
    file.store([entry(OTHER, key(spec=SPEC.replace(window=10)))])
    assert paged.lower(SPEC, LAYOUT) == one, "what a file says of other programs makes no trace stale"


def test_no_retrace_while_lengths_and_tables_vary(file):
    attend, traces = paged.lower(SPEC, LAYOUT), []
    assert chosen(attend)[0] == FILE

    @jax.jit
    def step(q, pages, batch):
        traces.append(batch)
        return attend(q, pages, batch)

    for lengths in ([13, 2], [1, 0], [16, 16]):
        got = step(Q, PAGES, paged.RaggedBatch.decode(jnp.array(lengths), jnp.array([[3, 1, 4, 6], [5, 2, 0, 7]])))
        assert got.shape == Q.shape
    assert len(traces) == 1


def test_calls_of_one_class_of_shapes_share_a_schedule_and_others_do_not(file):
    attend = paged.lower(SPEC, LAYOUT)
    for changes in ({"pages_per_seq": 3}, {"num_pages": 999}):
        assert chosen(attend, dataclasses.replace(CALL, **changes))[0] == FILE
    for changes in ({"pages_per_seq": 5}, {"slots": 3, "tokens": 3}, {"query_rows": None}, {"q_dtype": jnp.bfloat16}):
        call = dataclasses.replace(CALL, **changes)
        assert chosen(attend, dataclasses.replace(call, q_dtype=jnp.dtype(call.q_dtype)))[1] == "heuristic"
    for spec in (SPEC.replace(window=10), SPEC.replace(soft_cap=9.0), SPEC.replace(scores=(paged.ALiBi(),))):
        assert chosen(paged.lower(spec, LAYOUT))[1] == "heuristic"
    for changes in ({"page_size": 8}, {"order": "split"}, {"dtype": jnp.bfloat16}):
        assert chosen(paged.lower(SPEC, dataclasses.replace(LAYOUT, **changes)))[1] == "heuristic"


# An attention on a TPU: schedules are chosen for it without a TPU.
TPU_SPEC = paged.AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=128)
TPU_LAYOUT = paged.PageLayout(page_size=16, num_kv_heads=2, head_dim=128)
TPU_CALL = Call(tokens=4, slots=4, pages_per_seq=64, num_pages=256, query_rows=1, q_dtype=jnp.dtype("bfloat16"))
TPU_SCHEDULE = DecodeSchedule(pages_per_block=16, buffers=3)


def _tpu_key(device):
    program = paged.lower(TPU_SPEC, TPU_LAYOUT, "tpu").program
    return Key.of(program, TPU_LAYOUT, ["tpu-decode", "tpu-ragged"], TPU_CALL, device)


def test_a_schedule_in_a_context_is_for_the_calls_that_its_lowering_takes():
    with paged.schedules(TPU_SCHEDULE):
        tpu, xla = (paged.lower(TPU_SPEC, TPU_LAYOUT, target) for target in ("tpu", "xla"))
    assert chosen(tpu, TPU_CALL) == (TPU_SCHEDULE, "context")
    ragged = dataclasses.replace(TPU_CALL, query_rows=None)
    assert chosen(tpu, ragged)[1] == chosen(xla, TPU_CALL)[1] == "heuristic"


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        (TPU_SCHEDULE.replace(cores=2), "cores=2"),
        (TPU_SCHEDULE.replace(kv_splits=99), "kv_splits=99"),
        (TPU_SCHEDULE.replace(pages_per_block=2**14), "vector memory"),
    ],
)
def test_what_cannot_run_is_an_error_in_a_context_and_a_warning_in_a_file(tmp_path, schedule, reason):
    file = stored(tmp_path / "tpu.json", entry(schedule, _tpu_key("TPU v5 lite")))
    with paged.schedules(schedule):
        bound = paged.lower(TPU_SPEC, TPU_LAYOUT, "tpu").on_chip("v5e")
    with pytest.raises(ValueError, match=f"cannot run: .*{reason}.*nearest that can: tpu-decode"):
        bound.choice(TPU_CALL)
    with paged.schedules(file):
        told = paged.lower(TPU_SPEC, TPU_LAYOUT, "tpu").on_chip("v5e")
    with pytest.warns(paged.TuningWarning, match=f"cannot run: .*{reason}.*is ignored"):
        assert chosen(told, TPU_CALL)[1] == "heuristic"


def test_on_another_chip_the_file_is_asked_for_that_chip(tmp_path):
    with paged.schedules(stored(tmp_path / "tpu.json", entry(TPU_SCHEDULE, _tpu_key("TPU v5e")))):
        attend = paged.lower(TPU_SPEC, TPU_LAYOUT, "tpu")
    assert chosen(attend.on_chip("v5e"), TPU_CALL) == (TPU_SCHEDULE, "context, tuning file tpu.json")
    assert chosen(attend.on_chip("v6e"), TPU_CALL)[1] == "heuristic"


def test_layers_and_entry_points_use_contexts_and_files_too(file):
    assert chosen(PagedCache(SPEC, LAYOUT, 9).attend) == (FILE, "tuning file tuned.json")
    with paged.schedules(CONTEXT):
        layer = PagedCache(SPEC, LAYOUT, 9)
        entry_point = lowered("xla", False, Hints(), SPEC, LAYOUT, CALL)
    assert chosen(layer.attend) == chosen(entry_point) == (CONTEXT, "context")


def test_devices_of_a_mesh_run_what_was_tuned_for_one_devices_share(tmp_path, monkeypatch):
    """With biases by head each device has another program. A schedule tuned for the first device's is used by all."""
    spec, mesh = SPEC.replace(scores=(paged.ALiBi(),)), jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    axes = paged.Axes(kv_heads="model")
    share = paged.lower(spec, LAYOUT, mesh=mesh, axes=axes).first_device
    of = Key.of(share.program, share.layout, ["xla-blocks"], CALL)
    state, ran = type(share.lowering).state, []

    def spied(self, program, schedule, *arrays):
        ran.append(schedule)
        return state(self, program, schedule, *arrays)

    monkeypatch.setattr(type(share.lowering), "state", spied)
    with paged.schedules(stored(tmp_path / "share.json", entry(FILE, of))):
        attend = paged.lower(spec, LAYOUT, mesh=mesh, axes=axes)
    assert attend.explain(Q, PAGES, BATCH).source == "context, tuning file share.json"
    jax.eval_shape(attend, Q, PAGES, BATCH)
    assert ran == [FILE]


def test_an_entry_point_of_compat_asks_the_sources_at_each_call(monkeypatch):
    """Its cached programs are for the sources of schedules at the call."""
    ran, choice = [], paged.Attend.choice

    def recorded(self, call=None):
        ran.append(choice(self, call))
        return ran[-1]

    monkeypatch.setattr(paged.Attend, "choice", recorded)
    cache, q = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 2, 8))

    def run():
        page_attention(q, cache, cache, [3], [[2, 0]], attn_scale=0.123, target="xla")
        return len(ran)

    run()
    with paged.schedules(CONTEXT):
        traced = run()
    assert ran[0][1] != ran[-1][1] == CONTEXT
    assert run() == traced, "traced again"
