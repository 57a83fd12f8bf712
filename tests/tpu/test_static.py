"""The modelling tool: on a dump that is kept, and on kernels that the real compiler compiles."""

import dataclasses
import itertools
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.tpu import static
from benchmarks.tpu_prefill.shapes import SHAPES
from benchmarks.tpu_prefill.worker import cycles_a_pair

from .points import GENERATIONS, needs_libtpu
from .static_kernels import INNER, OUTER

KEPT = pathlib.Path(__file__).parent / "static_dumps"  # of `dynamic_loops` on tpu7x
KERNELS = f"{__package__}.static_kernels"
TILE_BYTES = 4096
TRIPS = np.array([OUTER, *INNER, 0, 0], np.int32)
SLOTS = (3, 1, 0, 2)  # written into the kept assembly, whose four branches encode 0

every_generation = pytest.mark.parametrize("generation", GENERATIONS)


def _kept(name):
    return (KEPT / f"{name}.txt").read_text()


@pytest.fixture(scope="module")
def bundles():
    return static.parse_bundles(_kept("final_bundles"))


@pytest.fixture(scope="module")
def assembly():
    """The kept one, with another number of delay slots for each of the kernel's branches."""
    lines, slots = [], iter((*SLOTS, 6))
    for line in _kept("assembly").splitlines():
        lines.append(re.sub(r", \$\d+ \(=", lambda _: f", ${next(slots)} (=", line) if "sbr.rel" in line else line)
    return lines


def _run(bundles, slots, inputs):
    program = static.Program(bundles, slots)
    capacity, rows = static.parse_utilization(_kept("utilization"))
    loops = static.loops_of(program, capacity, rows)
    [run] = static.run_program(program, rows, loops, inputs, static.CHIPS["tpu7x"])
    return run


def _renumbered(lines, number):
    """The lines as an overlay of their own."""
    return [re.sub(r"^\d+:0x[0-9a-f]+ *", f"{number}:{i:#x} ", line) for i, line in enumerate(lines)]


def _cut(lines, at):
    """The lines as two overlays: the second part first, with a stub at the end of one and at the beginning of one."""
    stub = ["1:0x0 : {(pc) = sbr.abs $0x13a, $6; s4 = simm.u32 $0}", "1:0x1 : {}"]
    return "\n".join([*_renumbered([*stub, *lines[at:]], 2), *_renumbered([*lines[:at], *stub], 1)])


def test_every_bundle_is_read_with_its_instructions(bundles):
    assert len(bundles) == 67
    assert [bundle.index for bundle in bundles if not bundle.instructions] == [0x10, 0x17, 0x2B, 0x2F]
    assert [(b.index, b.starts, b.ends) for b in bundles if b.starts and b.index < 0x11] == [
        (0xC, [1, 41, 42, 43, 45], [])
    ]
    assert bundles[0xD].ends == [41]
    load, phi = bundles[0x12].instructions[0], bundles[0x18].instructions[2]
    assert (load.opcode, load.result, load.text) == ("sld", "s284_s15", "[smem:[#allocation5 + %s281_s0]]")
    assert load.place == "static_kernels.py:51"
    assert (phi.opcode, phi.text) == ("sphi", "%s287_s16, %s28_s16")


def test_named_operands_and_predicates_are_read(bundles):
    [transfer] = [i for i in bundles[0x26].instructions if i.starts_transfer]
    named = {"hbm": "%s34_s22", "size_in_granules": "128", "vmem": "%s42_s18", "dst_syncflagno": "[#allocation4]"}
    assert transfer.named == named
    program = static.Program(bundles, {index: 0 for index in (0xF, 0x16, 0x2A, 0x2E)})
    assert program.branches[0xF] == ("p85_p5", False, 0x30)
    assert program.branches[0x2E] == ("p17_p6", True, 0x11)


def test_a_comment_over_several_lines_ends_no_bundle(bundles):
    [halt] = bundles[0x6].instructions
    assert halt.opcode == "shalt.err" and "hlo: dynamic_loops" in halt.comment
    assert halt.text == "(!%p150_p4)"


def test_a_missing_bundle_is_an_error():
    text = "\n".join(line for line in _kept("final_bundles").splitlines() if not line.startswith("  0x17"))
    with pytest.raises(ValueError, match="bundle 0x17 is missing"):
        static.parse_bundles(text)


