"""Schedules of the prefill kernel: the heuristic, which schedules fit a chip, and which ones are worth timing."""

import math
from collections.abc import Iterator
from typing import Any

from paged.spec import PageLayout

from ...program import Call, Program, Wanted
from ...schedule import around, grid, halvings
from ..chips import LANES, Chip
from .launch import PrefillLaunch
from .own import OwnShape
from .schedule import RaggedSchedule
from .shape import TileShape

# Tokens of a page block. With fewer, the steps between blocks take a share of the time. With more, the kernel is not
# faster, and the buffers are larger (modelled).
_TOKENS = 512
# The rows of a tile, counted over all heads: enough strip groups for a straight line of code, with enough rows in each.
_TILE_ROWS = 4096
# The least rows of a strip group. With half as many the kernel takes 1.5x as long (modelled).
_STRIP_GROUP_ROWS = 192
# The share of vector memory that the kernel's buffers may take. It is larger than that of the decode kernel, because
# the buffers hold what the decode kernel keeps in registers. The compiler needs the rest for spilled registers.
_BUFFER_SHARE = 0.7


def launch_of(
    program: Program,
    layout: PageLayout,
    call: Call,
    schedule: RaggedSchedule,
    chip: Chip,
    interpret: Any = False,
    wanted: Wanted | None = None,
) -> PrefillLaunch:
    """The prefill kernel that a schedule describes. Unless it is said, results are wanted in the queries' dtype."""
    wanted = wanted or Wanted(call.q_dtype)
    # How many words of ancestors there are is known only with the batch. Below 128 they take no more memory than none.
    own = OwnShape(call.tokens, 0) if call.has_own_rows else None
    return PrefillLaunch(program, layout, call.q_dtype, wanted, schedule, chip, interpret, own)


def plan_schedule(program: Program, layout: PageLayout, call: Call, chip: Chip) -> RaggedSchedule:
    """The heuristic: blocks of about `_TOKENS` tokens and tiles of about `_TILE_ROWS` rows, as far as memory reaches.

    Where the call has a static number of query rows per sequence, a tile has no more than these, rounded up.
    """
    rows = _tile_positions(program)
    if call.query_rows is not None:
        rows = max(16, min(rows, 2 ** (call.query_rows - 1).bit_length()))
    step = _pages_of_whole_registers(layout)
    schedule = RaggedSchedule(
        pages_per_block=max(1, _TOKENS // layout.page_size // step) * step,
        rows_per_tile=rows,
        buffers=4,
        cores=chip.cores,
    )
    # Shrink until the kernel fits: the fourth buffer, rows down to 64, tokens, rows down to 16, the third buffer.
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
    """The positions of a tile whose rows come nearest to `_TILE_ROWS`.

    Only a tile whose strip groups have at least `_STRIP_GROUP_ROWS` rows counts, if there is one.
    """

    def cost(positions):
        shape = TileShape(positions, program.num_q_heads, program.group)
        return shape.strip_group_rows < _STRIP_GROUP_ROWS, abs(math.log2(positions * program.num_q_heads / _TILE_ROWS))

    return min((2**power for power in range(4, 10)), key=cost)


def refuses_call(program: Program, layout: PageLayout, call: Call, chip: Chip) -> str | None:
    """Why no schedule of the prefill kernel fits the chip in this call, or None."""
    smallest = plan_schedule(program, layout, call, chip)
    if launch_of(program, layout, call, smallest, chip).vmem_bytes > vmem_budget(chip):
        return (
            f"{smallest.rows_per_tile} query rows of {program.num_q_heads} heads, with two blocks of "
            f"{smallest.pages_per_block} pages, do not fit the vector memory of {chip.words}: use smaller "
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
            f"its buffers take {taken} bytes of vector memory, and there are {budget} for them on {chip.words}: "
            "lower rows_per_tile, pages_per_block or buffers."
        )
    if schedule.cores > chip.cores:
        return f"it has cores={schedule.cores}, and a device of {chip.words} has {chip.cores}."
    return None


def alternatives(layout: PageLayout, own: RaggedSchedule) -> Iterator[RaggedSchedule]:
    """Half and twice as many rows of a tile, with half and twice as many pages of a block; then 2, 3 and 4 buffers."""
    step = _pages_of_whole_registers(layout)
    pages = sorted({max(step, size // step * step) for size in around(own.pages_per_block)})
    rows = [rows for rows in around(own.rows_per_tile) if rows >= 16]
    yield from grid(own, rows_per_tile=rows, pages_per_block=pages)
    yield from grid(own, buffers=(2, 3, 4))


def neighbours(layout: PageLayout, call: Call, asked: RaggedSchedule, chip: Chip) -> Iterator[RaggedSchedule]:
    """Schedules like ``asked``, rounded to page blocks of whole registers and to tiles of a power of two of rows, and
    with smaller blocks, smaller tiles and fewer buffers.

    A rounded block holds at most the pages of one sequence: a larger one would stay empty.
    """
    step = _pages_of_whole_registers(layout)
    most = min(asked.pages_per_block, call.pages_per_seq) + step - 1
    pages = [max(step, size // step * step) for size in (most, *halvings(most))]
    rows = [2**power for power in range(4, max(5, asked.rows_per_tile.bit_length() + 1))]
    within = asked.replace(cores=min(asked.cores, chip.cores))
    pages = [asked.pages_per_block, *dict.fromkeys(pages)]
    yield from grid(within, pages_per_block=pages, rows_per_tile=rows, buffers=range(2, asked.buffers + 1))


def _pages_of_whole_registers(layout: PageLayout) -> int:
    """The fewest pages whose tokens fill whole registers of 128 lanes."""
    return LANES // math.gcd(layout.page_size, LANES)


def vmem_budget(chip: Chip) -> int:
    """Vector memory that the prefill kernel's buffers may take, in bytes."""
    return int(_BUFFER_SHARE * chip.vmem_bytes)
