"""The whole call, modelled: the top-level program runs, its operations take their cycles, and guesses are refused."""

import pathlib

import pytest

from benchmarks.tpu import static
from benchmarks.tpu.static.dumps import Dumps

from .points import needs_libtpu

KERNELS = pathlib.Path(__file__).with_name("static_kernels.py")
TRIPS, GRANULES = 3, 16
SLOTS = ["{}"] * 4  # a branch's delay slots on v6e


def _numbered(lines):
    """Bundles as a dump prints them."""
    return "\n".join(f"  {index:#x} : {line}" for index, line in enumerate(lines))


LOOP = [
    "{ %s5_s2 = sphi %s4_s2, %s6_s2 } /* Start region 7 */",
    "{ %9 = inlined_call %s5_s2 /* %fusion.1 = fusion(%x) */ }",
    "{ %s6_s2 = sadd.s32 1, %s5_s2 }",
    f"{{ %p7_p1 = scmp.lt.s32.totalorder %s6_s2, {TRIPS} }}",
    "{ %8 = sbr.rel (%p7_p1) target = $region7 }",
    *SLOTS,
]
HEAD = [  # the check of what the program was compiled for
    "{ %s1_s0 = sld [smem:[#allocation4]] } /* Start region 0 */",
    "{ %p2_p0 = scmp.ne.s32.totalorder %s1_s0, 1 }",
    "{ %3 = sbr.rel (%p2_p0) target = $region4 }",
    *SLOTS,
    "{ %s4_s2 = smov.u32 0 }",
]
TAIL = [
    f"{{ %10 = dma.vmem_to_hbm %s1_s0, /*size_in_granules=*/{GRANULES}, %s1_s0, [#allocation8] }}",
    "{ %11 = inlined_call %s5_s2 /* %step.1 = custom-call(%fusion.1) */ }",
    f"{{ %12 = dma.done.wait [#allocation8], {GRANULES} }}",
    "{ %13 = inlined_call %s5_s2 /* %fusion.2 = fusion(%y) */ }",
    "{ %14 = inlined_call /* <late-finalization> */ } /* Start/End empty region 4 */",
]
TOP = _numbered([*HEAD, *LOOP, *TAIL])
BUNDLES = len(HEAD) + TRIPS * len(LOOP) + len(TAIL)
FUSION = _numbered(["{ %1 = vtrace 1 }"] * 100)
HLO = """
%fused.1 (p: s32[4]) -> s32[4] {
  ROOT %add.1 = s32[4]{0} add(%p, %p), metadata={op_name="one"}
}

%fused.2 (p.1: s32[4]) -> s32[4] {
  ROOT %add.2 = s32[4]{0} add(%p.1, %p.1), metadata={op_name="other"}
}

ENTRY %main (x: s32[4], y: s32[4]) -> s32[4] {
  %x = s32[4]{0} parameter(0)
  %y = s32[4]{0} parameter(1)
  %fusion.1 = s32[4]{0} fusion(%x), kind=kLoop, calls=%fused.1, backend_config={"estimated_cycles":"2120"}
  %step.1 = s32[4]{0} custom-call(%fusion.1), custom_call_target="tpu_custom_call"
  ROOT %fusion.2 = s32[4]{0} fusion(%y), kind=kLoop, calls=%fused.2, backend_config={"estimated_cycles":"2120"}
}
"""


@pytest.fixture
def whole(tmp_path):
    """Models the call of dumps like libtpu's, on v6e, with a kernel of so many cycles."""

    def made(kernel_cycles, hlo=HLO, top=TOP, fusion=FUSION, generation="v6e"):
        (tmp_path / "1-TLP-02-final_bundles.txt").write_text(top)
        (tmp_path / "2-fusion.1-02-final_bundles.txt").write_text(fusion)
        (tmp_path / "3-step.1-02-final_bundles.txt").write_text(FUSION)
        (tmp_path / "3-step.1-01-schedule-analysis_final_bundles.txt").write_text("tpu_custom_call")
        (tmp_path / "program.hlo").write_text(hlo)
        chip = static.CHIPS[generation]
        return static.whole_call(Dumps(tmp_path), chip, {"step.1": kernel_cycles}, None)

    return made


def test_operations_loops_and_copies_add_up(whole):
    """The copy is under way beside a long kernel; a short one is done before it, and the program waits."""
    call = whole(1000.0)
    assert call.unmodelled == []
    assert call.cycles == BUNDLES + (TRIPS + 1) * 100 + 1000
    assert (call.kernel_cycles, call.xla_cycles) == (1000, call.cycles - 1000)
    assert call.before == len(HEAD) + TRIPS * (len(LOOP) + 100) + 1
    assert (call.after, call.between) == (100 + 4, 0)
    assert (call.operations, call.estimated_cycles) == (TRIPS + 1, (TRIPS + 1) * 2120)
    assert call.largest[0] == ("fusion.1", TRIPS, 300, TRIPS * 2120)
    chip = static.CHIPS["v6e"]
    arrival = chip.dma_latency + chip.dma_overhead + 32 * GRANULES / chip.dma_bytes_per_cycle
    assert whole(50.0).cycles == pytest.approx(call.cycles - 1000 + 50 + (arrival - 2 - 50))


