"""Decode calls compile for an H200 and an H100 that need not be there; what the compilers say of each holds bounds."""

import functools

import pytest

from paged.lower.gpu import HOPPERS, shared_for_a_block
from paged.lower.gpu.plan import ADDED_BYTES

from .compiling import Point, compiled
from .running import needs_compiler
from .sass import count, instructions, loop_with, opcode

# The shape of the bound: issue slots of one turn of the loop, which a scheduler issues for its warp, against the cycles
# in which the turn's bytes come from memory at 4.8 TB/s. It says that instructions do not bound the kernel, and nothing
# of latency, of the cache or of what a GPU has timed.
POINTS = {
    "16 x 4096": Point(),
    "256 x 1024": Point(slots=256, pages_per_seq=64),
    "window, written": Point(window=128, writes=True),
    "h100": Point(chip="h100"),
    "head 64": Point(head_dim=64, heads=64),
    "head 256": Point(head_dim=256, heads=16),
    "split, float16": Point(order="split", dtype="float16", chip="h100"),
    "pages of 8": Point(page_size=8),
    "pages of 64": Point(page_size=64),
    "sixteen rows": Point(rows=4),
    "rich": Point(rich=True),
    "head 64, pages of 8": Point(head_dim=64, page_size=8),
    "32 rows": Point(rows=8),
    "rich, head 64": Point(rich=True, head_dim=64, window=1000),
    "joined, head 64": Point(head_dim=64, order="joined"),
    "interleaved": Point(order="interleaved"),
    "listed": Point(listed=True),
}
FIRST = ("16 x 4096", "window, written", "h100")


@functools.cache
def _facts(is_first):
    try:
        return compiled({name: point for name, point in POINTS.items() if (name in FIRST) == is_first})
    except Exception as error:  # raised by each test, and found once
        return error


def facts_of(name):
    facts = _facts(name in FIRST)
    if isinstance(facts, Exception):
        raise facts
    return facts[name]


def _marked(names):
    return [pytest.param(name, marks=[needs_compiler, pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", _marked(POINTS))
def test_a_kernel_spills_nothing_and_two_fit_a_multiprocessor(name):
    facts, gpu = facts_of(name), HOPPERS[POINTS[name].chip]
    assert facts["spilled_bytes"] == facts["stack_bytes"] == 0
    assert facts["shared_bytes"] <= shared_for_a_block(gpu)
    assert 2 * 128 * facts["registers"] <= 65536
    # What `explain` and the schedule count, and what the compiler adds.
    assert facts["counted_bytes"] < facts["shared_bytes"] <= facts["counted_bytes"] + ADDED_BYTES


@pytest.mark.parametrize("name", _marked(POINTS))
def test_a_call_is_a_few_launches(name):
    facts = facts_of(name)
    assert facts["loops"] == 0
    # Where pages are listed, XLA lists them: a sum along each table, and a scatter.
    assert facts["launches"] <= (12 if POINTS[name].listed else 8)
    assert facts["temporary_bytes"] < 2**26


@needs_compiler
@pytest.mark.slow
def test_pages_are_written_in_place():
    facts = facts_of("window, written")
    assert facts["aliased_bytes"] == 8192 * 2 * 8 * 16 * 128 * 2
    assert facts["temporary_bytes"] < 2**21


@pytest.mark.parametrize("name", _marked(POINTS))
def test_instructions_do_not_bound_the_loop(name):
    facts, gpu = facts_of(name), HOPPERS["h200"]
    bytes_per_cycle = gpu.bytes_per_second / gpu.multiprocessors / (1e9 * gpu.clock)
    cycles = 2 * facts["tile_bytes"] / bytes_per_cycle
    assert facts["issue_slots"] <= cycles / 2, f"{facts['issue_slots']} of {cycles:.0f}"


@pytest.mark.parametrize("name", _marked(POINTS))
def test_the_loop_copies_and_multiplies_as_its_schedule_says(name):
    facts, point = facts_of(name), POINTS[name]
    tokens = facts["tile_bytes"] // (2 * point.head_dim)
    # Each of four warps copies as many pages. Where a block has fewer, one copy of a tile is guarded.
    assert facts["copies"] == 2 * -(-tokens // point.page_size // 4)
    # Products of 64 x n x 16: scores over head_dim, values over tokens.
    assert facts["products"] == 2 * (tokens // 64) * (point.head_dim // 16)
    assert facts["fences"] == 2


@pytest.mark.parametrize("name", _marked(POINTS))
def test_no_copy_starts_before_all_warps_are_done_with_its_tile(name):
    """After a product is awaited, which every warp does for itself, all warps meet before the next copy starts."""
    names, met = [opcode(instruction) for instruction in facts_of(name)["loop"]], True
    for i, instruction in enumerate(facts_of(name)["loop"]):
        if instruction.startswith("WARPGROUP.DEPBAR"):
            met = False
        met = met or names[i] == "BAR"
        assert names[i] != "UTMALDG" or met, instruction
    assert "BAR" in names


LISTING = """
.L_x_0:
        /*0000*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_1:
        /*0010*/                   HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0020*/              @!P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/                   EXIT ;
.L_x_3:
        /*0050*/                   NANOSLEEP R2 ;
        /*0060*/              @!P1 BRA `(.L_x_3) ;
        /*0070*/                   BRA `(.L_x_2) ;
"""


def test_a_loop_is_what_leads_back_to_its_head():
    found, labels = instructions(LISTING)
    assert len(found) == 8 and labels[".L_x_3"] == 5
    loop = loop_with(LISTING, "HGMMA")
    assert [opcode(i) for i in loop] == ["HGMMA", "BRA", "BRA", "NANOSLEEP", "BRA", "BRA"]
    assert count(loop, "BRA") == 4