def test_a_run_counts_iterations_bundles_and_transfers(bundles):
    run = _run(bundles, static.delay_slots(bundles, None, _kept("assembly")), {0: TRIPS})
    assert {name: trips for name, (trips, _) in run.loops.items()} == {"top": 1, "L1": OUTER, "L1.1": sum(INNER)}
    assert run.loops["L1.1"][1] == 19 * sum(INNER)
    assert run.issue_cycles == sum(cycles for _, cycles in run.loops.values())
    assert run.hbm_sizes == [(TILE_BYTES, sum(INNER) + 1)]
    assert run.hbm_read_bytes == sum(INNER) * TILE_BYTES
    assert run.unmodelled == []
    chip = static.CHIPS["tpu7x"]
    arrival = chip.dma_latency + chip.dma_overhead + TILE_BYTES / chip.dma_bytes_per_cycle
    assert dict(run.top_waits)["static_kernels.py:47"] == round(sum(INNER) * (arrival - 1))  # waited for a bundle later
    assert run.model_cycles == run.issue_cycles + run.stall_cycles


def test_an_operand_without_a_value_is_named(bundles):
    run = _run(bundles, static.delay_slots(bundles, None, _kept("assembly")), {})
    assert run.unmodelled == ["smem operand 0 has no value (zeros) x1"]


def test_a_taken_branch_with_few_delay_slots_costs_a_bubble(bundles):
    branches = (0xF, 0x16, 0x2A, 0x2E)
    run = _run(bundles, dict.fromkeys(branches, 0), {0: TRIPS})
    other = _run(bundles, dict(zip(branches, (1, 0, 0, 0), strict=True)), {0: TRIPS})
    taken = sum(INNER) - OUTER + OUTER - 1  # backward; the forward ones skip empty loops, of which there are none
    assert other.issue_cycles == run.issue_cycles + taken


@pytest.mark.parametrize("cut", range(1, 97, 5))
def test_delay_slots_are_found_in_whichever_overlays_the_code_is(bundles, assembly, cut):
    """A kernel that begins in one overlay and goes on in another."""
    found = static.delay_slots(bundles, None, _cut(assembly, cut))
    assert list(found.items()) == list(zip((0xF, 0x16, 0x2A, 0x2E), SLOTS, strict=True))


def test_code_that_only_has_the_same_branches_is_not_taken_for_the_kernel(bundles, assembly):
    decoy = [line if "sbr.rel" in line else re.sub(r"\{.*\}", "{}", line) for line in assembly]
    decoy = [re.sub(r", \$\d+ \(=", ", $5 (=", line) for line in decoy]
    text = [*_renumbered(decoy, 1), *_renumbered(assembly, 2)]
    assert tuple(static.delay_slots(bundles, None, "\n".join(text)).values()) == SLOTS


def test_a_branch_that_no_overlay_holds_is_an_error(bundles, assembly):
    text = "\n".join(line.replace("@!p6 ", "@!p7 ") for line in assembly)
    with pytest.raises(ValueError, match="no overlay of the assembly holds the branch in bundle 0x2e"):
        static.delay_slots(bundles, None, text)


def _modelled(kernel, generation, **kwargs):
    report = static.model(f"{KERNELS}:{kernel}", generation, kwargs, is_run=True)
    assert report.ok, report.error
    [made] = report.kernels
    return made, made.runs[0]


@needs_libtpu
@pytest.mark.slow
@every_generation
def test_one_loop(generation):
    short, run = _modelled("additions", generation, trips=64, each=8)
    _, longer = _modelled("additions", generation, trips=128, each=8)
    assert [loop.name for loop in short.loops] == ["L1"]
    assert run.loops["L1"][0] == 64
    assert (run.classes["load"], run.classes["arithmetic"]) == (512, 512)
    assert longer.issue_cycles - run.issue_cycles == 64 * short.loops[0].path_max


