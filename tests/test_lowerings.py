"""Every promise of an attention, crossed with every way to run one: `paged.testing.LOWERING_CHECKS` x `RUNNERS`.

A new lowering or entry point is one more row of `RUNNERS`, and a new property one more row of `LOWERING_CHECKS`. A test
is a runner and a check. Its specs and phases are a loop inside, and all tests of a runner share compiled programs.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from paged.lower import LOWERINGS
from paged.lower import attend as attend_module
from paged.spec import RaggedBatch
from paged.testing import LOWERING_CHECKS, RUNNERS, mesh_runner
from paged.testing.lowerings import run_check
from paged.testing.promises import ROWS, Subject
from paged.testing.specs import BROUGHT
from tests.mesh.placing import mesh_of, needs_devices
from tests.support import CORNERS, Corner, assert_state_close, build, case_of, every_lowering, lowered, state_of

KERNELS = tuple(name for name in RUNNERS if name.startswith("tpu"))
ENTRIES = tuple(name for name in RUNNERS if "attention" in name)
MESHES = {f"mesh of two, {field}": {field: 2} for field in ("kv_heads", "context")}
# Checks that lower specs or batches of their own: each is one more program to compile.
LOWERS_MORE = tuple(name for name, check in LOWERING_CHECKS.items() if check.once)
# Checks whose kernel writes too, which for prompts takes seven seconds to trace and compile.
WRITES = ("update", "past the table", "chunks are invisible", "bad values stay in their sequence")
# To the bit, of sequences whose neighbours change. A kernel then takes another body for short sequences, and where a
# score operation raises to a power XLA rounds the bodies of an interpreted kernel differently: by one bit (measured).
OF_NEIGHBOURS = ("other sequences are invisible", "the order of sequences is invisible", "sequences alone are the same")
# What takes 10 to 20 seconds in full, and runs in part before that: kernels for prompts take long to compile.
LATEST = {
    ("tpu-ragged", check)
    for check in (
        *("holes are invisible", "scores of zero", "page order is invisible", "padding is nothing"),
        *("past the table", "chunks are invisible", "update"),
        *("num_seqs is clamped", "the order of sequences is invisible", "reruns are equal", "huge scores"),
        *("sequences alone are the same", "any shape"),
    )
}
# The form of XLA for GPUs shares its terms with the other form: one check always, and some more with its program.
AT_ONCE = "xla at once"
# The crossed rows of `tpu/test_ragged.py` and `tpu/test_interpreted.py` ask this of kernels in all phases.
LATEST |= {(name, "equals the reference") for name in ("tpu-ragged", "tpu-decode inline")}
LATEST |= {("tpu-ragged", check) for check in ("split and merge", "other sequences are invisible")}
LATEST |= {("tpu-decode inline", "scores of zero")}
LATEST |= {(AT_ONCE, check) for check in ("holes are invisible", "page order is invisible", "padding is nothing")}
# What the decode kernel is asked again with its sequences on the grid; `make test-slow` asks the rest.
OF_GRID = ("equals the reference", "page order is invisible", "other sequences are invisible", "holes are invisible")
# Faults of tables, which `tpu/test_interval.py` has for this kernel in every run: each is one more program.
OF_TABLES = ("holes are invisible", "past the table")
# Bad values, which `tpu/test_live.py` has for the kernel for prompts; and the reference, which
# `tpu/test_interpreted.py` has for sequences on the grid.
ONLY_SLOW = {("tpu-ragged", "bad values stay in their sequence"), ("tpu-decode grid", "equals the reference")}
# Writes and bad values, which `tpu/test_update.py` and `tpu/test_live.py` have for this kernel in every run.
OF_WRITES = ("update", "bad values stay in their sequence")
LATEST |= {("tpu-decode inline", check) for check in OF_TABLES + OF_WRITES}
ALWAYS_OF_PROMPTS = ("equals the reference", "huge scores", "padding is nothing")
# What `tpu/test_brought.py` does not ask of numbers, heads and trees on a kernel; `make test-slow` runs every check.
BROUGHT_TO_KERNELS = {"tpu-decode inline": ("other sequences are invisible",)}


@functools.cache
def runner_of(name):
    return mesh_runner(*mesh_of(MESHES[name])) if name in MESHES else RUNNERS[name]


@functools.cache
def subject_of(name, spec):
    runner = runner_of(name)
    return Subject(runner.lower, runner.specs[spec], runner.layout, runner.corners, 0.0, {**ROWS, **runner.rows})


def run(name, check, specs, phases):
    """Run a check of a runner for these specs and phases. One of `BROUGHT` that it refuses is left out."""
    runner = runner_of(name)
    if check in runner.without:
        pytest.skip(runner.without[check])
    assert specs, "no specs"
    reasons = []
    for spec in specs:
        if name in KERNELS and check in OF_NEIGHBOURS and spec == "odd":
            continue
        try:
            assert subject_of(name, spec).attention is not None
        except ValueError as refusal:
            if spec not in BROUGHT:
                raise
            reasons.append(f"{spec}: {refusal}")
            continue
        own = [phase for phase in phases if phase in LOWERING_CHECKS[check].phases]
        reasons += [run_check(check, subject_of(name, spec), phase) for phase in own]
    if None not in reasons and set(specs) <= set(BROUGHT):
        pytest.skip("; ".join(reasons))
    assert None in reasons, reasons


def _is_fast(name, check):
    """Of XLA every check; of others what needs no program of its own; of those that are much like another little."""
    if name == "tpu-decode inline" and check in (*OF_TABLES, *OF_WRITES):
        return False
    if name == "tpu-ragged" and check not in ALWAYS_OF_PROMPTS:
        return False
    if name in ("tpu-decode grid", AT_ONCE):
        return check == "equals the reference"
    if name in MESHES:
        return check in ("equals the reference", "holes are invisible", "bad values stay in their sequence")
    return name == "xla" or check not in LOWERS_MORE


def _part(name, check, specs, phases):
    """What of a check runs always: of kernels and meshes one spec in one phase, of others all phases of some specs."""
    if name == "xla":
        return [spec for spec in specs if spec != "plain" or len(specs) == 1], phases
    if name == AT_ONCE:
        return ["rich"], ["ragged"]
    if name in ENTRIES:
        # A sink outweighs any score: what has sinks leaves huge scores out.
        return specs if check == "huge scores" else specs[:1], phases
    return specs[:1], phases[:1]


def _rows():
    for name in (*RUNNERS, *MESHES):
        runner = runner_of(name)
        plain, brought = ([x for x in runner.specs if (x in BROUGHT) == is_brought] for is_brought in (False, True))
        for check in runner.checks if name in RUNNERS else RUNNERS["xla"].checks:
            own = LOWERING_CHECKS[check]
            phases = [phase for phase in runner.phases if phase in own.phases]
            is_slow = name not in (*KERNELS, "xla") or (name, check) in LATEST
            is_slow |= (name == "tpu-decode grid" and check not in OF_GRID) or (name, check) in ONLY_SLOW
            later = pytest.mark.slow if is_slow else pytest.mark.kernels
            marks = [needs_devices] * (name in MESHES)
            specs = plain[:1] if own.once else plain
            row = functools.partial(pytest.param, name, check)
            part, is_fast = _part(name, check, specs, phases), _is_fast(name, check)
            if is_fast or (name, check) in LATEST:
                yield row(*part, id=f"{name}-{check}", marks=marks + [pytest.mark.kernels] * (not is_fast))
            if not is_fast or part != (specs, phases):
                rest = [spec for spec in specs if name != "xla" or spec not in part[0]]
                yield row(
                    rest, phases, id=f"{name}-{check}-{'rest' if name == 'xla' else 'all'}", marks=[later, *marks]
                )
            if own.once or not brought:
                continue
            # Numbers of sequences, masks by head and trees: few of them in every run.
            if name == "xla" and "ragged" in phases and check not in WRITES:
                yield row(brought, ["ragged"], id=f"{name}-{check}-brought")
            if check in BROUGHT_TO_KERNELS.get(name, ()):
                yield row(brought, phases[:1], id=f"{name}-{check}-brought", marks=[pytest.mark.kernels])
            if name != "xla" or len(phases) > 1:
                yield row(brought, phases, id=f"{name}-{check}-brought-all", marks=[pytest.mark.slow, *marks])


@pytest.mark.parametrize(("runner", "check", "specs", "phases"), list(_rows()))
def test_promise(runner, check, specs, phases):
    run(runner, check, specs, phases)


def test_every_lowering_and_entry_point_is_a_runner():
    assert {attend.lowering.name for attend in (subject_of(n, "plain").attention for n in ("xla", *KERNELS))} == {
        low.name for low in LOWERINGS if not low.by_name_only
    }
    assert len(ENTRIES) == 4


@pytest.mark.parametrize("corner", ["mixed", "more rows than tokens", "all dead", "first page masked"])
def test_corners_have_the_rows_they_promise(corner):
    """The cases do hold empty rows, padding rows and rows that see something: else the promises above say little."""
    seen = build(case_of("rich", "ragged", corner=corner)).visible
    assert any(row is None for row in seen)
    assert any(row is not None and len(row) for row in seen) == (corner != "all dead")
    assert any(row is not None and not len(row) for row in seen) == (corner in ("mixed", "more rows than tokens"))


@every_lowering
def test_a_tree_of_more_rows_than_a_word_has_bits(lowering):
    """A sequence of 40 rows at places 8 to 47, whose ancestors need two words."""
    corner = Corner(((3, 0), (0, 1), (2, 1), (1, 0), (0, 0)), (40, 1, 5, 3, 0))
    case = case_of("tree", "ragged", corner=corner, tokens=52, page_size=16, seed=3)
    built = build(case)
    of_second_word = [set(range(8 + 32, 48)) & set(built.visible[row].tolist()) - {8 + row} for row in range(40)]
    assert built.batch.ancestors.shape == (52, 2) and sum(map(bool, of_second_word)) > 9
    assert_state_close(state_of(lowered(lowering, case), built), built)


@every_lowering
@pytest.mark.parametrize("phase", ["decode", "ragged"])
def test_calls_outside_of_jit_trace_once_while_values_vary(lowering, phase):
    """Also by an attention that is lowered anew each time, and with the batch's integers as lists."""
    case = case_of("plain", phase)
    sizes = []
    for corner in ("mixed", *CORNERS):
        built = build(case.replace(corner=corner), hold_new=False)
        names = ("lengths", "block_tables", "query_starts", "num_seqs")
        values = [getattr(built.batch, name).tolist() for name in names]
        batch = RaggedBatch(*values, query_rows=built.batch.query_rows)
        attend = dataclasses.replace(lowered(lowering, case.replace(corner="mixed", seed=0)))
        attend(built.q, built.pages, batch)
        attend.update(built.q, built.k, built.v, built.pages, batch)
        sizes.append([program._cache_size() for program in (attend_module._state, attend_module._update)])
    assert sizes == sizes[:1] * len(sizes)


@every_lowering
def test_an_update_inside_and_outside_of_jit_is_write_then_attend(lowering):
    case = case_of("rich", "ragged")
    built, attend = build(case, hold_new=False), lowered(lowering, case)
    out, pages = attend.update(built.q, built.k, built.v, built.pages, built.batch, built.sinks)
    np.testing.assert_array_equal(out, attend(built.q, pages, built.batch, built.sinks))
    inside = jax.jit(attend.update)(built.q, built.k, built.v, built.pages, built.batch, built.sinks)
    jax.tree.map(np.testing.assert_array_equal, inside, (out, pages))