def test_code_of_a_like_operation_is_taken_and_that_of_another_is_not(whole):
    assert whole(1000.0).operations == TRIPS + 1
    call = whole(1000.0, HLO.replace("add(%p.1, %p.1)", "subtract(%p.1, %p.1)"))
    assert call.unmodelled == ["fusion.2 has no code in the dumps"]


def test_a_device_of_two_cores_is_refused(whole):
    assert "two cores" in whole(1000.0, generation="v5p")


POPPED = "{ %s5_s3 = spop %4 }"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("{ %p6_p1 = scmp.lt.s32.totalorder %s5_s3, 3 } | { %7 = sbr.rel (%p6_p1) target = $region4 }", "a branch"),
        ("{ %6 = sst [smem:[#allocation9]] %s5_s3 } | { %s7_s4 = sld [smem:[#allocation9]] } "
         "| { %8 = dma.done.wait [#allocation8], %s7_s4 }", "a wait"),
        ("{ %s6_s4 = sadd.s32 1, %s5_s3 } | { %7 = dma.vmem_to_hbm %s0_s0, /*size_in_granules=*/%s6_s4, %s0_s0, "
         "/*dst_syncflagno=*/[#allocation8] }", "a transfer's size"),
        ("{ %s6_s4 = sadd.s32 1, %s5_s3 } | { %p8_p1 = scmp.lt.s32.totalorder %s0_s0, 3 } "
         "| { %9 = sbr.rel (%p8_p1) target = $region4 }", None),
    ],
    ids=["branch", "wait, through SMEM", "size", "only computed with"],
)  # fmt: skip
def test_control_that_depends_on_data_is_found(code, found):
    lines = ["{ %s0_s0 = smov.u32 1 } /* Start region 4 */", "{ %4 = vpush %v3_v1 }", POPPED, *code.split(" | ")]
    bundles = static.parse_bundles(_numbered(lines))
    assert static.unknown_control(bundles) == ([f"{found} depends on data"] if found else [], frozenset())


def test_numbers_from_an_unknown_array_are_data():
    lines = [
        "{ %s1_s0 = smov.u32 [#allocation3] } /* Start region 4 */",
        "{ %2 = dma.vmem_to_smem %s9_s9, /*size_in_granules=*/1, /*smem=*/%s1_s0, /*dst_syncflagno=*/[#allocation4] }",
        "{ %s3_s2 = sld [smem:[#allocation3 + $0x1]] }",
        "{ %p4_p0 = scmp.eq.s32.totalorder %s3_s2, 0 }",
        "{ %5 = sbr.rel (%p4_p0) target = $region4 }",
    ]
    bundles = static.parse_bundles(_numbered(lines))
    assert static.unknown_control(bundles).guesses == ["a branch depends on data"]


def test_a_transfer_that_is_made_or_not_by_data_counts_as_made(whole):
    """An index out of bounds is dropped: which are, nobody knows."""
    scatter = [
        "{ %1 = vpush %v3_v1 }",
        "{ %s2_s0 = spop %1 }",
        "{ %p4_p0 = scmp.lt.s32.totalorder %s2_s0, 0 }",  # of the zeros that stand for data, none is below 0
        "{ %5 = dma.vmem_to_hbm (%p4_p0), %s0_s0, /*size_in_granules=*/64, %s0_s0, [#allocation8] }",
        "{ %6 = dma.done.wait (%p4_p0), [#allocation8], 64 }",
    ]
    call = whole(1000.0, fusion=_numbered(scatter))
    chip = static.CHIPS["v6e"]
    transfer = chip.dma_latency + chip.dma_overhead + 32 * 64 / chip.dma_bytes_per_cycle
    assert call.unmodelled == []
    assert call.largest[0][2] == pytest.approx(TRIPS * (4 + transfer))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("generation", ["v5e", "tpu7x"])
def test_a_serial_loop_costs_the_latency_of_memory_at_every_turn(generation):
    """Compiled: a turn sends a number to memory and back, and the loop stands before the kernel."""
    reports = [static.model(f"{KERNELS}:after_a_scan", generation, {"turns": turns}, is_run=True) for turns in (8, 16)]
    short, long = (report.whole for report in reports)
    assert isinstance(short, static.Whole) and isinstance(long, static.Whole), (short, long)
    assert short.kernel_cycles == long.kernel_cycles > 0
    assert long.operations - short.operations >= 8
    a_turn = (long.before - short.before) / 8
    assert static.CHIPS[generation].dma_latency < a_turn < 10 * static.CHIPS[generation].dma_latency
