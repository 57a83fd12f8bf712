"""How many tiles the form ``"at_once"`` works on in one step: as many as fit in the memory that a step may take."""

from typing import Any

import jax.numpy as jnp

from paged.spec import PageLayout

from ..program import Call, Program, at_most, most_pages_of_any
from .schedule import AT_ONCE, XlaSchedule

# Temporaries of a step, at most, as `key_bytes` counts them: of sums, and of products of matrices. Sums of so many keys
# cost the same whether or not their pages are seen, so that larger steps would not follow what is visible.
_SUMMED_BYTES, _PRODUCT_BYTES = 64 * 2**20, 192 * 2**20
# Temporaries of a derivative's step, at most, as `derivative_key_bytes` counts them.
DERIVATIVE_BYTES = 288 * 2**20
# The most query rows per KV head whose products are sums, which read the pages in place. More rows are worth a copy of
# their pages, since a product of matrices reads each number once for many rows.
_SUMMED_ROWS = 8
# Keys of a page block that make a step worth its launches: below these, fewer row blocks are taken instead.
_LEAST_KEYS = 1024
# Steps of products of matrices that are made without asking whether they are needed.
FIXED_STEPS = 4
# Query rows in a row block: of sequences whose rows are known to be many, and of a ragged batch, where a row block is
# filled by one sequence.
_EVEN_ROWS, _RAGGED_ROWS = 512, 64
# What stands for a size that is not known when traced.
_OPEN = 32


def is_summed(group_rows: int) -> bool:
    """Whether a tile of so many query rows per KV head is a sum of products, and not a product of matrices."""
    return group_rows <= _SUMMED_ROWS


def is_narrow(q_dtype: Any, layout: PageLayout) -> bool:
    """Whether queries and pages have one 16-bit dtype, in which they are multiplied as they are."""
    return jnp.dtype(q_dtype) == layout.dtype and layout.dtype.itemsize == 2


def key_bytes(program: Program, layout: PageLayout, q_dtype: Any, rows: int) -> int:
    """Bytes that one key of a row block takes in a step: scores, weights and, where they are stored, key and value."""
    scores = 4 * program.num_q_heads * rows
    if is_summed(program.group * rows):
        return 2 * scores
    if not is_narrow(q_dtype, layout):
        return 2 * scores + 4 * program.num_kv_heads * (layout.head_dim + layout.value_dim)
    # Weights take the place of the scores that they are made of, and meet each value twice: see `at_once`.
    return scores + 2 * program.num_kv_heads * (layout.head_dim + 2 * layout.value_dim)


def derivative_key_bytes(program: Program, layout: PageLayout, rows: int) -> int:
    """The same of a derivative: scores four times over; keys and values, with their gradients, in float32."""
    return 16 * program.num_q_heads * rows + 8 * program.num_kv_heads * (layout.head_dim + layout.value_dim)


def fit(limit: int, bytes_per_key: int, page_size: int, row_blocks: Any, pages: Any) -> tuple[int, int]:
    """Row blocks and pages of a step of at most ``limit`` bytes: at least one of each.

    All row blocks come first, unless so few keys would be left to each that row blocks are better taken in turn. Steps
    are made alike, so that the last one is not smaller.
    """
    common = max(1, _LEAST_KEYS // page_size)
    row_blocks, pages = _known(row_blocks, _OPEN), _known(pages, common)
    room = max(1, limit // (bytes_per_key * page_size))
    least = min(pages, common)
    at_once = _alike(row_blocks, max(1, room // least))
    return at_once, _alike(pages, max(1, room // at_once))


def _known(size: Any, stand_in: int) -> int:
    return size if isinstance(size, int) else stand_in


def _alike(total: int, most: int) -> int:
    return -(-total // -(-total // most))


def at_once_schedule(program: Program, layout: PageLayout, call: Call) -> XlaSchedule:
    """The heuristic for GPUs."""
    rows = at_most(_RAGGED_ROWS, call.tokens) if call.query_rows is None else min(_EVEN_ROWS, call.query_rows)
    limit = _SUMMED_BYTES if is_summed(program.group * rows) else _PRODUCT_BYTES
    sizes = key_bytes(program, layout, call.q_dtype, rows), layout.page_size
    at_once, pages = fit(
        limit, *sizes, most_row_blocks(call, rows), pages_listed(program, layout.page_size, call, rows)
    )
    return XlaSchedule(pages_per_block=pages, rows_per_tile=rows, row_blocks_at_once=at_once, form=AT_ONCE)


def most_row_blocks(call: Call, rows: int, is_single: bool = False) -> Any:
    """How many row blocks the rows of a call can be cut into; ``is_single``: of the sequences that have one row."""
    if call.query_rows is not None and call.has_even_starts:
        return call.slots * -(-call.query_rows // rows)
    if not (isinstance(call.slots, int) and isinstance(call.tokens, int)):
        return call.slots + call.tokens // rows if rows > 1 else call.tokens
    # Most where as many sequences as possible have a row: each of them may end with a row block that is not full.
    members = min(call.slots, call.tokens)
    return members if is_single else members + (call.tokens - members) // rows


def pages_listed(program: Program, page_size: int, call: Call, rows: int) -> Any:
    """How many pages a row block's list has room for."""
    if call.has_own_rows or not isinstance(call.pages_per_seq, int):
        return call.pages_per_seq
    return most_pages_of_any(program, page_size, call.pages_per_seq, rows)


def walk_sizes(program: Program, layout: PageLayout, call: Call, schedule: XlaSchedule, rows: int) -> tuple[int, int]:
    """Row blocks at once and pages per block of a phase whose row blocks have ``rows`` rows.

    Smaller row blocks than the schedule's are as many more as take the same memory. A page block is no longer than the
    list of pages.
    """
    of_tile, own = (key_bytes(program, layout, call.q_dtype, r) for r in (schedule.rows_per_tile, rows))
    at_once = schedule.row_blocks_at_once * max(1, of_tile // own)
    return at_once, at_most(schedule.pages_per_block, pages_listed(program, layout.page_size, call, rows))


def described(program: Program, layout: PageLayout, call: Call, schedule: XlaSchedule) -> list[str]:
    """Lines for `explain`: of the row blocks of most rows, how many steps there are, and the memory of one."""
    rows = schedule.rows_per_tile if call.query_rows is None else min(schedule.rows_per_tile, call.query_rows)
    at_once, pages = walk_sizes(program, layout, call, schedule, rows)
    row_blocks, listed = most_row_blocks(call, rows), pages_listed(program, layout.page_size, call, rows)
    at_once = at_most(at_once, row_blocks)
    mebibytes = at_once * pages * layout.page_size * key_bytes(program, layout, call.q_dtype, rows) / 2**20
    groups, steps = -(-row_blocks // at_once), -(-listed // pages)
    fixed = fixed_steps(program.group * rows)
    is_fixed = isinstance(groups * steps, int) and groups * steps <= fixed
    told = "without a loop" if is_fixed else "in loops whose turns follow the batch: the host reads one number per turn"
    return [
        f"at most {groups * steps} steps, each of {at_once} row blocks side by side over {pages * layout.page_size} "
        f"keys, {told}",
        f"a step stores about {mebibytes:.0f} MiB, whatever the table's width; never timed on a GPU",
    ]


def fixed_steps(group_rows: int) -> int:
    """How many steps are made whether or not their pages are seen, so that nobody has to wait for their number.

    A step of sums takes long enough to be worth a wait.
    """
    return 1 if is_summed(group_rows) else FIXED_STEPS
