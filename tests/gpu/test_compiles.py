"""Decode calls compile for an H200 and an H100 that need not be there; what the compilers say of each holds bounds."""

import functools

import jax.numpy as jnp
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
# Pages of 8 bits: how a tile is converted depends on dtype and head_dim.
NARROW = {
    "int8": Point(dtype="int8", scales="head"),
    "int8, head 256": Point(dtype="int8", scales="head", head_dim=256, heads=16),
    "int8, rich": Point(dtype="int8", scales="tensor", rich=True),
    "int8, pages of 8, interleaved": Point(dtype="int8", scales="head", page_size=8, order="interleaved"),
    "int8, sixteen rows": Point(dtype="int8", scales="head", rows=4),
    "int8, listed, sixteen rows, pages of 8": Point(
        dtype="int8", scales="head", rows=4, page_size=8, listed=True, rich=True
    ),
    "float8": Point(dtype="float8_e4m3fn", scales="head"),
    "float8_e5m2, head 256": Point(dtype="float8_e5m2", scales="head", head_dim=256, heads=16, chip="h100"),
    "float8, rich": Point(dtype="float8_e4m3fn", scales="head", rich=True),
    "float8, pages of 8, split": Point(dtype="float8_e4m3fn", scales="tensor", page_size=8, order="split"),
    "float8, written, joined": Point(dtype="float8_e4m3fn", scales="head", order="joined", writes=True),
    "float8, sixteen rows": Point(dtype="float8_e4m3fn", scales="head", rows=4),
}
POINTS |= NARROW
# Issue slots of a turn, as a part of the cycles of its bytes: at most half, but where 8-bit pages meet much else.
HALF = 0.5
MORE = {
    "int8, sixteen rows": 0.54,
    "int8, listed, sixteen rows, pages of 8": 0.78,
    "float8, rich": 0.54,
    "float8, sixteen rows": 0.57,
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
    # Queries over 8-bit pages are prepared, and scales applied.
    allowed = (12 if POINTS[name].listed else 8) + (3 if name in NARROW else 0)
    assert facts["launches"] <= allowed
    assert facts["temporary_bytes"] < 2**26


@needs_compiler
@pytest.mark.slow
def test_pages_are_written_in_place():
    facts, narrow = facts_of("window, written"), facts_of("float8, written, joined")
    assert facts["aliased_bytes"] == 8192 * 2 * 8 * 16 * 128 * 2
    assert narrow["aliased_bytes"] == 8192 * 2 * 8 * 16 * 128 + 2 * 8 * 4  # and scales
    assert facts["temporary_bytes"] < 2**21 and narrow["temporary_bytes"] < 2**22  # the latter has KV splits


@pytest.mark.parametrize("name", _marked(POINTS))
def test_instructions_do_not_bound_the_loop(name):
    facts, gpu = facts_of(name), HOPPERS["h200"]
    bytes_per_cycle = gpu.bytes_per_second / gpu.multiprocessors / (1e9 * gpu.clock)
    cycles = 2 * facts["tile_bytes"] / bytes_per_cycle
    assert facts["issue_slots"] <= MORE.get(name, HALF) * cycles, f"{facts['issue_slots']} of {cycles:.0f}"


@pytest.mark.parametrize("name", _marked(POINTS))
def test_the_loop_copies_and_multiplies_as_its_schedule_says(name):
    facts, point = facts_of(name), POINTS[name]
    tokens = facts["tile_bytes"] // (jnp.dtype(point.dtype).itemsize * point.head_dim)
    # Each of four warps copies as many pages. Where a block has fewer, one copy of a tile is guarded.
    assert facts["copies"] == 2 * -(-tokens // point.page_size // 4)
    # Products of 64 x n x 16: scores over head_dim, values over tokens. Those with int8 keys are 64 x n x 32.
    of_keys = (tokens // 64) * (point.head_dim // (32 if point.dtype == "int8" else 16))
    of_values = (point.head_dim // 64) * (tokens // 16)
    assert count(facts["loop"], "IGMMA") == (of_keys if point.dtype == "int8" else 0)
    assert facts["products"] == of_values + (0 if point.dtype == "int8" else of_keys)
    assert facts["fences"] == (4 if "float8" in point.dtype else 2)


@pytest.mark.parametrize("name", _marked(NARROW))
def test_a_tile_is_converted_when_all_warps_are_done_with_the_one_before(name):
    """After a product is awaited, in this turn or the one before, all warps meet before the next tile is stored."""
    loop, met, stores = facts_of(name)["loop"], True, 0
    for instruction in loop + loop:
        if instruction.startswith("WARPGROUP.DEPBAR"):
            met = False
        met = met or opcode(instruction) == "BAR"
        stores += instruction.startswith("STS.128")
        assert met or not instruction.startswith("STS.128"), instruction
    point, facts = NARROW[name], facts_of(name)
    # 16 bytes by each of 128 threads; keys and values, but of int8 pages values alone. No thread stores out of turn,
    # which would take selects; the place of a listed page takes some too.
    widened = facts["tile_bytes"] // 128 // 8 * (1 if point.dtype == "int8" else 2)
    assert stores == 2 * widened and (point.listed or count(loop, "SEL") < 16)


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