@needs_libtpu
@pytest.mark.slow
@every_generation
def test_loops_with_trips_from_memory(generation):
    _, run = _modelled("dynamic_loops", generation)
    assert (run.loops["L1"][0], run.loops["L1.1"][0]) == (OUTER, sum(INNER))
    assert dict(run.hbm_sizes)[TILE_BYTES] >= sum(INNER)
    assert run.unmodelled == []


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("is_checked", [True, False])
@every_generation
def test_double_buffered_transfers(generation, is_checked):
    kernel, run = _modelled("double_buffered", generation, blocks=32, pages=4, rows=256, is_checked=is_checked)
    assert (kernel.bounds_checks > 8) == is_checked
    assert run.loops["L1"][0] == 32
    assert dict(run.hbm_sizes)[256 * 512] == 128
    assert 16 << 20 <= run.hbm_read_bytes < (16 << 20) + 8192
    assert run.model_cycles >= 0.99 * run.hbm_cycles
    assert run.unmodelled == []


@needs_libtpu
@pytest.mark.slow
@every_generation
def test_a_wait_for_nothing_is_reported(generation):
    _, run = _modelled("unstarted", generation)
    assert any("would hang" in note for note in run.unmodelled)


@needs_libtpu
@pytest.mark.slow
@every_generation
def test_trips_that_depend_on_a_vector_are_reported(generation):
    _, run = _modelled("trips_from_a_vector", generation)
    assert any("taken from a vector" in note for note in run.unmodelled)


@needs_libtpu
@pytest.mark.slow
@every_generation
def test_products_take_what_the_peak_says(generation):
    chip = static.CHIPS[generation]
    _, run = _modelled("products", generation, size=512, grid=4)
    peak = 4 * 512**3 / (chip.mxus * chip.mxu_size**2 * chip.rows_per_cycle)
    assert run.matrix_cycles == pytest.approx(peak, rel=0.01)


@needs_libtpu
@pytest.mark.slow
def test_a_kernel_of_attention_makes_its_products_in_whichever_overlays_its_code_is(tmp_path):
    """Its run makes all the products that attention needs, and few more; and overlays change no delay slot of it."""
    shape = SHAPES["llama-512-p16"]
    kwargs = {"candidate": "paged", "shape": shape.name, "generation": "tpu7x"}
    report = static.model("benchmarks.tpu_prefill.candidates:build", "tpu7x", kwargs, is_run=True, keep=tmp_path)
    assert report.ok, report.error
    [kernel] = report.kernels
    [run] = kernel.runs
    assert run.unmodelled == []
    assert run.hbm_read_bytes > shape.needed_bytes
    floor = shape.q_heads * shape.visible_pairs * cycles_a_pair(shape, static.CHIPS["tpu7x"])
    assert floor < run.matrix_cycles < 1.1 * floor
    # The compiler leaves this kernel whole, in one overlay. Cut by hand it has the same delay slots.
    [text], [dump] = (list(tmp_path.glob(end)) for end in ("*-assembly.txt", f"*-{kernel.name}-*-final_bundles.txt"))
    bundles = static.parse_bundles(dump.read_text())
    whole = static.delay_slots(bundles, None, text.read_text())
    overlays = itertools.groupby(text.read_text().splitlines(), lambda line: line.partition(":")[0])
    lines = max((list(lines) for _, lines in overlays), key=len)
    assert len(bundles) == kernel.bundles < len(lines), "two overlays hold it: join their lines first"
    for part in (2, 3):
        assert static.delay_slots(bundles, None, _cut(lines, len(lines) // part)) == whole


@needs_libtpu
@pytest.mark.slow
def test_the_command_prints_one_kernels_figures(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.tpu.static",
        f"{KERNELS}:dynamic_loops",
        "--generation",
        "v5e",
        "--run",
    ]
    command += ["--tokens", "41", "--bytes-per-token", "4096", "--json", str(tmp_path / "report.json")]
    root = pathlib.Path(static.__file__).parents[3]
    printed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert "kernel dynamic_loops" in printed and "modelled" in printed and "cycles per KV token" in printed
    assert '"issue_cycles"' in (tmp_path / "report.json").read_text()


def test_a_report_is_text(bundles):
    run = _run(bundles, static.delay_slots(bundles, None, _kept("assembly")), {0: TRIPS})
    kernel = static.Kernel("k", 67, 8192, 0, 0, {}, {}, 3, 6, [0], [], None, [run, dataclasses.replace(run, core=1)])
    report = static.Report(True, "", "module:builder", "tpu7x", {}, 0.5, {"jax": "0"}, [kernel], [("copy", 3)])
    text = static.described(report)
    assert "modelled" in text and f"{run.issue_cycles} cycles issued" in text and "run on core 1" in text
