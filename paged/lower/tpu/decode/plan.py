"""The decode kernel's schedules: which calls the kernel refuses, the heuristic, what fits a chip, what to time."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from paged.spec import PageLayout

from ...program import COMMON, Call, PageIntervals, Program, most_pages_seen
from ...schedule import around, grid, halvings
from ..chips import LANES, SUBLANES, Chip
from ..pages import Facts, Views, compute_dtype, kernel_slices, most_brought
from .kernel import ITEMS_AT_ONCE
from .launch import DecodeLaunch
from .schedule import DecodeSchedule

# The most query rows of a KV head, padded. Batches with more are for the prefill kernel.
_MOST_QUERY_ROWS = 128
# Tokens per page block. With fewer, the time between blocks shows beside the work; more only occupy memory (modelled).
_TOKENS = 512
# The most scores of a tile, rows x columns, that one step of the softmax works on.
_SCORES = 2**17
# HBM must have bytes on their way for so many seconds, or the kernel waits out its latency. The number of bytes is
# enough for any chip: with more on their way, the results of short sequences wait behind pages (modelled).
_IN_FLIGHT, _MOST_IN_FLIGHT = 0.5e-6, 2**20
# The most columns of a block whose heads are paired. With more, the keys of one head fill a product's width (modelled).
_PAIRED_COLUMNS = 256
_MOST_BUFFERS = 8
# v5e moves the fewest bytes per cycle. A short sequence is finished there before the next one's pages arrive, and
# working on two together takes 1 to 2 % longer than one after the other (modelled).
_ONE_AT_A_TIME = frozenset({"v5e"})


def launch_of(
    program: Program, layout: PageLayout, call: Call, schedule: DecodeSchedule, chip: Chip, interpret: Any = False
) -> DecodeLaunch:
    """The kernel that a schedule describes."""
    views = _views(program, layout, call, schedule.pages_per_block)
    items_at_once = 1 if chip.generation in _ONE_AT_A_TIME else ITEMS_AT_ONCE
    return DecodeLaunch(program, views, schedule, call.has_even_rows, items_at_once, chip, interpret)


def intervals_of(
    program: Program, layout: PageLayout, call: Call, schedule: DecodeSchedule, chip: Chip
) -> PageIntervals | None:
    """The page intervals that the scalar core computes the work from; None where it needs lists of pages.

    It does where visible pages are not proven to be one run, where most of that run may be holes, where rows are not
    even, and where scalar memory cannot hold the block table of one sequence.
    """
    if not call.has_even_rows or call.has_holes or not call.num_pages:
        return None
    if not slots_per_kernel(program, call, schedule, chip):
        return None
    return program.page_intervals(layout.page_size)


def slots_per_kernel(program: Program, call: Call, schedule: DecodeSchedule, chip: Chip) -> int:
    """How many sequences' block tables, with what their batch brings and what is known of their items, scalar memory
    holds."""
    per_slot = 4 * call.pages_per_seq + 8 + 4 * Facts.per_item(call.has_own_rows) * schedule.kv_splits
    per_slot += 4 * brought_of(program, call)
    return min(call.slots, chip.smem_for_lists // per_slot)


def brought_of(program: Program, call: Call) -> int:
    """How many numbers the batch brings for each sequence."""
    return most_brought(program, call.query_rows or 1, call.has_own_rows)


def kernels_of(program: Program, layout: PageLayout, call: Call, schedule: DecodeSchedule, chip: Chip) -> int:
    """The number of kernels of a call."""
    if intervals_of(program, layout, call, schedule, chip) is not None:
        return -(-call.slots // slots_per_kernel(program, call, schedule, chip))
    brought = brought_of(program, call)
    return len(list(kernel_slices((call.slots, call.pages_per_seq), chip, schedule.kv_splits, brought)))


def plan_schedule(program: Program, layout: PageLayout, call: Call | None, chip: Chip) -> DecodeSchedule:
    """The heuristic: a page block holds what most sequences' rows see, up to `_TOKENS`, or less if memory is short.

    The ring has as many stages as keep HBM busy. Sequences are split only for a second core that would have no work.
    """
    call = call or COMMON
    rows = dataclasses.replace(_views(program, layout, call, 1), is_paired=False)
    per_token = rows.tile_rows * rows.columns_per_token
    tokens = min(_TOKENS, max(LANES, _SCORES // per_token))
    seen = most_pages_seen(program, layout.page_size, call)
    pages = max(1, min(tokens // layout.page_size, _round_up(seen, layout.page_size)))
    splits = 1 if chip.cores == 1 else max(1, min(seen // (2 * pages), -(-2 * chip.cores // call.slots)))
    in_flight = min(_IN_FLIGHT * chip.hbm_bytes_per_second, _MOST_IN_FLIGHT)
    buffers = 2 + math.ceil(in_flight / (pages * layout.bytes_per_page))
    # Short sequences are worked on together, while as many more are on their way.
    buffers = max(buffers, 2 * ITEMS_AT_ONCE) if seen <= pages else buffers
    schedule = DecodeSchedule(
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


def refuses_call(program: Program, layout: PageLayout, call: Call, chip: Chip) -> str | None:
    """Why the decode kernel does not accept this call, or None."""
    if call.query_rows is None:
        return "it decodes, with as many query rows for every sequence (RaggedBatch.decode), and this batch's rows vary"
    rows = call.query_rows * -(-program.group // SUBLANES) * SUBLANES
    if rows > _MOST_QUERY_ROWS:
        return (
            f"it decodes: {call.query_rows} query rows per sequence are {rows} rows per KV head, of at most "
            f"{_MOST_QUERY_ROWS}"
        )
    smallest = plan_schedule(program, layout, call, chip)
    if vmem_bytes(program, layout, call, smallest) > vmem_budget(chip):
        return (
            f"two pages of {layout.bytes_per_page} bytes, with queries and results, do not fit the vector memory of "
            f"{chip.words}: use smaller pages"
        )
    return None


def fits(program: Program, layout: PageLayout, call: Call, schedule: DecodeSchedule, chip: Chip) -> str | None:
    """Why a schedule does not fit the chip, or None."""
    taken, budget = vmem_bytes(program, layout, call, schedule), vmem_budget(chip)
    if taken > budget:
        return (
            f"its buffers take {taken} bytes of vector memory, and there are {budget} for them on {chip.words}: "
            "lower pages_per_block or buffers."
        )
    if schedule.kv_splits > call.pages_per_seq:
        return f"it splits sequences into kv_splits={schedule.kv_splits}, and they have {call.pages_per_seq} pages."
    if schedule.cores > chip.cores:
        return f"it has cores={schedule.cores}, and a device of {chip.words} has {chip.cores}."
    return None


def alternatives(call: Call, own: DecodeSchedule) -> Iterator[DecodeSchedule]:
    """Schedules to time beside ``own``: page blocks and buffers together, then the loop on the grid, then KV splits."""
    pages = around(own.pages_per_block)
    buffers = sorted({2, own.buffers, max(2, own.buffers // 2), min(_MOST_BUFFERS, 2 * own.buffers)})
    yield from grid(own, pages_per_block=pages, buffers=buffers)
    yield from grid(own, sequence=("inline", "grid"))
    yield from grid(own, kv_splits=[splits for splits in around(own.kv_splits) if splits <= call.pages_per_seq])


def neighbours(call: Call, asked: DecodeSchedule, chip: Chip) -> Iterator[DecodeSchedule]:
    """Schedules like ``asked`` with smaller page blocks, fewer buffers, and no more KV splits and cores than there are.

    A block that the chip has no room for holds at most the pages of one sequence: a larger one would stay empty.
    """
    within = asked.replace(kv_splits=min(asked.kv_splits, call.pages_per_seq), cores=min(asked.cores, chip.cores))
    pages = [asked.pages_per_block, *halvings(min(asked.pages_per_block, call.pages_per_seq))]
    yield from grid(within, pages_per_block=pages, buffers=range(2, asked.buffers + 1))


def _round_up(pages: int, page_size: int) -> int:
    """From 256 tokens on, the next power of two of tokens. Its halves of halves are `Views.prefixes` as well."""
    if pages * page_size <= 2 * LANES or LANES % page_size:
        return pages
    return 2 ** (pages * page_size - 1).bit_length() // page_size


def vmem_bytes(program: Program, layout: PageLayout, call: Call, schedule: DecodeSchedule) -> int:
    """Vector memory of the kernel's buffers."""
    views = _views(program, layout, call, schedule.pages_per_block)
    return DecodeLaunch.vmem_bytes(views, program.group, schedule.buffers)


def vmem_budget(chip: Chip) -> int:
    """Vector memory that the decode kernel's buffers may occupy."""
    return chip.vmem_for_buffers


def _views(program: Program, layout: PageLayout, call: Call, pages_per_block: int) -> Views:
    # Tiles read groups of 2, 4 and whole registers as they lie. Rows of others are laid `Apart` for whole registers.
    group = program.group if program.group in (2, 4) else -(-program.group // SUBLANES) * SUBLANES
    dtype = compute_dtype(layout, call.q_dtype)
    views = Views(layout, pages_per_block, call.query_rows or 1, group, dtype)
    return dataclasses.replace(views, is_paired=views.can_pair and views.columns <= _PAIRED_COLUMNS)


def _fits(program: Program, layout: PageLayout, call: Call, schedule: DecodeSchedule, chip: Chip) -> bool:
    return vmem_bytes(program, layout, call, schedule) <= vmem_budget(chip)
