"""The prefill kernel's schedule: what a chip would be given, what fits, what is refused, and what is worth timing."""

import math
from collections.abc import Iterator
from typing import Any

from paged.spec import PageLayout

from ...program import Call, Program
from ...schedule import around, grid
from ..chips import LANES, Chip
from ..pages import compute_dtype
from .launch import PrefillLaunch
from .schedule import RaggedSchedule
from .shape import TileShape

# Tokens a block: with fewer, the steps between blocks show beside the work; more hold memory for nothing (modelled).
_TOKENS = 512
# Query rows of a tile of many, all heads counted: enough parts for a straight line of code, of enough rows each.
_TILE_ROWS = 4096
# Rows of a part, at least: with half as many the kernel takes half as long again (modelled).
_PART_ROWS = 192
# The share of vector memory that buffers may take, which hold what decode keeps in registers; the compiler needs the
# rest for what it spills.
_BUFFER_SHARE = 0.7


def launch_of(
    program: Program, layout: PageLayout, call: Call, schedule: RaggedSchedule, chip: Chip, interpret: Any = False
) -> PrefillLaunch:
    """The prefill kernel that a schedule describes."""
    dtype = compute_dtype(layout, call.q_dtype)
    cut = (schedule.pages_per_block, schedule.rows_per_tile, schedule.buffers, schedule.cores)
    return PrefillLaunch(program, layout, dtype, *cut, chip, interpret)


def plan_schedule(program: Program, layout: PageLayout, call: Call, chip: Chip) -> RaggedSchedule:
    """The heuristic for many query rows: tiles of `_TILE_ROWS` rows of all heads, and less of either where memory ends.

    A tile is never more than a sequence's rows, where that number is known."""
    rows = _tile_positions(program)
    if call.query_rows is not None:
        rows = max(16, min(rows, 2 ** (call.query_rows - 1).bit_length()))
    step = 128 // math.gcd(layout.page_size, 128)
    schedule = RaggedSchedule(
        pages_per_block=max(1, _TOKENS // layout.page_size // step) * step,
        rows_per_tile=rows,
        buffers=4,
        cores=chip.cores,
    )
    while launch_of(program, layout, call, schedule, chip).vmem_bytes > vmem_budget(chip):
        if schedule.buffers > 3:
            schedule = schedule.replace(buffers=3)
        elif schedule.rows_per_tile > 64:
            schedule = schedule.replace(rows_per_tile=schedule.rows_per_tile // 2)
        elif schedule.pages_per_block > step:
            schedule = schedule.replace(pages_per_block=max(1, schedule.pages_per_block // 2 // step) * step)
        elif schedule.rows_per_tile > 16:
            schedule = schedule.replace(rows_per_tile=schedule.rows_per_tile // 2)
        elif schedule.buffers > 2:
            schedule = schedule.replace(buffers=2)
        else:
            return schedule
    return schedule


def _tile_positions(program: Program) -> int:
    """Of the positions whose parts have rows enough, those that come nearest to `_TILE_ROWS`."""

    def cost(positions):
        shape = TileShape(positions, program.num_q_heads, program.group)
        return shape.strip_group_rows < _PART_ROWS, abs(math.log2(positions * program.num_q_heads / _TILE_ROWS))

    return min((2**power for power in range(4, 10)), key=cost)


def refuses_call(program: Program, layout: PageLayout, call: Call, chip: Chip) -> str | None:
    """Why no prefill kernel takes this call, or None."""
    smallest = plan_schedule(program, layout, call, chip)
    if launch_of(program, layout, call, smallest, chip).vmem_bytes > vmem_budget(chip):
        return (
            f"{smallest.rows_per_tile} query rows of {program.num_q_heads} heads, with two blocks of "
            f"{smallest.pages_per_block} pages, do not fit the {chip.generation} chip's vector memory: use smaller "
            "pages"
        )
    return None


def fits(program: Program, layout: PageLayout, call: Call, schedule: RaggedSchedule, chip: Chip) -> str | None:
    """Why a schedule of the prefill kernel cannot run on the chip, or None."""
    rows, tokens = schedule.rows_per_tile, schedule.pages_per_block * layout.page_size
    if rows < 16 or rows & (rows - 1):
        return f"it has rows_per_tile={rows}, which must be a power of two, and at least 16."
    if tokens % LANES:
        return f"its blocks of {tokens} tokens must be a multiple of {LANES}: change pages_per_block."
    taken = launch_of(program, layout, call, schedule, chip).vmem_bytes
    budget = vmem_budget(chip)
    if taken > budget:
        return (
            f"its buffers take {taken} bytes of vector memory, and there are {budget} for them on {chip.generation}: "
            "lower rows_per_tile, pages_per_block or buffers."
        )
    if schedule.cores > chip.cores:
        return f"it has cores={schedule.cores}, and a device of {chip.generation} has {chip.cores}."
    return None


def alternatives(layout: PageLayout, own: RaggedSchedule) -> Iterator[RaggedSchedule]:
    """Tiles and blocks together, where a block is whole registers of 128 tokens; then the buffers."""
    whole = 128 // math.gcd(layout.page_size, 128)
    pages = sorted({max(whole, size // whole * whole) for size in around(own.pages_per_block)})
    yield from grid(
        own, rows_per_tile=[rows for rows in around(own.rows_per_tile) if rows >= 16], pages_per_block=pages
    )
    yield from grid(own, buffers=(2, 3, 4))


def vmem_budget(chip: Chip) -> int:
    """Vector memory that prefill's buffers may take."""
    return int(_BUFFER_SHARE * chip.vmem_bytes)
