"""The schedule that a chip would be given: from its memory, the bytes of a page, and how much of a sequence is seen."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from paged.spec import PageLayout

from ..call import Call
from ..program import Program
from ..schedule import Schedule
from ..seen import most_pages_seen
from .chips import Chip
from .decode import ITEMS_AT_ONCE
from .launch import Launch
from .prefill_launch import PrefillLaunch
from .tiles import TileShape
from .views import Views

# A call of which nothing is known: a common decode step.
COMMON = Call(tokens=64, slots=64, pages_per_seq=256, num_pages=2**14, query_rows=1, q_dtype=jnp.dtype("bfloat16"))

# Tokens a block: with fewer, the steps between blocks show beside the work; more hold memory for nothing (modelled).
_TOKENS = 512
# Scores of one tile, rows x columns, that are worked on at once.
_SCORES = 2**17
# Query rows of a tile of many, all heads counted: enough parts for a straight line of code, of enough rows each.
_TILE_ROWS = 4096
# Rows of a part, at least: with half as many the kernel takes half as long again (modelled).
_PART_ROWS = 192
# Seconds for which HBM must have bytes on their way, and as many bytes as are enough for any chip: with fewer it waits
# out its latency, with more the results of short sequences wait behind pages (modelled).
_IN_FLIGHT, _MOST_IN_FLIGHT = 0.5e-6, 2**20
# Columns of a block up to which heads go in pairs; with more, a head's own keys fill a product's width (modelled).
_PAIRED_COLUMNS = 256
_MOST_BUFFERS = 8
# Of all chips v5e's memory moves fewest bytes a cycle: while a short sequence's pages arrive, the stages of the one
# before are through, and a turn that waits for two of them takes 1 to 2 % longer than two turns (modelled).
_ONE_AT_A_TIME = frozenset({"v5e"})
# The share of vector memory that buffers may take; the compiler needs the rest for what it spills.
_BUFFER_SHARE, _PREFILL_BUFFER_SHARE = 0.6, 0.7


def launch_of(
    program: Program, layout: PageLayout, call: Call, schedule: Schedule, chip: Chip, interpret: Any = False
) -> Launch:
    """The kernel that a schedule describes."""
    views = _views(program, layout, call, schedule.pages_per_block)
    items_at_once = 1 if chip.generation in _ONE_AT_A_TIME else ITEMS_AT_ONCE
    cut = (schedule.sequence, schedule.buffers, schedule.kv_splits, schedule.cores, items_at_once)
    return Launch(program, views, *cut, chip, interpret)


def plan_schedule(name: str, program: Program, layout: PageLayout, call: Call | None, chip: Chip) -> Schedule:
    """The heuristic. Blocks are as long as most sequences are seen, up to `_TOKENS`, and shorter where memory ends."""
    call = call or COMMON
    rows = dataclasses.replace(_views(program, layout, call, 1), is_paired=False)
    per_token = rows.tile_rows * rows.columns_per_token
    tokens = min(_TOKENS, max(128, _SCORES // per_token))
    seen = most_pages_seen(program, layout.page_size, call)
    pages = max(1, min(tokens // layout.page_size, _round_up(seen, layout.page_size)))
    splits = 1 if chip.cores == 1 else max(1, min(seen // (2 * pages), -(-2 * chip.cores // call.slots)))
    in_flight = min(_IN_FLIGHT * chip.hbm_bytes_per_second, _MOST_IN_FLIGHT)
    buffers = 2 + math.ceil(in_flight / (pages * layout.bytes_per_page))
    # Short sequences are worked on some at once, while as many more are on their way.
    buffers = max(buffers, 2 * ITEMS_AT_ONCE) if seen <= pages else buffers
    schedule = Schedule(
        lowering=name,
        pages_per_block=pages,
        buffers=min(_MOST_BUFFERS, buffers),
        kv_splits=splits,
        cores=chip.cores,
    )
    while not _fits(program, layout, call, schedule, chip):
        if schedule.buffers > 2:
            schedule = schedule.replace(buffers=schedule.buffers - 1)
        elif schedule.pages_per_block > 1:
            schedule = schedule.replace(pages_per_block=schedule.pages_per_block // 2)
        else:
            return schedule
    return schedule


def prefill_launch_of(
    program: Program, layout: PageLayout, call: Call, schedule: Schedule, chip: Chip, interpret: Any = False
) -> PrefillLaunch:
    """The prefill kernel that a schedule describes."""
    dtype = compute_dtype(layout, call.q_dtype)
    cut = (schedule.pages_per_block, schedule.query_rows, schedule.buffers, schedule.cores)
    return PrefillLaunch(program, layout, dtype, *cut, chip, interpret)


def plan_prefill(name: str, program: Program, layout: PageLayout, call: Call | None, chip: Chip) -> Schedule:
    """The heuristic for many query rows: tiles of `_TILE_ROWS` rows of all heads, and less of either where memory ends.

    A tile is never more than a sequence's rows, where that number is known."""
    call = call or COMMON
    rows = _tile_positions(program)
    if call.query_rows is not None:
        rows = max(16, min(rows, 2 ** (call.query_rows - 1).bit_length()))
    step = 128 // math.gcd(layout.page_size, 128)
    schedule = Schedule(
        lowering=name,
        pages_per_block=max(1, _TOKENS // layout.page_size // step) * step,
        query_rows=rows,
        buffers=4,
        cores=chip.cores,
    )
    while prefill_launch_of(program, layout, call, schedule, chip).vmem_bytes > prefill_vmem_budget(chip):
        if schedule.buffers > 3:
            schedule = schedule.replace(buffers=3)
        elif schedule.query_rows > 64:
            schedule = schedule.replace(query_rows=schedule.query_rows // 2)
        elif schedule.pages_per_block > step:
            schedule = schedule.replace(pages_per_block=max(1, schedule.pages_per_block // 2 // step) * step)
        elif schedule.query_rows > 16:
            schedule = schedule.replace(query_rows=schedule.query_rows // 2)
        elif schedule.buffers > 2:
            schedule = schedule.replace(buffers=2)
        else:
            return schedule
    return schedule


def _tile_positions(program: Program) -> int:
    """Of the positions whose parts have rows enough, those that come nearest to `_TILE_ROWS`."""

    def cost(positions):
        shape = TileShape(positions, program.num_q_heads, program.group)
        return shape.rows < _PART_ROWS, abs(math.log2(positions * program.num_q_heads / _TILE_ROWS))

    return min((2**power for power in range(4, 10)), key=cost)


def _round_up(pages: int, page_size: int) -> int:
    """From 256 tokens on, a power of two times 128, whose halves of halves are blocks as well (`Views.parts`)."""
    if pages * page_size <= 256 or 128 % page_size:
        return pages
    return 2 ** (pages * page_size - 1).bit_length() // page_size


def vmem_bytes(program: Program, layout: PageLayout, call: Call, schedule: Schedule) -> int:
    """Vector memory of the kernel's buffers."""
    views = _views(program, layout, call, schedule.pages_per_block)
    return Launch.vmem_bytes(views, schedule.buffers)


def vmem_budget(chip: Chip) -> int:
    """Vector memory that decode's buffers may take."""
    return int(_BUFFER_SHARE * chip.vmem_bytes)


def prefill_vmem_budget(chip: Chip) -> int:
    """Vector memory that prefill's buffers may take, which hold what decode keeps in registers."""
    return int(_PREFILL_BUFFER_SHARE * chip.vmem_bytes)


def compute_dtype(layout: PageLayout, q_dtype: Any) -> Any:
    """What products take: exact for queries and pages alike; stored 8-bit values are exact in bfloat16."""
    stored = jnp.dtype("bfloat16") if layout.is_quantised else layout.dtype
    return jnp.promote_types(jnp.promote_types(q_dtype, stored), jnp.bfloat16)


def _views(program: Program, layout: PageLayout, call: Call, pages_per_block: int) -> Views:
    group = -(-program.group // 8) * 8
    dtype = compute_dtype(layout, call.q_dtype)
    views = Views(layout, pages_per_block, call.query_rows or 1, group, dtype)
    return dataclasses.replace(views, is_paired=views.can_pair and views.columns <= _PAIRED_COLUMNS)


def _fits(program: Program, layout: PageLayout, call: Call, schedule: Schedule, chip: Chip) -> bool:
    return vmem_bytes(program, layout, call, schedule) <= vmem_budget(chip)
